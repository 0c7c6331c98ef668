"""A group of processes that runs one function after another, on gloo.

Starting a process costs seconds (torch is imported), a case in a running group milliseconds: so the
tests share a group for each world size.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
TIMEOUT = 60


def environment() -> dict[str, str]:
    """Environment by which processes on this machine find each other."""
    return {"GLOO_SOCKET_IFNAME": LOOPBACK, "OMP_NUM_THREADS": "1"}


class Group:
    """Processes of one process group; started by the first `run`, and anew after a failure."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """The result of `case(*args)` on each rank; `case` is a function of an importable module.

        Raises:
            AssertionError: The case failed on a rank; with every rank's traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, args))
        deadline = time.monotonic() + TIMEOUT
        answers = [
            pipe.recv() if pipe.poll(max(0, deadline - time.monotonic())) else ("no answer", None)
            for pipe in self._pipes
        ]
        failures = [f"rank {i}: {what}" for i, (what, _) in enumerate(answers) if what]
        if failures:
            self.close()  # ranks that failed and ranks that wait for them are of no further use
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (rank, self.world, str(store), theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(environment())
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("", case(*args))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
