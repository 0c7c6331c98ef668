"""What HUT costs beside LoRA, HiRA and plain PyTorch, on this machine.

`python -m benchmarks SUITE`, or `hut-bench SUITE` where the package is installed. Suites: `layer`,
`memory`, `overhead`, `model`, and `cost`, which counts and measures nothing. On their records:
`compare`, `plot`, `check`, and `tables`, which writes the tables of README.md and docs/ anew.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import compare, cost, documents, layer, memory, model, overhead, records, report, tables
from .measure import OtherPrograms, memory_method, settle_threads
from .progress import Progress
from .providers import COMPILED, PROVIDERS, Admission, admit, named
from .shapes import MODELS, Shape, parsed

Row = dict[str, Any]

EVERYWHERE = (
    "frozen",
    "lora",
    "lora_graph",
    "peft_*",
    "hut_low_rank",
    "hut_low_rank_fused",
    "hut_low_rank_staged",
    "hut_low_rank_graph",
    "hut_low_rank_compiled",
    "hut_low_rank_eager",
    "hut_low_rank_eager_compiled",
    "hut_low_rank_eager_graph",
    "hut_paper",
)
BASELINES = ("peft_lora", "lora")
SLOW_TO_COMPILE = "compiling takes long on a CPU; name it with --provider"
BUSY = 0.05  # of the CPUs, taken by other programs
SEQUENCE = 128  # tokens of a text in the model suite; half of it on a CPU


@dataclass(frozen=True)
class Size:
    """What a suite does where the command line does not say otherwise."""

    shapes: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: float = 0  # for each group of rows
    depths: tuple[int, ...] = ()
    blocks: int | None = None
    checkpointing: tuple[bool, ...] = (False, True)


TRAINED = tuple(model.RECIPES)
SIZES = {
    # suite: on a CPU, there with --quick, on a GPU, there with --quick
    "layer": (
        Size(("1024x1024", "1024x4096"), (16, 128, 512), 5),
        Size(("1024x1024",), (16, 256), 1.5),
        Size(("4096x4096", "1024x1024"), (16, 512, 4096, 16384), 2),
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
        Size(TRAINED, (64,), 1, blocks=2),
        Size(TRAINED[:1], (64,), 0.5, blocks=2, checkpointing=(False,)),
        Size(TRAINED, (4096,), 3),
        Size(TRAINED[:1], (2048,), 1, blocks=6),
    ),
    "cost": (Size(("1024x1024", "4096x4096"), (4096,)),) * 4,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 1 where a provider did not compute its formula, or a file is not valid."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"error: {error}: pip install 'hut_kernels[bench]'", file=sys.stderr)
    return 1


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hut-bench" if Path(sys.argv[0]).stem == "hut-bench" else "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for suite in records.SUITES:
        _add_suite(commands, suite)
    one = commands.add_parser("compare", help="two records, row by row")
    one.add_argument("first", type=Path)
    one.add_argument("second", type=Path)
    one.set_defaults(command=_compare)
    one = commands.add_parser("plot", help="pictures of records, as PNG and SVG")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.add_argument("--out", type=Path, default=Path("plots"), help="folder (plots)")
    one.set_defaults(command=_plot)
    one = commands.add_parser("check", help="whether records are valid")
    one.add_argument("files", nargs="+", type=Path, metavar="FILE")
    one.set_defaults(command=_check)
    one = commands.add_parser("tables", help="write the tables of README.md and docs/ anew")
    one.set_defaults(command=_tables)
    return parser


def _add_suite(commands: Any, suite: str) -> None:
    module = {"layer": layer, "memory": memory, "overhead": overhead, "model": model, "cost": cost}
    description = str(module[suite].__doc__)
    one = commands.add_parser(
        suite,
        help=description.split(":", 1)[-1].split("\n")[0].strip(" ."),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = one.add_argument
    add("--quick", action="store_true", help="less of everything")
    add("--json", type=Path, metavar="FILE", help="write the rows as lines of JSON")
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add("--rank", type=_positive, nargs="+", default=[16], help="ranks of the factors (16)")
    if suite in ("layer", "memory", "cost"):
        add("--shapes", nargs="+", help=f"INxOUT, TOKENSxINxOUT, or of {', '.join(MODELS)}")
    if suite == "model":
        add("--shapes", nargs="+", choices=model.RECIPES, help="models to train")
        add("--blocks", type=_positive, help="how many of the models' blocks to build")
    if suite != "overhead":
        add("--tokens", type=_positive, nargs="+", help="numbers of tokens")
    if suite == "memory":
        add("--depths", type=_positive, nargs="+", help="layers of the stacks")
    if suite != "cost":
        add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"])
        add("--device", type=torch.device, help="cpu, cuda … (a GPU where there is one)")
        add("--provider", nargs="+", help="names or shell patterns of what to run")
        add("--baseline", nargs="+", help=f"what to compare with ({' '.join(BASELINES)})")
    if suite in ("layer", "overhead", "model"):
        add("--seconds", type=float, help="time for each group of rows")
    one.set_defaults(command=_run, suite=suite)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


# Suites


def _run(options: argparse.Namespace) -> int:
    """Runs one suite: proofs, rows, tables, files."""
    rows: list[Row] = []
    wrong: list[str] = []
    threads = settle_threads() if options.suite != "cost" else (1, 1)
    environment, others = records.environment(_device(options)), OtherPrograms()
    try:
        for found in _groups(options, wrong):
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
    for name in wrong:
        print(f"{name} does NOT compute its formula: it was not timed.")
    return 1 if wrong else 0


def _write(rows: list[Row], environment: Row, options: argparse.Namespace) -> None:
    if options.json:
        records.write_lines(options.json, rows, environment)
    if options.csv:
        _write_csv(options.csv, rows, environment)


def _say_how(environment: Row, threads: tuple[int, int], options: argparse.Namespace) -> None:
    print(f"\n{tables.provenance([{'environment': environment}])}")
    if options.suite in ("layer", "memory", "model"):
        print(f"Memory by {memory_method(_device(options))}.")
    busy = environment["other_programs_share"]
    timed = options.suite != "memory"
    if timed and busy is not None and busy > BUSY:
        print(
            f"Other programs took {100 * busy:.0f} % of the CPUs meanwhile: times count only on an "
            "idle machine."
        )
    for line in report.thread_sentences(*threads) if timed else ():
        print(line)


def _device(options: argparse.Namespace) -> torch.device:
    """The device asked for, else a GPU where there is one.

    Raises:
        ValueError: A CUDA device that is not there.
    """
    asked: torch.device | None = getattr(options, "device", None)
    on_cuda = torch.cuda.is_available()
    if asked is not None and asked.type == "cuda" and not on_cuda:
        raise ValueError(f"--device {asked}: this PyTorch sees no CUDA device")
    return asked or torch.device("cuda" if on_cuda and options.suite != "cost" else "cpu")


def _groups(options: argparse.Namespace, wrong: list[str]) -> Iterator[list[Row]]:
    """The suite's rows, those of one table at a time; what fails its proof goes into `wrong`."""
    on_cuda = _device(options).type == "cuda"
    size = SIZES[options.suite][2 * on_cuda + options.quick]
    if options.suite == "cost":
        yield _cost_rows(options, size)
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
            yield [*rows, *_not_admitted(admitted, rows, dtype)]


def _names(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The providers to run, baselines among them, and the baselines."""
    asked = named(options.provider or EVERYWHERE)
    if options.suite in ("memory", "model"):
        asked = [name for name in asked if PROVIDERS[name].for_models]
    if options.suite == "model":
        asked = [name for name in asked if name != "frozen"]  # nothing to train
    baselines = named(options.baseline or BASELINES)
    return [name for name in PROVIDERS if name in {*asked, *baselines}], baselines


def _admit(names: Sequence[str], dtype: torch.dtype, options: argparse.Namespace) -> Admission:
    """Who may be timed, by proof; compiled providers on a CPU only where they are named."""
    device = _device(options)
    slow = [
        name
        for name in names
        if PROVIDERS[name].run == COMPILED and device.type == "cpu" and not options.provider
    ]
    names = [name for name in names if name not in slow]
    with Progress(f"proofs, {layer.type_name(dtype)}", len(names)) as progress:
        found = admit(names, dtype, device, lambda name: progress.to(names.index(name), name))
        progress.to(len(names))
    found.left_out.update(dict.fromkeys(slow, SLOW_TO_COMPILE))
    return found


def _not_admitted(admitted: Admission, rows: Sequence[Row], dtype: torch.dtype) -> list[Row]:
    """For each case of the rows, one row for every provider that was not admitted."""
    cases = {tuple(row["case"].items()): row for row in rows}.values()
    return [
        {
            "suite": like["suite"],
            **layer.labels(name, dtype),
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
            with Progress(f"layer {shape}, r {r}", 1) as progress:
                yield layer.measure(shape, r, dtype, device, seconds, names, baselines, progress.to)


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
                yield memory.measure(shape, depths, r, dtype, _device(options), names, progress.to)


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
            base = model.build(setting, dtype, device)
            show = partial(progress.to)
            yield model.measure(setting, base, dtype, device, seconds, names, baselines, show)


def _settings(options: argparse.Namespace, size: Size) -> Iterator[model.Setting]:
    longest = SEQUENCE if _device(options).type == "cuda" else SEQUENCE // 2
    for name in options.shapes or size.shapes:
        blocks = options.blocks or size.blocks or MODELS[name].blocks
        for tokens in options.tokens or size.tokens:
            sequence = min(tokens, longest)
            for targets in cost.FEW_AND_ALL:
                for checkpointing in size.checkpointing:
                    for r in options.rank:
                        yield model.Setting(
                            name, targets, checkpointing, blocks, tokens // sequence, sequence, r
                        )


def _cost_rows(options: argparse.Namespace, size: Size) -> list[Row]:
    ranks = options.rank if options.rank != [16] else cost.RANKS
    tokens = options.tokens or list(size.tokens)
    shapes = parsed(options.shapes or size.shapes, tokens)
    return [*cost.layer_rows(shapes, ranks), *cost.model_rows(list(MODELS), tokens[0], ranks[0])]


def _shapes(options: argparse.Namespace, size: Size) -> list[Shape]:
    return parsed(options.shapes or size.shapes, options.tokens or size.tokens)


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
    first, second = records.read_lines(options.first), records.read_lines(options.second)
    names = os.path.basename(options.first), os.path.basename(options.second)
    print(compare.report(first, second, names).text())
    return 0


def _plot(options: argparse.Namespace) -> int:
    from . import plots

    rows = [row for file in options.files for row in records.read_lines(file)]
    for line in tables.mixed_machines(rows):
        print(line)
    for file in plots.draw(rows, options.out):
        print(file)
    return 0


def _check(options: argparse.Namespace) -> int:
    for file in options.files:
        print(f"{file.name}: {len(records.read_lines(file))} valid rows")
    return 0


def _tables(options: argparse.Namespace) -> int:
    for file in documents.files():
        text = file.read_text()
        new = documents.renewed(text)
        if new != text:
            file.write_text(new)
            print(f"{file.name}: written anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
