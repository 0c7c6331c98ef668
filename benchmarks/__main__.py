"""Benchmarks of HUT next to LoRA, HiRA and plain PyTorch, on this machine.

Suites: `layer`, `memory`, `overhead`, `model`, `experts`; `cpu`, what the CPU's targets need;
`cost`, which counts and measures nothing; and `estimate`, of a step on a GPU that is not here. On
their records: `compare`, `plot`, `check`, `targets`, `export` in the form of PEFT's
method_comparison, and in a checkout `tables`, which writes the tables and pictures of README.md and
docs/ anew.
"""

import argparse
import csv
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import data_sheets, records
from .bases import BASES, DENSE
from .measure import OtherPrograms, memory_method, settle_threads
from .progress import Progress
from .providers import COMPILED, GRAPH, PROVIDERS, Admission, admit, named
from .report import compare, documents, exchange, tables, targets
from .report import text as texts
from .shapes import MODELS, Shape, parsed
from .suites import cost, estimate, experts, layer, memory, model, overhead
from .suites.cost import FEW_AND_ALL

Row = dict[str, Any]

EVERYWHERE = (
    "frozen",
    "lora",
    "lora_graph",
    "peft_lora*",
    "peft_hira*",
    "peft_loha*",
    "hut_low_rank",
    "hut_low_rank_config",
    "hut_low_rank_fused",
    "hut_low_rank_staged",
    "hut_low_rank_graph",
    "hut_low_rank_compiled",
    "hut_low_rank_eager",
    "hut_low_rank_eager_compiled",
    "hut_low_rank_eager_graph",
    "hut_paper",
)
# The first three have columns in tables.
BASELINES = ("peft_lora", "lora", "hut_low_rank", "peft_hira", "hut_low_rank_eager")
SLOW_TO_COMPILE = "compiling takes long on a CPU; name it with --provider"
COMPILED_TOKENS = 512
COMPILED_ONCE = f"compiled at {COMPILED_TOKENS} tokens alone; name it with --provider"
LONGEST = 2048  # tokens of a text in an estimate
SEQUENCE = 128  # tokens of a text in the model suite; half of it on a CPU


@dataclass(frozen=True)
class Size:
    """A suite's defaults."""

    shapes: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: float = 0  # for each group of rows
    depths: tuple[int, ...] = ()
    blocks: int | None = None
    checkpointing: tuple[bool, ...] = (False, True)


# What targets.ON_CPU judges, as commands.
CPU_PARTS = (
    "layer --dtype float32 bfloat16 --shapes 16x1024x4096 512x1024x4096 2048x1024x1024 --provider "
    "frozen lora peft_lora peft_hira hira hut_low_rank hut_paper hut_low_rank_eager",
    "layer --dtype float32 bfloat16 --shapes 1x4096x4096 --rank 8 --baseline frozen "
    "--provider frozen hut_low_rank hut_paper",
    "overhead --dtype float32 --rank 8 --provider frozen lora peft_lora* peft_hira* peft_loha* "
    "hut_low_rank hut_low_rank_config hut_paper",
    "layer --dtype bfloat16 --base nf4 --shapes 512x1024x4096 512x2048x2048 --provider "
    "peft_lora peft_hira hut_low_rank",
    "memory --dtype float32 --shapes 4096x4096 --tokens 64 --depths 6 --resident "
    "--provider hut_low_rank hut_paper",
)
SIZES = {
    # suite: on a CPU, there with --quick, on a GPU, there with --quick
    "layer": (
        Size(("1024x1024", "1024x4096"), (16, 128, 512), 5),
        Size(("1024x1024",), (16, 256), 1.5),
        Size(("4096x4096", "1024x1024"), (16, 512, 2048, 4096, 16384), 2),
        Size(("4096x4096",), (16, 4096), 1),
    ),
    "memory": (
        Size(("1024x1024",), (256,), depths=(1, 2, 4, 8)),
        Size(("512x512",), (128,), depths=(1, 2, 4)),
        Size(("4096x4096",), (2048,), depths=(1, 2, 4, 8)),
        Size(("4096x4096",), (2048,), depths=(1, 4)),
    ),
    "overhead": (Size(seconds=8), Size(seconds=2), Size(seconds=8), Size(seconds=2)),
    "model": (
        Size(model.TRAINED, (64,), 1, blocks=2),
        Size(model.TRAINED[:1], (64,), 0.5, blocks=2, checkpointing=(False,)),
        Size(model.TRAINED, (4096,), 3),
        Size(model.TRAINED[:1], (2048,), 1, blocks=6),
    ),
    "experts": (
        Size(("8x2x512x512", "64x8x512x512"), (256, 1024, 4096), 20),
        Size(("8x2x256x256",), (256,), 2),
        Size(("8x2x2048x1024", "128x8x2048x768"), (4096, 16384), 4),
        Size(("8x2x2048x1024",), (4096,), 2),
    ),
    "cost": (Size(("1024x1024", "4096x4096"), (4096,)), Size(("4096x4096",), (4096,))) * 2,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 1 where a provider did not compute its formula, or a file is not valid."""
    # What was measured is written then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = _parser().parse_args(arguments)
    if arguments is None and options.command is _estimate:
        # A process that ends with the estimate: transformers and PEFT would import these for two
        # seconds, and it needs neither, whatever the base.
        sys.modules.update(dict.fromkeys(("bitsandbytes", "torchao")))  # type: ignore[arg-type]
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("interrupted: what was measured until then is written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"error: {error}; in the repository: pip install '.[bench]'", file=sys.stderr)
    return 1


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hut-bench" if Path(sys.argv[0]).stem == "hut-bench" else f"python -m {__package__}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for suite in records.SUITES:
        _add_suite(commands, suite)
    one = commands.add_parser("estimate", help="memory and time on a GPU that is not here")
    add = one.add_argument
    add("--model", default="llama-3.1-8b", help=f"{', '.join(model.RECIPES)}, or a configuration")
    add("--device", default="RTX 4090", help="a GPU's name, or memory=GiB,bandwidth=GB/s,tflops=N")
    add("--rank", type=_positive, default=16, help="rank of the factors (16)")
    add(
        "--target-modules",
        nargs="+",
        default=["all"],
        help="all, few (as papers do), or names (all)",
    )
    add(
        "--base",
        choices=estimate.BASES,
        default="bf16",
        help="storage of the frozen weights (bf16)",
    )
    add("--tokens", type=_positive, default=2048, help="tokens of a step (2048)")
    add("--checkpointing", action="store_true", help="compute blocks again in backward")
    one.set_defaults(command=_estimate)
    one = commands.add_parser("cpu", help="the CPU path and the host, judged by the targets")
    _add_files(one)
    one.add_argument("--seconds", type=_seconds, default=8, help="time for each group of rows (8)")
    one.set_defaults(command=_run, suite="cpu", device=torch.device("cpu"))
    one = commands.add_parser("compare", help="two records, row by row")
    one.add_argument("first", type=Path)
    one.add_argument("second", type=Path)
    one.set_defaults(command=_compare)
    one = commands.add_parser("plot", help="pictures of records, as PNG and SVG")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.add_argument("--out", type=Path, default=Path("plots"), help="folder (plots)")
    one.set_defaults(command=_plot)
    one = commands.add_parser("export", help="fine-tunes in the form of PEFT's method_comparison")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.add_argument("--out", type=Path, default=Path("results"), help="folder (results)")
    one.set_defaults(command=_export)
    one = commands.add_parser("check", help="whether records are valid")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.set_defaults(command=_check)
    one = commands.add_parser("targets", help="what records say of the targets on a GPU")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.set_defaults(command=_targets)
    if (records.ROOT / "README.md").exists():  # not where the package is installed
        one = commands.add_parser("tables", help="write the tables and pictures of docs/ anew")
        one.set_defaults(command=_tables)
    return parser


def _add_suite(commands: Any, suite: str) -> None:
    module = {"layer": layer, "memory": memory, "overhead": overhead, "model": model, "cost": cost}
    module["experts"] = experts
    description = str(module[suite].__doc__)
    one = commands.add_parser(
        suite,
        help=description.split(":", 1)[-1].split("\n")[0].strip(" ."),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = one.add_argument
    add("--quick", action="store_true", help="less of everything")
    _add_files(one)
    ranks = list(cost.RANKS) if suite == "cost" else [8] if suite == "experts" else [16]
    shown = " ".join(map(str, ranks))
    add("--rank", type=_positive, nargs="+", default=ranks, help=f"ranks of the factors ({shown})")
    if suite in ("layer", "memory", "cost"):
        add("--shapes", nargs="+", help=f"INxOUT, TOKENSxINxOUT, or of {', '.join(MODELS)}")
    if suite == "experts":
        add("--shapes", nargs="+", help="EXPERTSxTOPxHIDDENxINTERMEDIATE")
    if suite == "model":
        add("--shapes", nargs="+", help=f"of {', '.join(model.RECIPES)}, or configuration files")
        add("--target-modules", nargs="+", help="names of the layers to adapt (few, then all)")
        add("--blocks", type=_positive, help="how many of the models' blocks to build")
    if suite != "overhead":
        add("--tokens", type=_positive, nargs="+", help="numbers of tokens")
    if suite == "memory":
        add("--depths", type=_positive, nargs="+", help="layers of the stacks")
        add("--resident", action="store_true", help="also the process's resident high-water mark")
    if suite in ("layer", "memory", "model"):
        add("--base", choices=BASES, default=DENSE, help=f"storage of frozen weights ({DENSE})")
    if suite != "cost":
        add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"])
        add("--device", type=_torch_device, help="cpu, cuda, cuda:1 … (a GPU where there is one)")
    if suite not in ("cost", "experts"):
        add("--provider", nargs="+", help="names or shell patterns of what to run")
        add(
            "--baseline",
            nargs="+",
            help=f"what to compare with ({' '.join(BASELINES)}); tables show the first three",
        )
    if suite in ("layer", "overhead", "model", "experts"):
        add("--seconds", type=_seconds, help="time for each group of rows")
    one.set_defaults(command=_run, suite=suite)


def _add_files(parser: Any) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows as lines of JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write rows as CSV")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 up; got {text!r}")
    return value


def _torch_device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (":" in text and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N; got {text!r}")
    return torch.device(text)


# Suites


def _run(options: argparse.Namespace) -> int:
    """Runs one suite: proofs, rows, tables, files."""
    begin, device = time.perf_counter(), _device(options)
    parts = _parts(options)
    for part in parts:
        _check_before(part)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton and events go by the current one
    rows: list[Row] = []
    wrong: list[str] = []
    threads = settle_threads() if options.suite != "cost" else (1, 1)
    environment, others = records.environment(device), OtherPrograms()
    try:
        for found in (found for part in parts for found in _groups(part, wrong)):
            rows += found
            for table in tables.of(found) if options.suite != "cost" else []:
                print(f"\n{table.text()}", flush=True)
    finally:  # what was measured before an interruption is kept
        environment["other_programs_share"] = others.share()
        if rows:
            _write(rows, environment, options)
    if options.suite == "cost":
        print("\n\n".join(table.text() for table in tables.of(rows)))
        return 0
    print("", *tables.left_out(rows), sep="\n")
    _say_how(environment, threads, options)
    among = {"cpu": targets.ON_CPU, "experts": targets.EXPERTS}.get(options.suite, ())
    if device.type == "cuda":
        among = tuple(one for one in targets.ON_GPU if one.suite == options.suite)
    judged = targets.table([{**row, "environment": environment} for row in rows], among)
    if among:
        print(f"\n{judged.text()}")
    print(f"It took {time.perf_counter() - begin:.0f} seconds.")
    for name in wrong:
        print(f"{name} does NOT compute its formula: it was not timed.")
    missed = options.suite == "cpu" and any(line[-1] == targets.MISSED for line in judged.rows)
    return 1 if wrong or missed else 0


def _parts(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The suites to run: one, but of `cpu` those in which its targets stand."""
    if options.suite != "cpu":
        return [options]
    parts = [_parser().parse_args([*part.split(), "--device", "cpu"]) for part in CPU_PARTS]
    for part in parts:
        part.seconds = options.seconds
    return parts


def _check_before(options: argparse.Namespace) -> None:
    """Refuses what would be refused after measuring.

    Raises:
        ValueError: An unknown shape or provider, a stack of layers that are not square.
        OSError: A file that cannot be written.
    """
    for file in filter(None, (options.json, options.csv)):
        there = file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
        if not there:
            file.unlink()
    shapes = []
    if options.suite in ("layer", "memory", "cost") and options.shapes:
        shapes = parsed(options.shapes, options.tokens or [1])
    for name in options.shapes or () if options.suite == "model" else ():
        model.recipe_of(name)
    for shape in shapes if options.suite == "memory" else ():
        memory.check(shape)
    if options.suite == "experts":
        experts.parsed(options.shapes or (), options.tokens or [1])
    elif options.suite != "cost":
        _names(options)


def _write(rows: list[Row], environment: Row, options: argparse.Namespace) -> None:
    if options.json:
        records.write(options.json, rows, environment)
    if options.csv:
        _write_csv(options.csv, rows, environment)


def _say_how(environment: Row, threads: tuple[int, int], options: argparse.Namespace) -> None:
    print(f"\n{tables.provenance([{'environment': environment}])}")
    if options.suite != "overhead":
        print(f"Memory by {memory_method(_device(options))}.")
    timed = options.suite != "memory"
    for line in texts.load_sentences(environment) + texts.thread_sentences(*threads):
        if timed:
            print(line)


def _device(options: argparse.Namespace) -> torch.device:
    """The device asked for, else a GPU where there is one.

    Raises:
        ValueError: A CUDA device that is not there.
    """
    asked: torch.device | None = getattr(options, "device", None)
    count = torch.cuda.device_count()
    kind = asked.type if asked else "cuda" if count and options.suite != "cost" else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    index = asked.index or 0 if asked else 0
    if index >= count:
        seen = f"{count} CUDA devices" if count else "no CUDA device"
        raise ValueError(f"--device {asked}: this PyTorch sees {seen}")
    return torch.device("cuda", index)


def _groups(options: argparse.Namespace, wrong: list[str]) -> Iterator[list[Row]]:
    """The suite's rows, those of one table at a time; what fails its proof goes into `wrong`."""
    on_cuda = _device(options).type == "cuda"
    size = SIZES[options.suite][2 * on_cuda + options.quick]
    if options.suite == "cost":
        yield _cost_rows(options, size)
        return
    if options.suite == "experts":
        yield from _experts_groups(options, size)
        return
    for text in options.dtype or ["bfloat16" if on_cuda else "float32"]:
        dtype = getattr(torch, text)
        names, baselines = _names(options)
        admitted = _admit(names, dtype, options)
        wrong += admitted.wrong
        ready = [name for name in names if name in admitted.errors]
        suites: dict[str, Callable[..., Iterator[list[Row]]]] = {
            "layer": _layer_groups,
            "memory": _memory_groups,
            "overhead": _overhead_groups,
            "model": _model_groups,
        }
        for rows in suites[options.suite](options, size, dtype, ready, baselines):
            for row in rows:
                row["proof"] = admitted.errors[row["provider"]]
            wrong += [row["provider"] for row in rows if row.get("wrong")]
            yield [*rows, *_not_admitted(admitted, rows, dtype, _base(options))]


def _experts_groups(options: argparse.Namespace, size: Size) -> Iterator[list[Row]]:
    device, seconds = _device(options), options.seconds or size.seconds
    shapes = experts.parsed(options.shapes or size.shapes, options.tokens or size.tokens)
    for text in options.dtype or ("float32", "bfloat16"):
        for r in options.rank:
            for shape in shapes:
                with Progress(f"experts {'x'.join(map(str, shape))}, r {r}", 1) as progress:
                    dtype = getattr(torch, text)
                    yield experts.measure(shape, r, dtype, device, seconds, progress.to)


def _names(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The providers to run, baselines among them, and the baselines, in the order given.

    Where graphs run, the baselines' own graphs are baselines too.
    """
    asked = named(options.provider or EVERYWHERE)
    if options.suite in ("memory", "model"):
        asked = [name for name in asked if PROVIDERS[name].for_models]
    if options.suite == "model":
        asked = [name for name in asked if name != "frozen"]  # nothing to train
    baselines = [name for one in options.baseline or BASELINES for name in named([one])]
    if any(PROVIDERS[name].run == GRAPH for name in asked):
        baselines += [f"{name}_graph" for name in baselines if f"{name}_graph" in PROVIDERS]
    baselines = [] if options.suite == "memory" else list(dict.fromkeys(baselines))
    return [name for name in PROVIDERS if name in {*asked, *baselines}], baselines


def _admit(names: Sequence[str], dtype: torch.dtype, options: argparse.Namespace) -> Admission:
    """Providers that may be timed, by proof; compiled ones on a CPU only if named."""
    device = _device(options)
    slow = [
        name
        for name in names
        if PROVIDERS[name].run == COMPILED and device.type == "cpu" and not options.provider
    ]
    names = [name for name in names if name not in slow]
    with Progress(f"proofs, {layer.type_name(dtype)}", len(names)) as progress:
        found = admit(
            names, dtype, device, lambda name: progress.to(names.index(name), name), _base(options)
        )
        progress.to(len(names))
    found.left_out.update(dict.fromkeys(slow, SLOW_TO_COMPILE))
    return found


def _base(options: argparse.Namespace) -> str:
    return getattr(options, "base", DENSE)


def _not_admitted(
    admitted: Admission, rows: Sequence[Row], dtype: torch.dtype, base: str
) -> list[Row]:
    """For each case of the rows, one row for every provider that was not admitted."""
    cases = {tuple(row["case"].items()): row for row in rows}.values()
    return [
        {
            "suite": like["suite"],
            **layer.labels(name, dtype, base),
            "case": like["case"],
            "left_out": reason,
        }
        for like in cases
        for name, reason in admitted.left_out.items()
    ]


def _layer_groups(
    options: argparse.Namespace,
    size: Size,
    dtype: torch.dtype,
    names: list[str],
    baselines: list[str],
) -> Iterator[list[Row]]:
    device, seconds = _device(options), options.seconds or size.seconds
    for r in options.rank:
        for shape in _shapes(options, size):
            # Of the defaults, on a GPU: each shape would be compiled anew.
            waits = not options.provider and shape.tokens != COMPILED_TOKENS
            late = [name for name in names if waits and PROVIDERS[name].run == COMPILED]
            now = [name for name in names if name not in late]
            case = {**shape._asdict(), "r": r}
            with Progress(f"layer {shape}, r {r}", 1) as progress:
                given = shape, r, dtype, device, seconds, now, baselines, progress.to
                rows = layer.measure(*given, base=options.base)
            yield [
                *rows,
                *(
                    {
                        **layer.described(name, case, dtype, options.base),
                        "left_out": COMPILED_ONCE,
                    }
                    for name in late
                ),
            ]


def _overhead_groups(
    options: argparse.Namespace,
    size: Size,
    dtype: torch.dtype,
    names: list[str],
    baselines: list[str],
) -> Iterator[list[Row]]:
    device, seconds = _device(options), options.seconds or size.seconds
    for r in options.rank:
        with Progress(f"overhead, r {r}", 1) as progress:
            yield overhead.measure(r, dtype, device, seconds, names, baselines, progress.to)


def _memory_groups(
    options: argparse.Namespace,
    size: Size,
    dtype: torch.dtype,
    names: list[str],
    baselines: list[str],
) -> Iterator[list[Row]]:
    depths = sorted(options.depths or size.depths)
    for r in options.rank:
        for shape in _shapes(options, size):
            with Progress(f"memory {shape}, r {r}", 1) as progress:
                given = shape, depths, r, dtype, _device(options), names, progress.to
                rows = memory.measure(*given, base=options.base)
            yield memory.with_resident(rows, shape) if options.resident else rows


def _model_groups(
    options: argparse.Namespace,
    size: Size,
    dtype: torch.dtype,
    names: list[str],
    baselines: list[str],
) -> Iterator[list[Row]]:
    device, seconds = _device(options), options.seconds or size.seconds
    for setting in _settings(options, size):
        what = f"{setting.model}, {setting.targets}"
        with Progress(f"{what}{', checkpointing' * setting.checkpointing}", 1) as progress:
            base = model.build(setting, dtype, device, options.base)
            given = setting, base, dtype, device, seconds, names, baselines, progress.to
            yield model.measure(*given, storage=options.base)


def _settings(options: argparse.Namespace, size: Size) -> Iterator[model.Setting]:
    longest = SEQUENCE if _device(options).type == "cuda" else SEQUENCE // 2
    for name in options.shapes or size.shapes:
        blocks = options.blocks or size.blocks or model.recipe_of(name).blocks
        few_and_all = ["+".join(options.target_modules)] if options.target_modules else FEW_AND_ALL
        for tokens in options.tokens or size.tokens:
            sequence = min(tokens, longest)
            for adapted in few_and_all:
                for checkpointing in size.checkpointing:
                    for r in options.rank:
                        yield model.Setting(
                            name, adapted, checkpointing, blocks, tokens // sequence, sequence, r
                        )


def _cost_rows(options: argparse.Namespace, size: Size) -> list[Row]:
    """Layers at every rank; whole models at the first, at every number of tokens.

    Models are those named among the shapes; without shapes all, or one of `--quick`.
    """
    tokens = options.tokens or size.tokens
    ranks = options.rank[:1] if options.quick else options.rank
    chosen = options.shapes or (["llama-3.1-8b"] if options.quick else list(MODELS))
    names = [name for name in MODELS if name in chosen]
    models = [row for n in tokens for row in cost.model_rows(names, n, ranks[0])]
    return [*cost.layer_rows(_shapes(options, size), ranks), *models]


def _shapes(options: argparse.Namespace, size: Size) -> list[Shape]:
    return parsed(options.shapes or size.shapes, options.tokens or size.tokens)


def _estimate(options: argparse.Namespace) -> int:
    sheet, recipe = data_sheets.find(options.device), model.recipe_of(options.model)
    longest = getattr(recipe.config().get_text_config(), "max_position_embeddings", LONGEST)
    sequence = min(options.tokens, LONGEST, longest // 64 * 64 or longest)
    request = estimate.Request(
        recipe, "+".join(options.target_modules), options.rank, options.base,
        options.tokens // sequence, sequence, options.checkpointing,
    )  # fmt: skip
    print(tables.estimate(estimate.estimates(request, sheet), request, sheet, options.model).text())
    return 0


# Files


def _write_csv(file: Path, rows: Sequence[Row], environment: Row) -> None:
    """One line a row; the path of each figure is its column."""
    kept = ("date", "device_name", "cpu", "threads", "driver", "cuda", "commit", "dirty")
    about = {f"environment.{key}": environment[key] for key in kept}
    about |= {f"environment.{key}": value for key, value in environment["versions"].items()}
    flat = [{**dict(_flat(row)), **about} for row in rows]
    columns = dict.fromkeys(key for row in flat for key in row)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(flat)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{path}.{key}" if path else key)


def _compare(options: argparse.Namespace) -> int:
    first, second = records.read(options.first), records.read(options.second)
    names = os.path.basename(options.first), os.path.basename(options.second)
    print(compare.report(first, second, names).text())
    return 0


def _plot(options: argparse.Namespace) -> int:
    from .report import plots

    for file in plots.draw(_joined(options.files), options.out):
        print(file)
    return 0


def _targets(options: argparse.Namespace) -> int:
    rows = _joined(options.files)
    suites = {"launching" if row["suite"] == "gpu" else row["suite"] for row in rows}
    on = {row["environment"]["device"] for row in rows}
    among = [one for one in targets.TARGETS if one.suite in suites and one.device in on]
    print(targets.table(rows, among or targets.ON_GPU).text())
    for line in dict.fromkeys(tables.provenance([row]) for row in rows):
        print(line)
    return 0


def _joined(files: Sequence[Path]) -> list[Row]:
    return [row for file in files for row in records.read(file)]


def _export(options: argparse.Namespace) -> int:
    for file in options.files:
        for written in exchange.write(records.read(file), options.out):
            print(written)
    return 0


def _check(options: argparse.Namespace) -> int:
    for file in options.files:
        print(f"{file.name}: {len(records.read(file))} valid rows")
    return 0


def _tables(options: argparse.Namespace) -> int:
    for file in documents.files():
        text = file.read_text()
        new = documents.renewed(text)
        if new != text:
            file.write_text(new)
            print(f"{file.name}: written anew")
    for picture in documents.stale_pictures():
        documents.draw(picture)
        print(f"{picture.name}: drawn anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
