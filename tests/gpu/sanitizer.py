"""Small shapes of every kernel under compute-sanitizer, where it is installed.

python -m tests.gpu.sanitizer          the program that it watches
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch

from hut_kernels import backends

from .cases import FUSED, STAGED, Check, forced, make, run
from .workers import ROOT

# Without initcheck: it knows of no write but those of the kernels that it watches, so it would have
# to watch torch's and the BLAS's as well. What nobody wrote is NaN in the correctness cases, and
# where C++ allocates in tests/test_cuda.py.
TOOLS = ("memcheck", "racecheck")
_DONE = "hut-sanitized"
_FINDING = re.compile(r"Invalid __|out of bounds|misaligned|[Hh]azard|Race reported|Uninitialized")
_COUNT = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
# Only our kernels are watched; an older or newer tool may know the option by another name.
_FILTERS: tuple[list[str], ...] = (
    ["--kernel-name", "kernel_substring=hut_"],
    ["--kernel-regex", "kns=hut_"],
    [],
)


def small_cases(compiled: bool) -> list[Check]:
    """Every kernel and transform; remainders in every tile, odd addresses, one token.

    Args:
        compiled: Whether the compiled extension is to be watched as well.
    """
    cases = []
    for strategies, transform in itertools.product((FUSED, STAGED), ("low_rank", "two_sided")):
        how: dict[str, Any] = {"strategies": strategies, "transform": transform}
        cases += [
            Check(40, 144, 112, 16, vectors=("bias", "gamma", "beta"), **how),
            Check(33, 117, 83, 5, layout="sliced", **how),
            Check(33, 128, 112, 5, layout="shifted", **how),
            Check(1, 128, 128, 3, "float32", **how),
        ]
    if compiled:
        staged = [case for case in cases if case.strategies == STAGED]
        cases += [dataclasses.replace(case, backend="cuda") for case in staged]
    return cases


def main() -> None:
    """Runs the small cases; compares nothing, for that is done elsewhere."""
    device = torch.device("cuda", 0)
    cases = small_cases(compiled=backends()["cuda"]["available"])
    for case in cases:
        with forced(case):
            run(case, make(case, device))
    torch.cuda.synchronize()
    print(_DONE, len(cases), flush=True)


def verdict(tool: str, output: str, code: int | None) -> dict[str, str]:
    """`clean`, `findings` or `did not run`, and the words that say why."""
    counts = [int(count) for count in _COUNT.findall(output)]
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.strip("= ").strip()]
    telling = [line for line in lines if _FINDING.search(line)]
    if _DONE in output and counts and not any(counts):
        return {"status": "clean"}
    if any(counts) and telling:
        some = " | ".join(dict.fromkeys(telling[:6]))
        return {"status": "findings", "detail": f"{max(counts)}: {some}"[:1500]}
    ending = "it ran out of time" if code is None else f"exit code {code}"
    return {"status": "did not run", "detail": f"{ending}: {' | '.join(lines[-3:])}"[:600]}


class Sanitizers:
    """All tools at once, beside the other checks; `results` waits for them."""

    def __init__(self, until: float, command: str | None = None) -> None:
        self.until = until
        self.found: dict[str, dict[str, str]] = {}
        self.command = command or shutil.which("compute-sanitizer")
        self.threads = [
            threading.Thread(target=self._run, args=(tool,))
            for tool in TOOLS
            if self.command is not None
        ]
        for thread in self.threads:
            thread.start()

    def results(self) -> dict[str, dict[str, str]]:
        if self.command is None:
            words = "compute-sanitizer is not on the PATH"
            return {tool: {"status": "not installed", "detail": words} for tool in TOOLS}
        for thread in self.threads:
            thread.join()
        return self.found

    def _run(self, tool: str) -> None:
        for options in _FILTERS if tool == "memcheck" else _FILTERS[:2]:
            found = self._once(tool, options)
            self.found[tool] = {**found, "options": " ".join(options)}
            if found["status"] != "did not run" or time.monotonic() > self.until - 20:
                return

    def _once(self, tool: str, options: list[str]) -> dict[str, str]:
        # Without torch's own cache every tensor is an allocation whose end the tool knows.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        program = [sys.executable, "-m", "tests.gpu.sanitizer"]
        command = [str(self.command), "--tool", tool, *options, *program]
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as failure:
            return {"status": "did not run", "detail": str(failure)}
        code: int | None = None
        try:
            output, _ = process.communicate(timeout=max(1.0, self.until - time.monotonic()))
            code = process.returncode
        except subprocess.TimeoutExpired:
            # The watched program is the tool's child, and would disturb what is timed next.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return verdict(tool, output.decode(errors="replace"), code)


if __name__ == "__main__":
    main()
