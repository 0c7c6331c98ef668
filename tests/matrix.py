"""The suite beside other versions of Triton, PyTorch and Python, as far as they can be had.

`python -m tests.matrix [--only TEXT ...] [--list] [--quick | --ptx] [--folder DIR]` installs each
Triton into a folder of its own, puts that before this environment's, and runs the suite's two
halves. Other versions of PyTorch and Python are looked for and, where they are not to be had at a
reasonable size, listed with the reason. The exit status is 1 if a cell that could run has failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
REASONABLE = 500  # MB of one wheel

# The interpreter of Triton 3.6.0 uses what numpy 2.4 has removed.
NUMPY = {"3.6.0": "numpy<2.4"}

# What depends on Triton; the rest of the suite is the same whichever is installed.
QUICK = {
    "": [
        "tests/reliability/test_limits.py",
        "tests/reliability/test_miscompiles.py",
        "tests/reliability/test_flops.py",
        "tests/test_gate.py",
        "tests/test_dispatch.py",
    ],
    "1": ["tests/triton"],
}
# Its compiled kernels alone, run in the executor.
PTX = {"": ["tests/ptx", "-m", "ptx"]}
WHOLE = {"": ["tests"], "1": ["tests/triton"]}


@dataclass
class Cell:
    """A combination of versions, and what became of it."""

    name: str
    verdict: str = ""
    detail: str = ""
    seconds: float = 0.0


def run(
    command: list[str], environment: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


# Triton


def install(requirements: list[str], folder: Path) -> str | None:
    """Installs into a folder; why not, where it does not work."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    done = run([*command, "--target", str(folder), *requirements])
    return None if done.returncode == 0 else last_line(done.stderr)


def try_triton(version: str, folder: Path, suite: dict[str, list[str]]) -> Cell:
    cell = Cell(f"Triton {version}, torch {importlib.metadata.version('torch')}")
    environment = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    if version != importlib.metadata.version("triton"):
        target = folder / version
        wanted = [f"triton=={version}", *([NUMPY[version]] if version in NUMPY else [])]
        problem = install(wanted, target)
        if problem:
            return fail(cell, "not had", problem)
        environment["PYTHONPATH"] = str(target)
    seen = run([sys.executable, "-c", "import triton; print(triton.__version__)"], environment)
    if seen.stdout.strip() != version:
        return fail(cell, "FAILED", f"triton {seen.stdout.strip()} was imported instead")
    return run_suite(cell, environment, suite)


def run_suite(cell: Cell, environment: dict[str, str], suite: dict[str, list[str]]) -> Cell:
    """Both halves of the suite, the second in Triton's interpreter."""
    begun = time.monotonic()
    results = []
    for interpret, files in suite.items():
        command = [sys.executable, "-m", "pytest", *files, "-q", "-n", "2"]
        command += ["-p", "no:cacheprovider", "--tb=line"]
        done = run(command, environment | {"TRITON_INTERPRET": interpret})
        results.append((done.returncode, last_line(done.stdout) or last_line(done.stderr)))
        for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)[:20]:
            print("   ", line, flush=True)
    cell.seconds = time.monotonic() - begun
    cell.verdict = "FAILED" if any(status for status, _ in results) else "passed"
    cell.detail = "; ".join(re.sub(r"=+", "", line).strip() for _, line in results)
    return cell


def fail(cell: Cell, verdict: str, detail: str) -> Cell:
    cell.verdict, cell.detail = verdict, detail
    return cell


# PyTorch and Python


def try_torch(version: str) -> Cell:
    """Another PyTorch in an environment of its own, if there is a wheel without CUDA's share."""
    cell = Cell(f"torch {version}")
    installed = importlib.metadata.version("torch").partition("+")[0]
    if version == installed:
        return fail(cell, "installed", "the one of the Triton cells")
    asked = run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed",
         "--no-deps", "--only-binary", ":all:", f"torch=={version}+cpu"]
    )  # fmt: skip
    if asked.returncode:
        return fail(
            cell, "not had",
            "no build for CPUs at the configured index; the plain wheel is CUDA's, which needs "
            f"NVIDIA's libraries to be imported: gigabytes, and {REASONABLE} MB is the limit here",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        python = Path(name, "venv", "bin", "python")
        constraints = Path(name, "constraints.txt")
        pinned = (ROOT / "constraints.txt").read_text()
        constraints.write_text(re.sub(r"torch==\S+", f"torch=={version}+cpu", pinned))
        done = run(["make", "test", f"VENV={python.parents[1]}", f"CONSTRAINTS={constraints}"])
        cell.verdict = "FAILED" if done.returncode else "passed"
        cell.detail = last_line(done.stdout)
    return cell


def find_python(version: str) -> str | None:
    """An interpreter of that version that starts."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for candidate in candidates:
        if candidate and run([str(candidate), "-c", "pass"]).returncode == 0:
            return str(candidate)
    return None


def try_python(version: str) -> Cell:
    """The package compiled and imported by another Python; its suite needs a PyTorch for that."""
    cell = Cell(f"Python {version}")
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return fail(cell, "installed", "the one of the Triton cells")
    python = find_python(version)
    if python is None:
        return fail(cell, "not had", "not on this machine, neither on its path nor under pyenv")
    if run([python, "-c", "import torch"]).returncode == 0:
        done = run([python, "-m", "pytest", "tests", "-q"], {"OMP_NUM_THREADS": "1"})
        return fail(cell, "FAILED" if done.returncode else "passed", last_line(done.stdout))
    with tempfile.TemporaryDirectory() as cache:
        compiled = run(
            [python, "-m", "compileall", "-q", "hut_kernels", "tests"],
            {"PYTHONPYCACHEPREFIX": cache},
        )
    if compiled.returncode:
        return fail(cell, "FAILED", last_line(compiled.stdout + compiled.stderr))
    return fail(cell, "compiles", "every file is valid there; no PyTorch to run the suite with")


# The table


def cells(only: list[str]) -> list[tuple[str, str]]:
    everything = [("Triton", v) for v in TRITONS]
    everything += [("torch", v) for v in TORCHES]
    everything += [("Python", v) for v in PYTHONS]
    return [
        (kind, version)
        for kind, version in everything
        if not only or any(text.lower() in f"{kind} {version}".lower() for text in only)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="cells whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--quick", action="store_true", help="only the tests that touch Triton")
    parser.add_argument("--ptx", action="store_true", help="only the compiled kernels (make ptx)")
    parser.add_argument("--folder", type=Path, help="keep the Tritons here for the next run")
    arguments = parser.parse_args()
    chosen = cells(arguments.only)
    if arguments.list:
        print(*(f"{kind} {version}" for kind, version in chosen), sep="\n")
        return 0
    suite = PTX if arguments.ptx else QUICK if arguments.quick else WHOLE
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        for kind, version in chosen:
            if kind == "Triton":
                cell = try_triton(version, folder, suite)
            else:
                cell = try_torch(version) if kind == "torch" else try_python(version)
            print(
                f"{cell.name:28} {cell.verdict:10} {cell.seconds:6.0f} s  {cell.detail}", flush=True
            )
            done.append(cell)
    failed = sum(cell.verdict == "FAILED" for cell in done)
    passed = sum(cell.verdict == "passed" for cell in done)
    print(f"{passed} cells passed, {failed} failed, {len(done) - passed - failed} did not run")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
