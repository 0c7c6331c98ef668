"""The suite beside other versions of Triton, PyTorch, transformers and Python.

`python -m tests.matrix [--only TEXT ...] [--list] [--ptx] [--folder DIR]` installs each Triton into
a folder of its own, puts that before this environment's, and runs the tests that depend on it.
Another transformers is put there likewise; another PyTorch, by its plain wheel (6 GB with what it
needs, one at a time, removed afterwards), gets an environment of its own and `make test`.
Other Pythons are looked for and, where they are not to be had, listed with the reason. The exit
status is 1 if a cell that could run has failed.
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
TORCHES = ("2.10.0", "2.13.0", "2.14.1", "2.15.0")  # the oldest, the pinned one, the two latest
TRANSFORMERS = ("5.24.0",)
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

# The interpreter of Triton 3.6.0, which PyTorch 2.10.0 brings, uses what numpy 2.4 has removed.
NUMPY = {"Triton 3.6.0": "numpy<2.4", "torch 2.10.0": "numpy<2.4"}

# What depends on Triton; the rest of the suite is the same whichever is installed.
KERNELS = {
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
# What depends on transformers, the pages that name it included.
MODELS = {"": ["tests/integrations", "tests/examples"]}


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


# Triton and transformers


def install(requirements: list[str], folder: Path) -> str | None:
    """Installs into a folder; why not, where it does not work."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    done = run([*command, "--target", str(folder), *requirements])
    return None if done.returncode == 0 else last_line(done.stderr)


def try_package(name: str, version: str, folder: Path, suite: dict[str, list[str]]) -> Cell:
    """Another version of a package, put before this environment's."""
    cell = Cell(f"{name} {version}, torch {importlib.metadata.version('torch')}")
    environment = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    package = name.lower()
    if version != importlib.metadata.version(package):
        target = folder / f"{package}-{version}"
        numpy = [NUMPY[key]] if (key := f"{name} {version}") in NUMPY else []
        problem = install([f"{package}=={version}", *numpy], target)
        if problem:
            return fail(cell, "not had", problem)
        environment["PYTHONPATH"] = str(target)
    seen = run([sys.executable, "-c", f"import {package} as p; print(p.__version__)"], environment)
    if seen.stdout.strip() != version:
        return fail(cell, "FAILED", f"{package} {seen.stdout.strip()} was imported instead")
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
    """`make test` with the plain wheel of another PyTorch, and the Triton that it brings."""
    cell = Cell(f"torch {version}")
    if version == importlib.metadata.version("torch").partition("+")[0]:
        return fail(cell, "installed", "the one of the Triton cells")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        constraints, venv = Path(name, "constraints.txt"), Path(name, "venv")
        pinned = (ROOT / "constraints.txt").read_text()
        pinned = re.sub(r"^torch==.*", f"torch=={version}", pinned, flags=re.MULTILINE)
        pinned = re.sub(r"^triton==.*\n", "", pinned, flags=re.MULTILINE)
        if cell.name in NUMPY:
            pinned = re.sub(r"^numpy==.*", NUMPY[cell.name], pinned, flags=re.MULTILINE)
        constraints.write_text(pinned)
        options = [f"VENV={venv}", f"CONSTRAINTS={constraints}"]
        made = run(["make", f"{venv}/.ready-torch", *options])
        if made.returncode:
            return fail(cell, "not had", last_line(made.stderr))
        done = run(["make", "test", *options])
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)[:20]:
        print("   ", line, flush=True)
    totals = re.findall(r"^=*\s*(\d+ (?:passed|failed).*?)\s*=*$", done.stdout, re.MULTILINE)
    cell.seconds = time.monotonic() - begun
    return fail(cell, "FAILED" if done.returncode else "passed", "; ".join(totals))


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
    everything += [("transformers", v) for v in TRANSFORMERS]
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
    parser.add_argument("--ptx", action="store_true", help="only the compiled kernels (make ptx)")
    parser.add_argument("--folder", type=Path, help="keep the packages here for the next run")
    arguments = parser.parse_args()
    chosen = cells(arguments.only)
    if arguments.list:
        print(*(f"{kind} {version}" for kind, version in chosen), sep="\n")
        return 0
    suite = PTX if arguments.ptx else KERNELS
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        for kind, version in chosen:
            if kind == "Triton":
                cell = try_package(kind, version, folder, suite)
            elif kind == "transformers":
                cell = try_package(kind, version, folder, MODELS)
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
