"""Records of measurements and of their origin, a line of JSON for each row.

A line is complete in itself, so that files can be joined, cut and searched by line.
"""

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hut_kernels

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")
SUITES = ("layer", "memory", "overhead", "model", "experts", "cost")
# Runs that are one row each, with whatever it holds.
RUNS = ("gpu", "demo", "finetune")
BUSY = 0.05  # of the CPUs, taken by other programs
DIGITS = 5  # that a figure in a line has; a timing has fewer that mean anything
Row = dict[str, Any]

_ENVIRONMENT = (
    "date",
    "platform",
    "cpu",
    "threads",
    "device",
    "device_name",
    "driver",
    "cuda",
    "versions",
    "commit",
    "dirty",
    "other_programs_share",
)
# What a row of each suite holds beside its identity, if it was not left out.
_FIGURES = {
    "layer": ("types", "seconds", "operations", "floor_share", "versus", "bytes"),
    "memory": ("types", "bytes"),
    "overhead": ("types", "seconds", "versus"),
    "model": ("types", "seconds", "tokens_per_second", "versus", "bytes", "counts"),
    "experts": ("types", "seconds", "versus", "bytes"),
    "cost": ("counts",),
}
# What makes one machine another. Threads count: a figure of one thread says nothing on two.
_MACHINE = ("device", "device_name", "cpu", "cpu_count", "threads", "driver", "cuda")


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, the commit and the date; everything that a figure depends on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "device": device.type,
        "device_name": device_name(device),
        "driver": driver_version(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": {"hut_kernels": hut_kernels.__version__, **{n: _version(n) for n in PACKAGES}},
        **_commit(),
        "command": [_without_folders(word) for word in sys.argv],
    }


def _without_folders(word: str) -> str:
    """A word of a command; an absolute path is its last part, for nobody else has the rest."""
    return Path(word).name if Path(word).is_absolute() else word


def write(file: Path, rows: Iterable[Row], environment: Row, digits: int | None = DIGITS) -> None:
    """Writes one line of JSON for each row, with the environment, and replaces what was there.

    NaN and infinities become null, so that any JSON reader takes it.

    Raises:
        ValueError: A row that is not valid; nothing is written.
    """
    lines = []
    for row in rows:
        line = {"schema_version": SCHEMA_VERSION, **row, "environment": environment}
        validate(line := _finite(line, digits))
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


def read(file: Path) -> list[Row]:
    """The rows of a record, a file of `write`.

    Raises:
        ValueError: A line that is not JSON, or not a valid row; the message names it.
    """
    rows: list[Row] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            validate(row)
        except ValueError as error:
            raise ValueError(f"{file.name}, line {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{file.name} holds no record")
    return rows


def validate(row: Any) -> None:
    """Checks one row: what it must hold, and that its figures can be figures.

    Raises:
        ValueError: What is missing or cannot be.
    """
    if not isinstance(row, dict):
        raise ValueError("a record is a JSON object")
    if row.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version must be {SCHEMA_VERSION}; got {row.get('schema_version')!r}"
        )
    if row.get("suite") not in (*SUITES, *RUNS):
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {row.get('suite')!r}")
    if row["suite"] in RUNS:
        return _check_keys("a record", row, ("environment",))
    _check_keys("a record", row, ("provider", "label", "case", "environment"))
    _check_keys("environment", row["environment"], _ENVIRONMENT)
    if "left_out" in row:
        if not isinstance(row["left_out"], str) or not row["left_out"]:
            raise ValueError("left_out must say why")
        return
    _check_keys(f"a record of suite {row['suite']}", row, _FIGURES[row["suite"]])
    for name, value in _quantiles(row):
        figures = [value[key] for key in ("p20", "median", "p80")]
        if None in figures or not 0 < figures[0] <= figures[1] <= figures[2]:
            raise ValueError(f"{name}: p20, median and p80 must be positive and in order")
        if value.get("samples", 0) < 1:
            raise ValueError(f"{name}: a quantile is of one sample at least")
    for name, size in row.get("bytes", {}).items():
        if size is not None and (not isinstance(size, int) or size < 0):
            raise ValueError(f"bytes.{name} must be a count, not {size!r}")


def busy(environment: Mapping[str, Any]) -> bool:
    """True if other programs took so much of the CPUs that times do not count."""
    share, load = environment.get("other_programs_share"), environment.get("load_average")
    if share is None:  # an older record, or no /proc: by the load at the start
        return load is not None and load > 0.3 * (environment.get("cpu_count") or 1)
    return share > BUSY


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that identify a machine: records that agree on them share one."""
    return {key: environment.get(key) for key in _MACHINE}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which words two dictionaries differ, `key: this, that`."""
    keys = dict.fromkeys([*one, *other])
    return [
        f"{key}: {one.get(key)}, {other.get(key)}" for key in keys if one.get(key) != other.get(key)
    ]


def _check_keys(what: str, value: Any, keys: Iterable[str]) -> None:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _quantiles(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every set of quantiles in a row, with its path."""
    if not isinstance(value, dict):
        return
    if "median" in value:
        yield name, value
        return
    for key, item in value.items():
        yield from _quantiles(item, f"{name}.{key}" if name else key)


def cpu_name() -> str:
    """The processor's name, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def driver_version(device: torch.device) -> str | None:
    """The NVIDIA driver's version; None without a CUDA device, or where it does not tell."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.strip() else None


def load_average() -> float | None:
    """Processes that ran or waited over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Commit and dirty flag, if this file lies in a git checkout of its own."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return {"commit": None, "dirty": None}
    status = _git("status", "--porcelain")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _finite(value: Any, digits: int | None = None) -> Any:
    """The value with null for NaN and infinities, and floats at so many digits, if any."""
    if isinstance(value, dict):
        return {str(key): _finite(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")
