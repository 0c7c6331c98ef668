"""The demo: what a HUT layer costs on this machine, and what it learns, beside LoRA and HiRA.

`python -m examples.demo` first times one layer, then pre-trains a byte-level GPT on Python's own
sources, freezes it and adapts it to English. It downloads nothing. It writes `demo.json` (all
figures, and what they were measured on), `losses.png`, `layers.png` and HUT's adapter files.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.measure import Quantiles, memory_method, settle_threads
from benchmarks.progress import Progress
from benchmarks.providers import PROVIDERS, prove
from benchmarks.report import tables
from benchmarks.report.text import load_sentences, thread_sentences
from benchmarks.shapes import Shape
from benchmarks.suites import layer
from examples.gpt import GPT, GPTConfig

from . import adaptation, corpora, plots, report
from .adaptation import Batches, Course

Row = dict[str, Any]
HELD_OUT_SOURCE = 65536  # bytes of the held-out sources that are read, a fraction of them
# What needs nothing but PyTorch; `python -m benchmarks layer` has PEFT's own layers too.
COMPARED = ("frozen", "hut_low_rank", "hut_paper", "hut_low_rank_eager", "lora", "hira")
BASELINES = ("frozen", "lora", "hira", "hut_low_rank_eager")


@dataclass(frozen=True)
class Size:
    """The amount of work of a demo."""

    gpt: GPTConfig
    batch: int
    pretrain_steps: int
    pretrain_rate: float
    steps: int
    shapes: tuple[Shape, ...]
    seconds: float  # of timing, per shape
    pretrain_seconds: float = 75  # at most, and so for
    adapt_seconds: float = 90
    source_bytes: int | None = None
    rate_scale: float = 1.0  # of every method's learning rates


SIZES = {
    "tiny": Size(
        gpt=GPTConfig(width=64, depth=2, heads=2, context=32),
        batch=16,
        pretrain_steps=200,
        pretrain_rate=6e-3,
        steps=50,
        shapes=(Shape(128, 256, 256),),
        seconds=1,
        source_bytes=2_000_000,
        rate_scale=1.7,  # fewer steps want larger ones
    ),
    "small": Size(
        gpt=GPTConfig(width=128, depth=3, heads=4, context=64),
        batch=16,
        pretrain_steps=1600,
        pretrain_rate=4e-3,
        steps=220,
        shapes=(Shape(64, 1024, 1024), Shape(1024, 1024, 1024)),
        seconds=8,
    ),
    "medium": Size(
        gpt=GPTConfig(width=512, depth=6, heads=8, context=256),
        batch=32,
        pretrain_steps=1500,
        pretrain_rate=1e-3,
        steps=300,
        shapes=(Shape(512, 4096, 4096), Shape(8192, 4096, 4096)),
        seconds=8,
        rate_scale=0.5,  # a wider model wants smaller ones
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 where every proof held and every merged model kept its loss."""
    options = parse(arguments)
    device, size = options.device, options.size
    begin, threads = time.perf_counter(), settle_threads()
    environment = records.environment(device)
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"On {environment['device_name']}; results go to {options.out}/")

    proofs = prove_providers(options.dtype, device)
    torch.manual_seed(options.seed)
    layer_rows = bench_layers(size, options.rank, options.dtype, device)
    base, pretraining = pretrain(size, device, options.seed)
    frozen, rows = adapt(base, options)

    plots.layers(options.out / "layers.png", layer_rows)
    plots.losses(options.out / "losses.png", pretraining, rows)
    sentences = [
        *load_sentences(environment),
        *thread_sentences(*threads),
        *report.cut_sentences("pre-training", pretraining["steps"], size.pretrain_steps),
        *report.cut_sentences("adaptation", rows[0]["steps"], size.steps),
        *(line for some in layer_rows for line in report.layer_sentences(some)),
        *report.adaptation_sentences(rows, frozen["held_out"]),
    ]
    seconds = time.perf_counter() - begin
    row = {
        "suite": "demo",
        "options": described(options),
        "memory_method": memory_method(device),
        "proofs": proofs,
        "layer": [row for some in layer_rows for row in some],
        "pretraining": pretraining,
        "frozen": frozen,
        "adaptation": rows,
        "sentences": sentences,
        "seconds": seconds,
    }
    records.write(options.out / "demo.json", [row], environment, None)
    show(layer_rows, rows, sentences, memory_method(device))
    say(f"\n{seconds:.0f} seconds; {options.out}/demo.json, losses.png, layers.png")
    kept = all(row["merged_difference"] <= report.MERGED_LIMIT for row in rows)
    return 0 if kept else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `size` as a `Size`, `device` and `dtype` as PyTorch's."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--size", choices=SIZES, help="how much to do (small; medium on a GPU)")
    add("--quick", action="store_true", help="the same as --size tiny: under half a minute")
    add("--device", type=torch.device, help="cpu, cuda, cuda:1 … (a GPU where there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the layer benchmark")
    add("--rank", type=int, default=8, help="rank of the factors (8)")
    add("--width", type=int, help="the GPT's width")
    add("--depth", type=int, help="the GPT's number of blocks")
    add("--pretrain-steps", type=int, help="steps of pre-training")
    add("--steps", type=int, help="steps of each adaptation")
    add("--rate-scale", type=float, help="multiplies every learning rate of the adaptation")
    add("--seconds", type=float, help="time for each shape of the layer benchmark")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("demo_output"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = options.device.type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this PyTorch sees no CUDA device")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if on_cuda else "float32"))
    options.preset = "tiny" if options.quick else options.size or ("medium" if on_cuda else "small")
    options.size = resized(SIZES[options.preset], options, parser)
    return options


def resized(size: Size, options: argparse.Namespace, parser: argparse.ArgumentParser) -> Size:
    """The preset with what the command line says otherwise."""
    gpt = {key: getattr(options, key) for key in ("width", "depth")}
    own = {
        key: getattr(options, key) for key in ("pretrain_steps", "steps", "seconds", "rate_scale")
    }
    for key, value in {**gpt, **own, "rank": options.rank}.items():
        if value is not None and value <= 0:
            parser.error(f"--{key.replace('_', '-')} must be more than 0, not {value}")
    if gpt["width"] is not None and gpt["width"] % size.gpt.heads:
        parser.error(f"--width must be a multiple of {size.gpt.heads}, the number of heads")
    gpt = {key: value for key, value in gpt.items() if value is not None}
    own = {key: value for key, value in own.items() if value is not None}
    return replace(size, gpt=replace(size.gpt, **gpt), **own)


def described(options: argparse.Namespace) -> Row:
    """The options as a record holds them."""
    return {
        "preset": options.preset,
        **asdict(options.size),
        "rank": options.rank,
        "dtype": str(options.dtype).split(".")[1],
        "device": str(options.device),
        "seed": options.seed,
    }


def prove_providers(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Each provider shows that it computes its formula before it may be timed."""
    errors = {name: prove(PROVIDERS[name], dtype, device) for name in COMPARED}
    say(
        f"All {len(errors)} layers compute their formulas, gradients included: the largest error "
        f"against float64 is {max(errors.values()):.1e}."
    )
    return errors


def bench_layers(size: Size, r: int, dtype: torch.dtype, device: torch.device) -> list[list[Row]]:
    """One list of records per shape."""
    found = []
    for shape in size.shapes:
        with Progress(f"layer {shape}", 1) as progress:
            found.append(
                layer.measure(
                    shape, r, dtype, device, size.seconds, COMPARED, BASELINES, progress.to
                )
            )
    return found


def pretrain(size: Size, device: torch.device, seed: int) -> tuple[GPT, Row]:
    """A GPT that has learnt Python sources, frozen, and the record of how."""
    text = corpora.python_sources(size.source_bytes)
    torch.manual_seed(seed)
    model = GPT(size.gpt).to(device)
    batches = Batches(text.train, size.gpt.context, size.batch, device, seed)
    with Progress("pre-training", 1) as progress:
        course = Course(size.pretrain_steps, size.pretrain_seconds)
        run = adaptation.pretrain(model, size.pretrain_rate, batches, course, progress.to)
    model.requires_grad_(False)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": {"digest": text.digest, **text.sizes},
        "steps": len(run.seconds),
        "curve": run.curve,
        "held_out": adaptation.mean_loss(model, text.held_out[:HELD_OUT_SOURCE]),
        "step": Quantiles.of(run.seconds).as_dict(),
        "seconds": sum(run.seconds),
    }
    say(
        f"{record['parameters']:,} parameters pre-trained in {record['seconds']:.0f} s: "
        f"{record['held_out']:.3f} nats per byte on held-out Python sources."
    )
    return model, record


def adapt(base: GPT, options: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Adapts the frozen model to English with every method; records before and after."""
    size, device, seed = options.size, options.device, options.seed
    text = corpora.english()
    batches = Batches(text.train, size.gpt.context, size.batch, device, seed + 1)
    runs = adaptation.start_runs(base, options.rank, size.rate_scale, seed)
    every = [run for some in runs.values() for run in some]
    with Progress(f"adapting {len(every)} models", 1) as progress:
        course = Course(size.steps, size.adapt_seconds)
        adaptation.train(every, batches, text.validation, course, progress.to)
    frozen = {
        "validation": adaptation.mean_loss(base, text.validation),
        "held_out": adaptation.mean_loss(base, text.held_out),
        "text": {"digest": text.digest, **text.sizes},
    }
    return frozen, adaptation.assess(runs, base, text, batches(), options.out)


def show(
    layer_rows: list[list[Row]],
    rows: list[Row],
    sentences: list[str],
    memory: str,
) -> None:
    """Prints the tables and what they say."""
    for some in layer_rows:
        for table in tables.of(some):
            say("\n" + table.text())
    say("\n" + report.adaptation_table(rows))
    say("\n" + report.sweep_table(rows))
    say(
        f"\nMemory by {memory}. LoRA and HiRA are plain PyTorch, as lean as it gets; for PEFT's "
        "own layers see `python -m benchmarks layer`."
    )
    say("\nWhat the numbers say here:")
    for line in sentences:
        say(f"- {line}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
