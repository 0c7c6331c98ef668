"""Records: what was measured, on what, in one JSON file."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hut_kernels

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft")


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
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": {"hut_kernels": hut_kernels.__version__, **{n: _version(n) for n in PACKAGES}},
        **_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def write(file: Path, suite: str, content: dict[str, Any]) -> None:
    """Writes one record; NaN and infinities become null, so that any JSON reader takes it."""
    record = {"schema_version": SCHEMA_VERSION, "suite": suite, **content}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def cpu_name() -> str:
    """The processor's name, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:  # NaN, inf
        return None
    return value
