"""The memory suite: what a stack of adapted layers holds, beside what theory says."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from .. import bases
from ..bases import DENSE
from ..measure import (
    Call,
    forward_call,
    kept_bytes,
    peak_bytes,
    peak_resident_bytes,
    step_call,
    survived,
)
from ..methods import sharing_copy
from ..providers import PROVIDERS
from ..shapes import Shape
from . import cost
from .layer import labels

Row = dict[str, Any]


def measure(
    shape: Shape,
    depths: Sequence[int],
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    on_each: Callable[[float], object] = lambda share: None,
    base: str = DENSE,
) -> list[Row]:
    """Bytes that stacks of square layers hold: after a forward, and at a step's peak.

    Both are counted above what is resident: weights, factors, the stack's input and the upstream
    gradient. `saved` holds the stack's output too, `saved_by_theory` is `cost.Method.stack_kept`.

    Args:
        shape: Tokens, and the width twice.
        depths: How many layers, for each stack.
        r: Rank of the factors.
        dtype: Type of the activations and the base weights.
        device: Where to run.
        names: Keys of `PROVIDERS`; they have proved their formulas.
        on_each: Called with the share that is done.
        base: How the base weights are stored, of `bases.BASES`.

    Returns:
        One row per depth and provider.

    Raises:
        ValueError: A shape that is not square.
    """
    check(shape)
    tokens, width, _ = shape
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, width, device=device, dtype=dtype)
    rows: list[Row] = []
    for depth in depths:
        layers = (nn.Linear(width, width, device=device, dtype=dtype) for _ in range(depth))
        frozen = bases.with_stored(nn.Sequential(*layers), base)
        case = {"tokens": tokens, "width": width, "depth": depth, "r": r}
        for name in names:
            row = {"suite": "memory", **labels(name, dtype, base), "case": case}
            left_out: dict[str, str] = {}
            with survived(name, left_out):
                stack = PROVIDERS[name].adapt(sharing_copy(frozen), r"\d+", r)
                row["bytes"] = {
                    "saved": kept_bytes(forward_call(stack, x), device),
                    "saved_by_theory": _theory(name, shape, depth, r, dtype, base),
                    "peak": peak_bytes(step_call(stack, x, g), device),
                }
            if left_out:
                row["left_out"] = left_out[name]
            rows.append(row)
            on_each(len(rows) / (len(depths) * len(names)))
    return rows


def with_resident(rows: list[Row], shape: Shape) -> list[Row]:
    """The rows with the resident high-water mark of a step, each in a process of its own.

    Such a process has no workspace yet: the step has to make it.
    """
    for row in (row for row in rows if "left_out" not in row):
        case, dtype = row["case"], row["types"]["compute"]
        base = row["types"]["weight"]
        base = base if base in bases.BASES else DENSE
        given = row["provider"], shape, case["depth"], case["r"], dtype, base
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row["bytes"]["resident"] = pool.submit(_resident, *given).result()
    return rows


def _resident(name: str, shape: Shape, depth: int, r: int, dtype: str, base: str) -> int | None:
    def step(width: int) -> Call:
        options = {"dtype": getattr(torch, dtype)}
        layers = (nn.Linear(width, width, **options) for _ in range(depth))
        frozen = bases.with_stored(nn.Sequential(*layers), base)
        x = torch.randn(shape.tokens, width, requires_grad=True, **options)
        stack = PROVIDERS[name].adapt(frozen, r"\d+", r)
        return step_call(stack, x, torch.randn(shape.tokens, width, **options))

    call = step(shape.in_features)
    step(max(r, 64)).run()  # threads and libraries have their buffers now
    return peak_resident_bytes(call.run)


def check(shape: Shape) -> None:
    """Raises ValueError for a shape of which no stack can be made."""
    if shape.in_features != shape.out_features:
        raise ValueError(
            f"a stack needs a square shape, {shape.in_features}x{shape.out_features} is not"
        )


def _theory(
    name: str, shape: Shape, depth: int, r: int, dtype: torch.dtype, base: str
) -> int | None:
    provider = PROVIDERS[name]
    if provider.method is None or (base != DENSE and not provider.of_hut):
        return None  # what the library's own layers keep is not counted
    adapter = provider.adapter_dtype(dtype).itemsize
    return cost.METHODS[provider.method].stack_kept(shape, r, depth, dtype.itemsize, adapter)
