"""Cases dealt to worker processes, so that kernels compile side by side and a crash stays small.

A worker reads one case per line (JSON) and answers one result per line. One that dies or hangs
costs its case alone: another takes its place.

    python -m tests.gpu.workers cuda < cases
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .cases import Check

ROOT = Path(__file__).resolve().parents[2]
_MARK = "hut-case "  # before a result: a library may print lines of its own

Result = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """The worker: `arguments` is the device."""
    import torch

    from .cases import check

    device = torch.device(arguments[0], 0) if arguments[0] == "cuda" else torch.device("cpu")
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            result = check(Check.load(json.loads(line)), device)
            print(_MARK + json.dumps(result), flush=True)
            if "CUDA error" in " ".join(result["problems"]):
                return  # nothing after it can be believed: the next case gets a new process


class Worker:
    """One process, started at its first case."""

    def __init__(self, device: str, env: dict[str, str]) -> None:
        self.device, self.env = device, env
        self.process: subprocess.Popen[str] | None = None
        self.log: IO[str] | None = None

    def check(self, case: Check, seconds: float) -> Result:
        """A case's result; `failed` where the process died or took more than `seconds`."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        expired = threading.Timer(seconds, self.process.kill)
        expired.start()
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
            self.process.stdin.flush()
            answer = self._answer()
        except OSError:
            answer = None
        finally:
            late = not expired.is_alive()
            expired.cancel()
        if answer is not None:
            return answer
        code = self.process.wait()
        words = f"no answer in {seconds:.0f} s" if late else f"the process died ({code})"
        status = "failed" if case.row is None else "unfit"
        problem = f"{words}: {self._last_lines()}"
        self.close()
        return {"status": status, "problems": [problem], "seconds": seconds if late else 0.0}

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process = None
        if self.log is not None:
            self.log.close()
            self.log = None

    def _start(self) -> None:
        self.close()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.workers", self.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self.env},
        )

    def _answer(self) -> Result | None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        return None

    def _last_lines(self) -> str:
        if self.log is None:
            return ""
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return " | ".join(lines[-3:])[:400]


def check_all(
    cases: Sequence[Check],
    device: str,
    jobs: int,
    until: float,
    env: dict[str, str] | None = None,
    case_seconds: float = 120.0,
    on_result: Callable[[Check, Result], object] = lambda case, result: None,
    make_worker: Callable[[str, dict[str, str]], Worker] = Worker,
) -> Iterator[tuple[Check, Result]]:
    """The results of all cases, in the cases' order; those not begun at `until` are `left out`.

    Args:
        cases: The most important first.
        device: `"cuda"` or `"cpu"`.
        jobs: Worker processes.
        until: By `time.monotonic()`.
        env: What their environment has beyond this one's.
        case_seconds: After so long a worker is killed.
        on_result: Called with each result as it comes, one at a time.
        make_worker: For tests.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(cases)):
        waiting.put(index)
    results: list[Result] = [{"status": "left out", "problems": []} for _ in cases]
    one_at_a_time = threading.Lock()

    def serve() -> None:
        worker = make_worker(device, env or {})
        try:
            while time.monotonic() < until:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                allowed = min(case_seconds, max(15.0, until + 15 - time.monotonic()))
                try:
                    result = worker.check(cases[index], allowed)
                except Exception as failure:  # a worker that cannot even start
                    result = {"status": "failed", "problems": [f"{failure!r}"], "seconds": 0.0}
                with one_at_a_time:
                    results[index] = result
                    on_result(cases[index], result)
        finally:
            worker.close()

    threads = [
        threading.Thread(target=serve, daemon=True) for _ in range(max(1, min(jobs, len(cases))))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield from zip(cases, results, strict=True)


if __name__ == "__main__":
    main(sys.argv[1:])
