"""Device time without the host's: a CUDA graph of several calls, each on cold inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..measure import Quantiles, host_time

Call = Callable[[], object]


class Timer(Protocol):
    """Seconds a call takes.

    `calls` do the same on inputs of their own. They are to be gone through in order and often
    enough that each finds the caches without its inputs.
    """

    def __call__(self, calls: Sequence[Call], seconds: float) -> Quantiles: ...


class GraphTimer:
    """All calls in one CUDA graph, replayed between two events; a replay's time over its calls.

    Launch gaps on the host do not count; those on the device, about a microsecond, do.
    """

    def __init__(self, device: torch.device, min_calls: int = 4, min_replays: int = 9) -> None:
        self.device, self.min_calls, self.min_replays = device, min_calls, min_replays
        # One for all captures: the BLAS keeps a workspace for every stream.
        self.stream = torch.cuda.Stream(device)

    def __call__(self, calls: Sequence[Call], seconds: float) -> Quantiles:
        calls = list(calls) * -(-self.min_calls // len(calls))
        graph = self._capture(calls)
        try:
            once = self._replay(graph)
            replays = max(self.min_replays, min(200, int(seconds / max(once, 1e-6))))
            return Quantiles.of([self._replay(graph) / len(calls) for _ in range(replays)])
        finally:
            graph.reset()

    def _capture(self, calls: Sequence[Call]) -> Any:
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), torch.no_grad():
            for call in calls[:2]:  # compiles, and makes the libraries' handles
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        self._replay(graph)
        return graph

    def _replay(self, graph: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class HostTimer:
    """Wall time of eager calls, the device's work included: what a loop of single calls sees."""

    def __init__(self, device: torch.device, min_rounds: int = 5) -> None:
        self.device, self.min_rounds = device, min_rounds

    def __call__(self, calls: Sequence[Call], seconds: float) -> Quantiles:
        for call in calls[:2]:
            call()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < self.min_rounds or time.perf_counter() - begin < seconds:
            once = host_time(lambda: [call() for call in calls], self.device)
            times.append(once / len(calls))
        return Quantiles.of(times)


def sets_for(bytes_each: int, cache: int, free: int, most: int = 64) -> int:
    """The number of input sets that keeps the cache cold: four caches' worth."""
    wanted = -(-4 * cache // max(1, bytes_each)) + 1
    return max(1, min(wanted, most, int(0.4 * free) // max(1, bytes_each)))


def random(
    *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0, count: int = 1
) -> list[Tensor]:
    """Normally distributed tensors: power, and so clocks, depend on the values."""
    return [torch.randn(shape, dtype=dtype, device=device).mul_(scale) for _ in range(count)]
