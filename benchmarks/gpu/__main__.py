"""`python -m benchmarks.gpu`: check every kernel on the GPU, measure it, say what should change.

Without a CUDA device it checks the kernels in Triton's interpreter and prints the plans of known
devices. Needs torch, triton and numpy; runs from the root of the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hut_kernels import backends, devices, explain
from tests.gpu import lists, workers
from tests.gpu.cases import PARTS, Check
from tests.gpu.sanitizer import Sanitizers

from .. import records
from ..report import targets
from ..report.text import table
from . import extension, findings, suites
from .suites import Bench, Subject
from .timing import GraphTimer, HostTimer

Row = dict[str, Any]
FULL, QUICK = 480.0, 120.0
# The share of the time that is gone when each phase ends at the latest. Time left over goes on.
ENDS = {
    "correctness": 0.36,
    "large": 0.44,
    "sanitizer": 0.45,
    "ceilings": 0.47,
    "tokens": 0.66,
    "steps": 0.70,
    "weight": 0.72,
    "launching": 0.73,
    "tile checks": 0.86,
    "tiles": 0.98,
}
QUICK_ENDS = {
    "correctness": 0.42,
    "large": 0.58,
    "sanitizer": 0.58,
    "ceilings": 0.62,
    "tokens": 0.88,
    "steps": 0.94,
    "weight": 0.97,
    "launching": 0.98,
}
# The first is the one of the targets; later ones are measured while there is time.
LAYERS = (
    Subject(4096, 4096),
    Subject(4096, 4096, transform="two_sided"),
    Subject(1024, 1024),
    Subject(4096, 4096, 64),
    Subject(14336, 4096),
    Subject(4096, 14336),
)
QUICK_LAYERS = LAYERS[:2]
STEP_TOKENS, QUICK_STEP_TOKENS = (4096, 64, 1, 512, 8192), (4096, 64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status: 1 for a failed check, 2 for a phase that broke off."""
    options = _parser().parse_args(arguments)
    missing = _no_gpu()
    if missing:
        return without_device(missing, options.quick)
    return on_device(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 minutes instead of 8")
    parser.add_argument("--out", type=Path, default=records.ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, help="time to fit into (480; 120 with --quick)")
    parser.add_argument("--jobs", type=int, help="worker processes of the checks")
    parser.add_argument(
        "--keep-going", action="store_true", help="measure even if a check failed (still exits 1)"
    )
    return parser


def _no_gpu() -> str | None:
    """The reason why nothing can run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    triton = backends()["triton"]
    return None if triton["available"] else str(triton["reason"])


# Without a device


def without_device(missing: str, quick: bool) -> int:
    """All but the device's part: the checks in the interpreter, and the plans as they stand."""
    print(f"No GPU to run on: {missing}. Nothing is measured, and no record is written.")
    print(
        "What follows needs no GPU: the checks at tiny sizes in Triton's interpreter, and plans.\n"
    )
    failed = interpreted(quick) if importlib.util.find_spec("triton") else _no_triton()
    print(f"\n{plans_text()}")
    return int(failed)


def _no_triton() -> bool:
    print("Triton is not installed: the kernels are not checked either.")
    return False


def interpreted(quick: bool) -> bool:
    """Checks tiny cases in Triton's interpreter; True if one failed."""
    cases = lists.tiny_cases(quick)
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    results = list(workers.check_all(cases, "cpu", 1, time.monotonic() + 240, env))
    found = summed_up(results)
    print(findings.correctness_text(found))
    print("  (float16 and float32: the interpreter's bfloat16 is not the device's)")
    return bool(found["failures"]) or found["counts"].get("passed", 0) < len(cases)


def plans_text() -> str:
    """The planner's break-evens on known devices, and their sources."""
    lines = []
    for device in devices.DEVICES:
        even = devices.break_even(device)
        tokens = (str(even.forward), str(even.grad_input), str(even.grad_factors))
        lines.append([device.name, device.arch, *tokens, even.source])
    title = "Fused up to so many tokens (beyond: staged, chunked)"
    header = ["device", "arch", "forward", "dx", "factor gradients", "source"]
    example = explain(16, 4096, 4096, 16, dtype=torch.bfloat16, device_name="H200")
    return f"{table(title, header, lines)}\n\nFor example:\n{example}"


# On a device


class Run:
    """The record as it grows, the clock, and phases that may fail without taking the rest along."""

    def __init__(self, out: Path, seconds: float, content: Row) -> None:
        self.begin, self.seconds, self.out = time.monotonic(), seconds, out
        self.ends = QUICK_ENDS if content.get("quick") else ENDS
        self.record: Row = {"complete": False, **content, "phases": [], "rows": []}
        self.saved = 0.0
        self.broken = False

    def until(self, phase: str) -> float:
        """The end of a phase, by `time.monotonic()`."""
        return self.begin + self.seconds * self.ends[phase]

    def left(self, phase: str) -> float:
        return self.until(phase) - time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Row]:
        """A phase of the run; what goes wrong in it is noted, printed and survived."""
        entry: Row = {"name": name, "note": ""}
        self.record["phases"].append(entry)
        begin = time.monotonic()
        print(f"[{begin - self.begin:5.0f} s] {name}", file=sys.stderr, flush=True)
        try:
            yield entry
        except Exception as failure:
            traceback.print_exc()
            self.broken = True
            entry["note"] = f"broke off: {type(failure).__name__}: {failure}"[:500]
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 2)
            self.save()

    def add(self, row: Row) -> None:
        """One measured row, and now and then a copy on disk."""
        self.record["rows"].append(row)
        if time.monotonic() - self.saved > 20:
            self.save()

    def save(self) -> None:
        self.saved = time.monotonic()
        row, environment = {"suite": "gpu", **self.record}, self.record.get("environment", {})
        records.write(self.out, [row], environment, None)


def on_device(options: argparse.Namespace) -> int:
    """Checks, measures, writes the record, prints the summary."""
    device = _device()
    limits = devices.gpu(device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the record is written then too
    seconds = options.seconds or (QUICK if options.quick else FULL)
    record = {
        "quick": options.quick,
        "seconds": seconds,
        "environment": environment(device),
        "limits": vars(limits),
    }
    run = Run(record_file(options.out, limits.name, options.quick), seconds, record)
    print(f"{limits.name} ({limits.arch}); record: {run.out}", file=sys.stderr, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        check_device(run, device, options)
        if options.keep_going or not _blocking(run.record["correctness"]["failures"]):
            measure_device(run, bench_of(device, limits, options.quick), options)
            with run.phase("conclusions"):
                conclude(run.record, limits, run.out.name)
            run.record["complete"] = True
    with run.phase("summary"):
        print(findings.summary(run.record, limits))
    print(f"\nRecord: {run.out}")
    if run.record.get("correctness", {}).get("failures", ["never ran"]):
        print("A check FAILED: no figure of this run counts.")
        return 1
    return 2 if run.broken or not run.record["complete"] else 0


def _blocking(failures: Sequence[Row]) -> bool:
    """True if times would mean nothing: not for a hazard that no result shows.

    The race checker does not know every way in which asynchronous copies are waited for.
    """
    return any("racecheck" not in one["case"] for one in failures)


def _device() -> torch.device:
    return torch.device("cuda", 0)


def environment(device: torch.device) -> Row:
    """`records.environment`, and what a driver knows of its device."""
    found = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    return {
        **records.environment(device),
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "driver": dict(zip(fields, _driver(fields, device.index or 0), strict=False)),
    }


def _driver(fields: Sequence[str], index: int) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return [word.strip() for word in done.stdout.splitlines()[index].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return []


def record_file(out: Path, name: str, quick: bool) -> Path:
    """`gpu-<device>-<date>.json`, with a number where there is one already."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = f"gpu-{slug}-{today}{'-quick' if quick else ''}"
    files = (out / f"{stem}{number}.json" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(file for file in files if not file.exists())


def bench_of(device: torch.device, limits: devices.Device, quick: bool) -> Bench:
    """Timers and limits of a CUDA device."""
    gc.collect()
    gc.freeze()  # every capture of a graph collects garbage first
    return Bench(
        device,
        limits,
        GraphTimer(device),
        HostTimer(device),
        seconds=0.04 if quick else 0.06,
        cache=limits.l2,
        free=torch.cuda.mem_get_info(device)[0],
    )


def check_device(run: Run, device: torch.device, options: argparse.Namespace) -> None:
    """Everything that must be right before a time means anything."""
    quick = options.quick
    sanitizers = None if quick else Sanitizers(run.until("sanitizer"))
    jobs = _jobs(options, torch.cuda.mem_get_info(device)[0])
    cases = lists.device_cases(quick)
    run.record["extension"] = extension.missing() or "available"
    if extension.missing() is None:
        cases = lists.extension_cases(quick) + cases
    results = _checks(run, "correctness", cases, jobs)
    # What found no room beside the others goes with what needs most of the device.
    crowded = [case for case, result in results if result["status"] == "skipped"]
    results = [entry for entry in results if entry[1]["status"] != "skipped"]
    results += _checks(run, "large", [*crowded, *lists.large_cases(quick)], 1)
    found = summed_up(results)
    with run.phase("sanitizer") as entry:
        if sanitizers is None:
            entry["note"] = "left out by --quick"
        else:
            found["sanitizer"] = sanitizers.results()
    found["failures"] += [
        {"case": f"compute-sanitizer {tool}", "problems": [one.get("detail", "")]}
        for tool, one in found.get("sanitizer", {}).items()
        if one["status"] == "findings"
    ]
    if not found["counts"].get("passed"):
        found["failures"].append({"case": "all", "problems": ["not one case ran and passed"]})
    run.record["correctness"] = found
    run.save()


def _checks(run: Run, phase: str, cases: Sequence[Check], jobs: int) -> list[tuple[Check, Row]]:
    results: list[tuple[Check, Row]] = []
    with run.phase(phase) as entry:
        found = workers.check_all(cases, "cuda", jobs, run.until(phase), on_result=print_failure)
        results += found
        late = sum(result["status"] == "left out" for _, result in results)
        if late:
            entry["note"] = f"{late} of {len(results)} cases did not fit into the time"
    return results


def _jobs(options: argparse.Namespace, free: int) -> int:
    """Worker processes: a case of a real size takes up to 7 GB, most of it the reference's."""
    return options.jobs or max(1, min(10, (_cpus() or 2) - 2, int(free / 7e9)))


def _cpus() -> int | None:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def print_failure(case: Check, result: Row) -> None:
    if result["status"] == "failed":
        print(f"FAILED {case}: {'; '.join(result['problems'])}", file=sys.stderr, flush=True)


def summed_up(results: Sequence[tuple[Check, Row]]) -> Row:
    """Counts, what failed, the worst errors, and every table row that was seen to be right."""
    counts: dict[str, int] = {}
    worst: dict[str, float] = {}
    checked: dict[str, list[Row]] = {}
    named: dict[str, list[Row]] = {"failed": [], "skipped": []}
    for case, result in results:
        status = result["status"]
        counts[status] = counts.get(status, 0) + 1
        if status in named:
            named[status].append({"case": str(case), "problems": result["problems"]})
        if status != "passed":
            continue
        for name, error in result["errors"].items():
            worst[name] = max(worst.get(name, 0.0), error / result["limits"][name])
        for kernel, row in result["rows"].items():
            if row not in checked.setdefault(kernel, []):
                checked[kernel].append(row)
    return {
        "counts": counts,
        "failures": named["failed"],
        "skipped": named["skipped"],
        "elsewhere": [
            {"case": str(case), "missing": result["missing"]}
            for case, result in results
            if result.get("missing")
        ],
        "worst": worst,
        "rows_checked": checked,
        "cases": [
            {"case": str(case), **{k: v for k, v in result.items() if k not in ("rows", "limits")}}
            for case, result in results
        ],
    }


def measure_device(run: Run, bench: Bench, options: argparse.Namespace) -> None:
    """Ceilings, parts over tokens, steps, the weight kernel, tiles: what fits into the time."""
    quick = options.quick
    with run.phase("ceilings"):
        run.record["ceilings"] = suites.ceilings(bench, size=4096 if quick else 8192)
    ceiling = run.record.get("ceilings")
    if ceiling is None:  # without them there is no floor to compare with
        return
    layers = QUICK_LAYERS if quick else LAYERS
    tokens = suites.QUICK_TOKENS if quick else suites.TOKENS
    with run.phase("tokens") as entry:
        for layer in layers:
            _measure(run, "tokens", entry, layer, _by_part(bench, layer, tokens, ceiling))
    some = QUICK_STEP_TOKENS if quick else STEP_TOKENS
    with run.phase("steps") as entry:
        for layer in layers[:3]:
            _measure(run, "steps", entry, layer, suites.steps(bench, layer, some, ceiling))
    with run.phase("weight") as entry:
        for layer in layers:
            _measure(run, "weight", entry, layer, suites.weights(bench, [layer]))
    with run.phase("launching") as entry:
        entry["note"] = extension.missing() or ""
        for row in () if entry["note"] else extension.launching(bench):
            run.add(row)
    with run.phase("tiles") as entry:
        if quick:
            entry["note"] = "left out by --quick"
        else:
            measure_tiles(run, bench, layers[0], entry, options)


def measure_tiles(
    run: Run, bench: Bench, layer: Subject, entry: Row, options: argparse.Namespace
) -> None:
    """Alternatives to the table's rows: each checked by a worker, then timed here."""
    checked: list[tuple[Check, Row]] = []
    with run.phase("tile checks") as checks:
        cases = suites.tile_cases(bench, layer, suites.TILE_TOKENS)
        jobs = _jobs(options, bench.free)
        until = run.until("tile checks")
        checked += workers.check_all(cases, "cuda", jobs, until, case_seconds=60.0)
        late = sum(result["status"] == "left out" for _, result in checked)
        if late:
            checks["note"] = f"{late} of {len(cases)} alternatives did not fit into the time"
    timed = suites.tiles(bench, layer, checked, lambda: run.left("tiles"))
    _measure(run, "tiles", entry, layer, timed)


def _by_part(bench: Bench, layer: Subject, tokens: Sequence[int], ceiling: Row) -> Iterator[Row]:
    """Both ends and the middle first: what may be left out are points between."""
    first = [n for n in tokens if n in (1, 16, 256, 512, 1024, 4096)]
    for some in (first, [n for n in tokens if n not in first]):
        yield from suites.over_tokens(bench, layer, some, PARTS, ceiling)


def _measure(run: Run, phase: str, entry: Row, layer: Subject, rows: Iterator[Row]) -> None:
    """Rows until the phase's time is over; says how many came."""
    count = 0
    while run.left(phase) > 0:
        row = next(rows, None)
        if row is None:
            return
        run.add(row)
        count += 1
    entry["note"] += f"out of time after {count} rows of {layer}; "


def conclude(record: Row, limits: devices.Device, name: str) -> None:
    """Adds the conclusions from the rows to the record."""
    rows = record["rows"]
    record["break_evens"] = findings.crossings(rows)
    record["proposal"] = findings.proposal(record["break_evens"], limits, name)
    judged = list(findings.as_rows(rows, record["environment"], limits))
    record["verdicts"] = targets.table(judged, targets.KERNELS).rows
    record["tile_changes"] = findings.tile_changes(rows)


if __name__ == "__main__":
    sys.exit(main())
