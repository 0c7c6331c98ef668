"""Time and memory of a call: interleaved rounds, quantiles, and the allocator's own counters."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

FEWEST = 5  # samples: of fewer, p20 to p80 is no spread to judge by
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Quantiles:
    """The middle of a sample, and the three fifths of it around the middle."""

    p20: float
    median: float
    p80: float
    samples: int

    @classmethod
    def of(cls, values: list[float]) -> "Quantiles":
        p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
        return cls(p20, median, p80, len(values))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """Something to time: `run` is timed, `prepare` goes before it, outside the timed region."""

    run: Callable[[], object]
    prepare: Callable[[], object] = field(default=lambda: None)
    replay: bool = False  # of a CUDA graph: timed on the device alone, without the host


def forward_call(layer: nn.Module, x: Tensor) -> Call:
    """The forward as in training: the graph for the backward is recorded, then dropped."""
    return Call(lambda: layer(x))


def backward_call(layer: nn.Module, x: Tensor, g: Tensor) -> Call:
    """The backward alone: its forward goes before, old gradients are gone."""
    outputs: list[Tensor] = []

    def prepare() -> None:
        clear_gradients(layer, x)
        outputs[:] = [layer(x)]

    return Call(lambda: outputs.pop().backward(g), prepare)


def step_call(layer: nn.Module, x: Tensor, g: Tensor) -> Call:
    """Forward and backward; the upstream gradient `g` is at hand, old gradients are gone."""

    def run() -> Tensor:
        y = layer(x)
        y.backward(g)
        return y

    return Call(run, lambda: clear_gradients(layer, x))


def clear_gradients(layer: nn.Module, x: Tensor) -> None:
    """No gradient is there to add to, in the layer and in its input."""
    x.grad = None
    layer.zero_grad(set_to_none=True)


def interleaved(
    cases: Mapping[Key, Call],
    device: torch.device,
    seconds: float,
    rounds: int = 1000,
    min_rounds: int = FEWEST,
    on_round: Callable[[float], object] = lambda share: None,
    timer: Callable[[Call], float] | None = None,
    failed: dict[Key, str] | None = None,
) -> dict[Key, list[float]]:
    """Times every case once per round, so that whatever drifts hits all of them alike.

    Each round begins with the next case, so that none always follows the same one; two cases only
    alternate, since turned round they would follow themselves, with warm caches. Two rounds warm
    up. Rounds go on until `seconds` are spent or `rounds` are done, but to `min_rounds` at least.

    Args:
        cases: What to time, by name.
        device: Where the cases run.
        seconds: Time to spend.
        rounds: The most rounds.
        min_rounds: The fewest rounds.
        on_round: Called after each round with the share that is done, for a progress bar.
        timer: Gives the seconds of one call; by default a wall clock, and on a CUDA device events
            around the call with a cold L2 cache.
        failed: Where given, a case that fails is dropped, its reason goes in here, and the others
            go on. Else its error is raised.

    Returns:
        For each name the seconds of each round; the same index is the same round.
    """
    if timer is None:
        on_cuda = device.type == "cuda"
        timer = _CudaTimer(device) if on_cuda else lambda case: host_time(case.run, device)
    times: dict[Key, list[float]] = {name: [] for name in cases}
    names, warm_up, begin = list(cases), 2, time.perf_counter()
    for number in range(rounds + warm_up):
        turn = number % len(names) if len(names) > 2 else 0
        for name in names[turn:] + names[:turn]:
            with contextlib.nullcontext() if failed is None else survived(name, failed):
                cases[name].prepare()
                times[name].append(timer(cases[name]))
        names = [name for name in names if name not in (failed or {})]
        spent = (time.perf_counter() - begin) / max(seconds, 1e-9)
        share = max(spent, (number + 1) / (rounds + warm_up))
        done = number + 1 >= min_rounds + warm_up and share >= 1
        on_round(1.0 if done else min(share, 0.99))
        if done:
            break
    return {name: times[name][warm_up:] for name in names}


@contextlib.contextmanager
def survived(name: Key, failed: dict[Key, str]) -> Iterator[None]:
    """Notes what goes wrong with one case, so that the others are measured all the same."""
    try:
        yield
    except Exception as failure:
        failed[name] = first_line(failure)


def first_line(failure: Exception) -> str:
    """An exception in a line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]


def host_time(run: Callable[[], object], device: torch.device, wait: bool = True) -> float:
    """Seconds of a call by the wall clock, from an idle device on.

    Args:
        run: The call.
        device: Where it leaves its work.
        wait: Whether to wait until the device has done its work too.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if on_cuda and wait:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def ratios(numerator: list[float], denominator: list[float]) -> Quantiles:
    """Quantiles of the ratio round by round: what slows a whole round cancels out."""
    return Quantiles.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def settle_threads(seconds: float = 0.5) -> tuple[int, int]:
    """Drops to one thread where more are no faster: on a busy machine they wait for each other.

    Args:
        seconds: Time for each of the two ways.

    Returns:
        The threads that there were, and those that there are now.
    """
    before = torch.get_num_threads()
    work = {before: 0, 1: 0}
    x, weight = torch.randn(512, 256), torch.randn(256, 256)
    for turn in range(8 if before > 1 else 0):
        threads = (before, 1)[turn % 2]
        torch.set_num_threads(threads)
        end = time.perf_counter() + seconds / 4
        while time.perf_counter() < end:
            torch.tanh(x @ weight)
            work[threads] += 1
    torch.set_num_threads(before if work[before] >= work[1] else 1)
    return before, torch.get_num_threads()


class OtherPrograms:
    """The share of the CPUs that other programs take, from now on."""

    def __init__(self) -> None:
        self.begin, self.before = time.perf_counter(), self._seconds()

    def share(self) -> float | None:
        """Of all CPUs, 0 to 1; None where Linux's /proc does not tell."""
        now = self._seconds()
        if now is None or self.before is None:
            return None
        elapsed = time.perf_counter() - self.begin
        return max(0.0, (now - self.before) / (elapsed * (os.cpu_count() or 1)))

    @staticmethod
    def _seconds() -> float | None:
        """CPU seconds of all programs since the system started, without this one's."""
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0]
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft, *_ = map(int, first.split()[1:])
        busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy - own.user - own.system - own.children_user - own.children_system


def peak_bytes(case: Call, device: torch.device) -> int:
    """The most bytes that PyTorch's allocator had out during the call, above those before it.

    On CUDA by the allocator's own counters. On a CPU by the allocation events of PyTorch's
    profiler: they come from the allocator too, so they see what operators allocate inside, and they
    count exactly. Not counted there: what a matrix library packs in buffers of its own. The call
    has a thread of its own, so that a workspace kept from call to call, by thread, counts too.
    """
    case.prepare()
    if device.type != "cuda":
        return int(_in_a_thread(lambda: _live_bytes(case.run), device).max())
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    case.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(case: Call, device: torch.device) -> int:
    """The bytes still out at the end of the call, its result at hand, above those before it.

    A workspace that outlives the call is not among them: a first call has made it already.
    """

    def kept() -> int:
        case.run()
        case.prepare()
        if device.type != "cuda":
            return int(_live_bytes(case.run)[-1])
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = case.run()
        after = torch.cuda.memory_allocated(device)
        del result  # not before the counter is read
        return after - before

    case.prepare()
    return _in_a_thread(kept, device)


def _in_a_thread(call: Callable[[], Result], device: torch.device) -> Result:
    def on_device() -> Result:  # a thread begins on the first
        on_cuda = device.type == "cuda"
        with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
            return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(on_device).result()


def memory_method(device: torch.device) -> str:
    """Says in words how `peak_bytes` counts on this device."""
    if device.type == "cuda":
        return "CUDA caching allocator: peak allocated bytes above those before the call"
    return "PyTorch's CPU allocator, by its profiler events: peak live bytes above those before"


def peak_resident_bytes(run: Callable[[], object]) -> int | None:
    """The process' resident high-water mark during the call, above what was resident before it.

    Sees everything that takes memory, libraries' own buffers included, but whole pages only and
    the noise of the process too. Call it in a process of its own. None where Linux's /proc does not
    tell.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
        before = _proc_status_bytes("VmRSS")
        run()
        return _proc_status_bytes("VmHWM") - before
    except (OSError, StopIteration):
        return None


class _CudaTimer:
    """Time between two events around the call; the L2 cache is flushed before it.

    A call is launched once the flush has ended: an idle device waits for the host, as it does in a
    training loop that launches cannot keep up with. A replay is launched during the flush, which
    hides the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, case: Call) -> float:
        self.flush.zero_()
        if not case.replay:
            torch.cuda.synchronize(self.flush.device)
        self.begin.record()
        case.run()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


def _live_bytes(run: Callable[[], object]) -> np.ndarray:
    """The bytes out after each allocation and release, above those before the call."""
    with (
        _quiet_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = run()
    del result  # not before the profiler has stopped
    with tempfile.TemporaryDirectory() as folder, _quiet_stderr():
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    # What was allocated before the profiler began is not reported when freed: it stays resident.
    return np.cumsum([0] + [event["args"]["Bytes"] for event in changes])


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Some PyTorch builds print two lines per profiler start that no setting turns off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _proc_status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
