"""The CPU fallback against its floor, as ratios within one run: `python -m benchmarks.cpu_ratios`.

A forward and backward of a HUT layer needs three full matrix products, so their time alone is the
floor. Also: the formula of HiRA over HUT, the peak memory of a chain of layers, and what a call
costs on tiny tensors beside PEFT's LoRA layer. Exit status 1 where a limit is missed.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels import PAPER, HUTLinear

from . import records
from .measure import (
    Case,
    Quantiles,
    interleaved,
    peak_bytes,
    peak_resident_bytes,
    ratios,
    settle_threads,
    step_case,
)
from .progress import Progress
from .providers import PROVIDERS, HiRALinear, prove
from .report.text import table, thread_sentences
from .shapes import Shape

CPU = torch.device("cpu")
SHAPES = (Shape(2048, 1024, 1024), Shape(512, 1024, 4096))
R = 16
CHAIN, CHAIN_WIDTH, CHAIN_TOKENS = 6, 4096, 64
TINY = 16
IDLE = 0.5  # load average below which figures count

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures everything, prints the table; 0 where every limit holds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.cpu_ratios", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--seconds", type=float, default=8, help="time for each group of timed rows (8)"
    )
    options = parser.parse_args(arguments)
    threads = settle_threads()
    environment = records.environment(CPU)
    rows = measure(options.seconds)
    show(rows, environment["load_average"])
    for line in thread_sentences(*threads):
        print(line)
    if options.json:
        content = {"environment": environment, "seconds": options.seconds, "rows": rows}
        records.write(options.json, "cpu_ratios", content)
    return 1 if any(row["holds"] is False for row in rows) else 0


def measure(seconds: float) -> list[Row]:
    """All rows; each provider first proves its formula."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("hut_low_rank", "hut_paper", "hira"):
            prove(PROVIDERS[name], dtype, CPU)
    rows = []
    for dtype, limit in ((torch.float32, 1.20), (torch.bfloat16, 1.25)):
        for shape in SHAPES:
            rows += product_rows(shape, dtype, limit, seconds)
    return [*rows, *memory_rows(), overhead_row(seconds)]


def product_rows(shape: Shape, dtype: torch.dtype, limit: float, seconds: float) -> list[Row]:
    """HUT over its three products and, in fp32, HiRA over HUT, on one shape."""
    linear = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype)
    x = torch.randn(shape.tokens, shape.in_features, dtype=dtype, requires_grad=True)
    g = torch.randn(shape.tokens, shape.out_features, dtype=dtype)
    cases = {
        "products": three_products(x.detach(), linear.weight.detach(), g),
        "low_rank": step_case(HUTLinear.from_linear(linear, R), x, g),
        "paper": step_case(HUTLinear.from_linear(linear, R, **PAPER), x, g),
        "hira": step_case(HiRALinear(linear, R), x, g),
    }
    name = f"{str(dtype).split('.')[1]} {shape}"
    with Progress(name, 1) as progress:
        times = interleaved(cases, CPU, seconds, on_round=progress.to)
    products, hut, paper, hira = times.values()
    least = 1.5 if dtype == torch.float32 else None
    return [
        timed_row(f"{name}: HUT / three products", hut, products, at_most=limit),
        timed_row(f"{name}: HUT paper's form / three products", paper, products),
        timed_row(f"{name}: HiRA's formula / HUT", hira, hut, at_least=least),
    ]


def three_products(x: Tensor, weight: Tensor, g: Tensor) -> Case:
    """The full products of a forward and backward, and nothing else."""

    def run() -> None:
        torch.mm(x, weight.T)  # y
        torch.mm(g, weight)  # dx
        torch.mm(g.T, x)  # G

    return Case(run)


def memory_rows() -> list[Row]:
    """Peak of a step through a chain of layers, in weights above what is resident."""
    methods = {"live bytes": live_peak, "resident high-water mark": resident_peak}
    rows = []
    with Progress("memory of a chain", 4) as progress:
        for label, options in (("HUT", {}), ("HUT paper's form", PAPER)):
            for method, peak in methods.items():
                # A process of its own, which has no workspace yet: the step has to make it.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    weights = pool.submit(peak, options).result()
                limit = 2.5 if label == "HUT" else None
                rows.append(memory_row(f"{label}, {method}", weights, limit))
                progress.to(len(rows))
    return rows


def live_peak(options: dict[str, Any]) -> float:
    """Peak live bytes of a chain's step, in weights."""
    return peak_bytes(chain_case(CHAIN_WIDTH, options), CPU) / weight_bytes()


def resident_peak(options: dict[str, Any]) -> float | None:
    """Peak resident bytes of a chain's step, in weights; None where the system does not tell."""
    case = chain_case(CHAIN_WIDTH, options)
    chain_case(CHAIN_WIDTH // 64, options).run()  # threads and libraries have their buffers now
    resident = peak_resident_bytes(case.run)
    return None if resident is None else resident / weight_bytes()


def chain_case(width: int, options: dict[str, Any]) -> Case:
    """A step through `CHAIN` layers of `width`, its inputs at hand."""
    layers = [HUTLinear(width, width, R, bias=False, **options) for _ in range(CHAIN)]
    x = torch.randn(CHAIN_TOKENS, width, requires_grad=True)
    return step_case(nn.Sequential(*layers), x, torch.randn(CHAIN_TOKENS, width))


def weight_bytes() -> int:
    """Bytes of one weight of the chain, in float32."""
    return 4 * CHAIN_WIDTH**2


def overhead_row(seconds: float) -> Row:
    """A forward and backward on 16x16 tensors, over PEFT's LoRA layer."""
    what = f"{TINY}x{TINY}, r 8: HUT / PEFT's LoRA layer"
    lora = peft_lora_layer()
    if lora is None:
        return {"what": what, "note": "peft not installed, row left out", "holds": None}
    x, g = torch.randn(TINY, TINY, requires_grad=True), torch.randn(TINY, TINY)
    cases = {
        "hut": step_case(HUTLinear(TINY, TINY, 8), x, g),
        "lora": step_case(lora, x, g),
    }
    with Progress("overhead", 1) as progress:
        times = interleaved(cases, CPU, seconds, 20_000, on_round=progress.to)
    return timed_row(what, times["hut"], times["lora"], at_most=1.2)


def peft_lora_layer() -> nn.Module | None:
    """A linear layer as PEFT adapts it by default; None where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(TINY, TINY)), config)
    return model.base_model.model[0]


def timed_row(
    what: str,
    times: list[float],
    others: list[float],
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """The ratio of two cases, whose median stands against a limit, if it has one."""
    q = ratios(times, others)
    return {
        "what": what,
        "ratio": q.as_dict(),
        "seconds": Quantiles.of(times).as_dict(),
        "seconds_of_other": Quantiles.of(others).as_dict(),
        **_verdict(q.median, at_most, at_least),
    }


def memory_row(what: str, weights: float | None, at_most: float | None) -> Row:
    """A row that counts in weights of the chain's layers."""
    what = f"{CHAIN} layers {CHAIN_WIDTH}x{CHAIN_WIDTH}, N {CHAIN_TOKENS}: {what}"
    if weights is None:
        return {"what": what, "note": "this system does not tell", "holds": None}
    return {"what": what, "weights": weights, **_verdict(weights, at_most, None)}


def _verdict(value: float, at_most: float | None, at_least: float | None) -> Row:
    holds = None
    if at_most is not None:
        holds = value <= at_most
    elif at_least is not None:
        holds = value >= at_least
    return {"at_most": at_most, "at_least": at_least, "holds": holds}


def show(rows: Sequence[Row], load: float | None) -> None:
    """Prints the table, and how much it counts."""
    print(
        table(
            "The CPU fallback: ratios as median (p20–p80), memory in weights above the resident",
            ["", "figure", "limit", "verdict"],
            [[row["what"], _figure(row), _limit(row), _word(row)] for row in rows],
        )
    )
    told = "not known here" if load is None else f"{load:.2f} on {os.cpu_count()} CPUs"
    print(f"\nLoad average at the start: {told}. The figures count only on an idle machine.")
    if load is not None and load > IDLE:
        print("This machine was NOT idle: a missed limit may be another program's doing.")


def sentences(rows: Sequence[Row]) -> str:
    """What a record's ratios say: each median where it was measured."""
    medians: dict[str, list[str]] = {}
    for row in rows:
        if "ratio" in row:
            where, what = row["what"].split(": ")
            medians.setdefault(what, []).append(f"{row['ratio']['median']:.2f} ({where})")
    return " ".join(f"{what}: {', '.join(found)}." for what, found in medians.items())


def _figure(row: Row) -> str:
    if "note" in row:
        return row["note"]
    if "weights" in row:
        return f"{row['weights']:.2f}"
    q = row["ratio"]
    return f"{q['median']:.2f} ({q['p20']:.2f}–{q['p80']:.2f})"


def _limit(row: Row) -> str:
    if row.get("at_most") is not None:
        return f"<= {row['at_most']:.2f}"
    return "" if row.get("at_least") is None else f">= {row['at_least']:.2f}"


def _word(row: Row) -> str:
    return {True: "holds", False: "MISSED", None: ""}[row["holds"]]


if __name__ == "__main__":
    sys.exit(main())
