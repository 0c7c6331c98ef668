"""Measurements of the kernels: ceilings, each part over tokens, steps, tiles.

Every suite takes its timer as an argument and yields plain rows for the record, the times in
seconds. None needs CUDA by itself: the tests run them on a CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hut_kernels import devices, hut_linear, ops, planner
from hut_kernels.layer import Layer, Spec
from tests.gpu.cases import FUSED, PARTS, STAGED, Check, rows_of
from tests.gpu.lists import candidate

from .timing import Call, Timer, random, sets_for

Row = dict[str, Any]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_TOKENS = (1, 16, 64, 256, 512, 1024, 4096)
FORMS: dict[str, tuple[str, float, float]] = {
    "low_rank": ("low_rank", 1.0, 0.5),
    "two_sided": ("two_sided", 1.0, 1.0),
}


@dataclass(frozen=True)
class Subject:
    """A layer to time: shape, rank, transform and type, with float32 factors."""

    K: int
    O: int
    r: int = 16
    transform: str = "low_rank"
    dtype: str = "bfloat16"

    def as_dict(self) -> Row:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Bench:
    """A device, and the timers to use on it.

    Attributes:
        device: The device.
        limits: Its limits, as the planner knows them.
        device_timer, host_timer: For device time, and for eager calls.
        backend: Of the operators.
        seconds: To spend on one figure.
        cache, free: Bytes of the last cache, and of free memory.
    """

    device: torch.device
    limits: devices.Device
    device_timer: Timer
    host_timer: Timer
    backend: str = "triton"
    seconds: float = 0.12
    cache: int = 1 << 16
    free: int = 1 << 30

    def sets(self, bytes_each: int) -> int:
        return sets_for(bytes_each, self.cache, self.free)


@dataclass
class Tensors:
    """One set of a layer's inputs."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    hut_A: Tensor
    hut_B: Tensor


def tensors(bench: Bench, layer: Subject, N: int, parts: Sequence[str]) -> list[Tensors]:
    """As many sets as keep the cache cold; only what the parts touch counts."""
    dtype: torch.dtype = getattr(torch, layer.dtype)
    item = dtype.itemsize
    needs_x = {"forward", "grad_factors", "step"} & set(parts)
    needs_grad = {"grad_input", "grad_factors", "step"} & set(parts)
    touched = layer.K * layer.O * item
    touched += N * item * (layer.K * bool(needs_x) + layer.O * bool(needs_grad))
    make: dict[str, Any] = {"device": bench.device, "count": bench.sets(touched)}
    factors: dict[str, Any] = {**make, "dtype": torch.float32}
    center, size = (1.0, 0.3) if layer.transform == "two_sided" else (0.0, layer.r**-0.5)
    return [
        Tensors(x, grad, weight, A.add_(center), B.add_(center))
        for x, grad, weight, A, B in zip(
            random(N if needs_x else 1, layer.K, dtype=dtype, **make),
            random(N if needs_grad else 1, layer.O, dtype=dtype, **make),
            random(layer.O, layer.K, dtype=dtype, scale=layer.K**-0.5, **make),
            random(layer.r, layer.K, scale=size, **factors),
            random(layer.O, layer.r, scale=0.3, **factors),
            strict=True,
        )
    ]


def calls_of(
    part: str, strategy: str, sets: Sequence[Tensors], layer: Subject, backend: str
) -> list[Call]:
    """A part of a layer by one of its strategies, or by `plain`: the same product without T."""
    form = FORMS[layer.transform]

    def forward(t: Tensors) -> object:
        return ops.forward(
            t.x, t.weight, t.hut_A, t.hut_B, None, None, None, *form, "merged", backend
        )

    def backward(t: Tensors, of_x: bool, of_factors: bool) -> object:
        needs = of_x, of_factors, of_factors, False
        return ops.backward(
            t.grad, t.x, t.weight, t.hut_A, t.hut_B, None, *form, "merged", *needs, backend
        )

    def grad_input(t: Tensors) -> object:
        return backward(t, True, False)

    def grad_factors(t: Tensors) -> object:
        return backward(t, False, True)

    def weight(t: Tensors) -> object:
        if backend == "triton":
            return _staged_weight(t, layer)
        return ops.weight(t.weight, t.hut_A, t.hut_B, None, *form, t.weight.dtype, backend)

    ours: dict[str, Callable[[Tensors], object]] = {
        "weight": weight,
        "forward": forward,
        "grad_input": grad_input,
        "grad_factors": grad_factors,
        "step": lambda t: (forward(t), backward(t, True, True)),
    }
    plain: dict[str, Callable[[Tensors], object]] = {
        "forward": lambda t: F.linear(t.x, t.weight),
        "grad_input": lambda t: t.grad @ t.weight,
        "grad_factors": lambda t: t.grad.t() @ t.x,
        "weight": lambda t: t.weight.clone(),
    }
    plain["step"] = lambda t: [plain[name](t) for name in PARTS]
    run = plain[part] if strategy == "plain" else ours[part]
    return [lambda t=t: run(t) for t in sets]


def _staged_weight(t: Tensors, layer: Subject) -> Tensor:
    """W as the staged products take it: one launch of the weight kernel."""
    from hut_kernels import auto
    from hut_kernels.triton import backend

    operands = Layer(t.weight, t.hut_A, t.hut_B, spec=Spec(*FORMS[layer.transform]))
    plan = auto.plan_call("triton", operands, t.x)
    return backend.stage(plan, operands, t.weight.dtype)


def force_of(part: str, strategy: str) -> dict[str, str]:
    """Arguments of `planner.force`."""
    if strategy in ("plain", "planned") or part == "weight":
        return {}
    if part == "step":
        chosen = FUSED if strategy == "fused" else STAGED
        return dict(zip(PARTS, chosen, strict=True))
    return {part: strategy}


def ceilings(bench: Bench, size: int = 8192, copy_bytes: int = 1 << 31) -> Row:
    """Bandwidth of a large copy (bytes read and written), and rates of large matrix products."""
    copy_bytes = min(copy_bytes, bench.free // 4)
    copied = bench.device_timer([_copy(copy_bytes, bench.device)], bench.seconds)
    _tidy(bench)
    found: Row = {
        "copy_bytes": copy_bytes,
        "copy": copied.as_dict(),
        "copy_bytes_per_second": 2 * copy_bytes / copied.median,
    }
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float16", torch.float16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        a, b = random(size, size, dtype=dtype, device=bench.device, count=2)
        before = torch.backends.cuda.matmul.fp32_precision  # the older getters may raise
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            took = bench.device_timer([lambda a=a, b=b: a @ b], bench.seconds)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        found[name] = took.as_dict()
        found[f"{name}_per_second"] = 2 * size**3 / took.median
    return found


def _copy(size: int, device: torch.device) -> Call:
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def floor(layer: Subject, N: int, part: str, limits: devices.Device, ceiling: Row) -> float:
    """Seconds no version takes less than: operations or bytes at this run's own ceilings."""
    planned = planner.plan(_problem(layer, N), limits, "triton")
    made = dataclasses.replace(planned, forward="fused", grad_input="fused", grad_factors="fused")
    parts = PARTS if part == "step" else (part,)
    rate = ceiling["tf32_per_second" if layer.dtype == "float32" else f"{layer.dtype}_per_second"]
    return sum(
        max(made.operations[p] / rate, made.bytes[p] / ceiling["copy_bytes_per_second"])
        for p in parts
    )


def _problem(layer: Subject, N: int) -> planner.Problem:
    sizes = N, layer.K, layer.O, layer.r
    return planner.Problem(*sizes, layer.dtype, layer.dtype, transform=layer.transform)


def over_tokens(
    bench: Bench, layer: Subject, tokens: Sequence[int], parts: Sequence[str], ceiling: Row
) -> Iterator[Row]:
    """Each part by both its strategies and as the plain product, at each number of tokens."""
    for N in tokens:
        for part in parts:
            sets = tensors(bench, layer, N, [part])
            other = "chunked" if part == "grad_factors" else "staged"
            row: Row = {
                "suite": "tokens",
                **layer.as_dict(),
                "N": N,
                "part": part,
                "sets": len(sets),
                "floor": floor(layer, N, part, bench.limits, ceiling),
            }
            for strategy in ("plain", "fused", other):
                row[strategy] = _timed(bench, part, strategy, sets, layer)
            yield row
            del sets
            _tidy(bench)


def steps(bench: Bench, layer: Subject, tokens: Sequence[int], ceiling: Row) -> Iterator[Row]:
    """Forward and backward: device time as planned, by each strategy, plain; and eager time."""
    for N in tokens:
        sets = tensors(bench, layer, N, ["step"])
        row: Row = {
            "suite": "step",
            **layer.as_dict(),
            "N": N,
            "floor": floor(layer, N, "step", bench.limits, ceiling),
        }
        for strategy in ("plain", "planned", "fused", "staged"):
            row[strategy] = _timed(bench, "step", strategy, sets, layer)
        row["eager"] = bench.host_timer(_eager_steps(sets, layer, bench), bench.seconds).as_dict()
        yield row
        del sets
        _tidy(bench)


def weights(bench: Bench, layers: Sequence[Subject]) -> Iterator[Row]:
    """The weight kernel beside a copy of the weight."""
    for layer in layers:
        sets = tensors(bench, layer, 1, ["weight"])
        yield {
            "suite": "weight",
            **layer.as_dict(),
            "weight": _timed(bench, "weight", "planned", sets, layer),
            "copy": _timed(bench, "weight", "plain", sets, layer),
        }
        del sets
        _tidy(bench)


# Tiles


TILES = {
    "forward": ("BN", "BO", "BK"),
    "grad_input": ("BN", "BO", "BK"),
    "grad_factors": ("BN", "BO", "BK"),
    "weight": ("BO", "BK"),
    "grad_reduce": ("BO", "BK"),
}
TIMED_AS = {
    "forward": ("forward", "fused"),
    "grad_input": ("grad_input", "fused"),
    "grad_factors": ("grad_factors", "fused"),
    "weight": ("weight", "planned"),
    "grad_reduce": ("grad_factors", "chunked"),
}
TILE_TOKENS = {
    "forward": (16, 64, 512, 4096),
    "grad_input": (16, 64, 512, 4096),
    "grad_factors": (64, 512, 4096),
    "weight": (16,),
    "grad_reduce": (4096,),
}


def alternatives(row: Any, kernel: str, capacity: int = 1 << 16) -> list[dict[str, Any]]:
    """Changes of a table row, one field or a pair at a time, nearest first.

    Args:
        row: The row: a dataclass.
        kernel: Whose.
        capacity: The most elements of one tile.

    Returns:
        Arguments of `dataclasses.replace`; each makes another row, and one that the row itself
        accepts.
    """
    changes: list[dict[str, Any]] = []
    tiles = TILES[kernel]
    for name in tiles:
        size = getattr(row, name)
        changes += [{name: other} for other in (size // 2, size * 2) if 16 <= other <= 256]
    if row.warps in (4, 8):
        changes.append({"warps": 12 - row.warps})
    changes += [{"stages": n} for n in (row.stages - 1, row.stages + 1) if 1 <= n <= 6]
    # One side longer, another shorter: as much on chip, other reuse.
    changes += [
        {long: 2 * getattr(row, long), short: getattr(row, short) // 2}
        for long in tiles
        for short in tiles
        if long != short and 2 * getattr(row, long) <= 256 and getattr(row, short) >= 32
    ]
    return [
        change
        for change in (*changes, *_switches(row, kernel))
        if _possible(row, change, tiles, capacity)
    ]


def _switches(row: Any, kernel: str) -> Iterator[dict[str, Any]]:
    """Changes beyond tiles, warps and stages, of whatever fields later tables add."""
    for one in dataclasses.fields(row):
        value = getattr(row, one.name)
        if one.name in ("BN", "BO", "BK", "warps", "stages", "GROUP"):
            continue
        if one.name == "W_FIRST" and kernel != "forward":
            continue
        if isinstance(value, bool):
            if value or one.name != "wgmma_async":
                yield {one.name: not value}
        elif one.name == "maxnreg":
            if value is not None:
                yield {one.name: None}
        elif isinstance(value, int) and value >= 1:
            yield from ({one.name: n} for n in (value // 2, value * 2) if n >= 1)


def _possible(row: Any, change: dict[str, Any], tiles: tuple[str, ...], capacity: int) -> bool:
    try:
        other = dataclasses.replace(row, **change)
    except (TypeError, ValueError):
        return False
    sizes = sorted(getattr(other, name) for name in tiles)
    return other != row and sizes[-1] * sizes[-2] <= capacity


def current_row(bench: Bench, layer: Subject, kernel: str, N: int) -> Any:
    """The table's row for a kernel of this layer on this device."""
    from hut_kernels.triton import launch, tables

    kind = launch.kind(getattr(torch, layer.dtype))
    return tables.launch_config(kernel, bench.limits.arch, N, layer.r, kind)


def tile_cases(bench: Bench, layer: Subject, tokens: dict[str, tuple[int, ...]]) -> list[Check]:
    """Cases that check every alternative (and compile it, into Triton's cache on disk)."""
    cases: list[Check] = []
    for kernel, some in tokens.items():
        for N in some:
            row = current_row(bench, layer, kernel, N)
            options = {"transform": layer.transform, "dtype": layer.dtype, "scaling": 0.5}
            for change in alternatives(row, kernel):
                cases.append(candidate(kernel, N, layer.K, layer.O, layer.r, change, **options))
    return _by_turns(cases)


def _by_turns(cases: Sequence[Check]) -> list[Check]:
    """The first of each kernel and N, then the second: a budget that ends early saw some of all."""
    groups: dict[tuple[str | None, int], list[Check]] = {}
    for case in cases:
        groups.setdefault((case.kernel, case.N), []).append(case)
    rounds = itertools.zip_longest(*groups.values())
    return [case for some in rounds for case in some if case is not None]


def tiles(
    bench: Bench,
    layer: Subject,
    checked: Sequence[tuple[Check, Row]],
    time_left: Callable[[], float],
) -> Iterator[Row]:
    """Times the alternatives that were found right, beside the table's row before and after."""
    groups: dict[tuple[str, int], list[tuple[Check, Row]]] = {}
    for case, result in checked:
        groups.setdefault((case.kernel or "", case.N), []).append((case, result))
    for (kernel, N), some in groups.items():
        row = current_row(bench, layer, kernel, N)
        record: Row = {
            "suite": "tiles",
            **layer.as_dict(),
            "kernel": kernel,
            "N": N,
            "row": dataclasses.asdict(row),
            "candidates": [],
        }
        sets = tensors(bench, layer, N, [TIMED_AS[kernel][0]])

        def timed(change: dict[str, Any] | None, kernel: str = kernel, sets: Any = sets) -> Row:
            with rows_of(kernel, change):
                return _timed(bench, *TIMED_AS[kernel], sets, layer)

        record["before"] = timed({})
        for case, result in some:
            one: Row = {"change": case.row, "status": result["status"]}
            if result["status"] != "passed":
                one["problems"] = result["problems"]
            elif time_left() < 2 * bench.seconds:
                one["status"] = "left out"
            else:
                one["time"] = timed(case.row)
            record["candidates"].append(one)
        record["after"] = timed({})
        yield record
        del sets, timed
        _tidy(bench)


def _timed(bench: Bench, part: str, strategy: str, sets: Sequence[Tensors], layer: Subject) -> Row:
    """Quantiles, or what went wrong in words: one figure lost is not the run lost."""
    calls = calls_of(part, strategy, sets, layer, bench.backend)
    try:
        with planner.force(**force_of(part, strategy)):
            return bench.device_timer(calls, bench.seconds).as_dict()
    except Exception as failure:
        if "CUDA error" in str(failure):
            raise
        return {"error": f"{type(failure).__name__}: {failure}"[:300]}


def _eager_steps(sets: Sequence[Tensors], layer: Subject, bench: Bench) -> list[Call]:
    transform, offset, scaling = FORMS[layer.transform]

    def step(t: Tensors) -> object:
        x, A, B = (v.detach().requires_grad_() for v in (t.x, t.hut_A, t.hut_B))
        y = hut_linear(
            x, t.weight, A, B,
            transform=transform, offset=offset, scaling=scaling, backend=bench.backend,
        )  # fmt: skip
        return torch.autograd.grad(y, (x, A, B), t.grad)

    return [lambda t=t: step(t) for t in sets]


def _tidy(bench: Bench) -> None:
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
