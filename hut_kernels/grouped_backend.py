"""The grouped operators: experts staged one group after the other, by any backend.

Only experts that have rows are staged, into one workspace of a quarter of the stack or of one
expert, and G exists for a group at a time. On a CPU a group is one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import onednn, planner, torch_backend
from .layer import Layer, Needs, Spec, acc_dtype, cast, effective_bias

# Multiplications from which oneDNN's product repays its longer call.
_LARGE_PRODUCT = 1 << 21


class Stack(NamedTuple):
    """A stack of experts' operands, `[experts, ...]` each; without factors a plain product's."""

    weight: Tensor
    hut_A: Tensor | None
    hut_B: Tensor | None
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    spec: Spec


class Expert(NamedTuple):
    """An expert that has rows."""

    number: int
    layer: Layer
    rows: slice


def bounds(offsets: Tensor, rows: int) -> list[int]:
    """0 and the end of each expert's rows; on a GPU it waits for the offsets.

    Raises:
        ValueError: offsets that decrease, or reach beyond the rows.
    """
    ends = [0, *offsets.tolist()]
    if any(start > end for start, end in pairwise(ends)) or ends[-1] > rows:
        raise ValueError(f"offsets must not decrease nor exceed x's {rows} rows; got {ends[1:]}")
    return ends


def forward(x: Tensor, layer: Stack, offsets: Tensor, backend: Any) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta` by expert, `[S, out]`, in x's type."""
    ends = bounds(offsets, len(x))
    y = x.new_empty((len(x), layer.weight.shape[1]))
    for group in _groups(layer, ends, x.dtype):
        _multiply(x, _stage(group, x.dtype, backend).mT, group, y)
        for _, one, rows in group:
            shift = effective_bias(one.bias, one.gamma, one.beta, x.dtype)
            if shift is not None:
                y[rows] += shift
    y[ends[-1] :] = 0
    return y


def backward(
    grad: Tensor,
    x: Tensor | None,
    layer: Stack,
    offsets: Tensor,
    need_x: bool,
    needs: Needs,
    need_sums: bool,
    backend: Any,
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W G` and `sum_n grad`, in order."""
    ends = bounds(offsets, len(grad))
    experts, out_features, in_features = layer.weight.shape
    dx = grad.new_empty((len(grad), in_features)) if need_x else None
    d_A = _zeros(layer.hut_A) if needs.A and layer.hut_A is not None else None
    d_B = _zeros(layer.hut_B) if needs.B and layer.hut_B is not None else None
    d_gamma, sums = (
        grad.new_zeros((experts, out_features), dtype=acc_dtype(grad.dtype)) if needed else None
        for needed in (needs.gamma, need_sums)
    )
    for group in _groups(layer, ends, grad.dtype):
        if dx is not None:
            _multiply(grad, _stage(group, grad.dtype, backend), group, dx)
        for number, one, rows in group:
            if x is not None and any(needs):
                parts = _grad_factors(grad[rows], x[rows], one, needs, backend)
                for whole, part in zip((d_A, d_B, d_gamma), parts, strict=True):
                    if whole is not None and part is not None:
                        whole[number] = part
            if sums is not None:
                torch.sum(grad[rows], 0, dtype=sums.dtype, out=sums[number])
    if dx is not None:
        dx[ends[-1] :] = 0
    return [made for made in (dx, d_A, d_B, d_gamma, sums) if made is not None]


def _grad_factors(
    grad: Tensor, x: Tensor, one: Layer, needs: Needs, backend: Any
) -> Iterable[Tensor | None]:
    """One expert's `d hut_A`, `d hut_B` and `sum_i W G`, each where it is needed."""
    if backend is torch_backend:
        return torch_backend.grad_factors(grad, x, one, needs, fresh=True)
    made = iter(backend.linear_backward(grad, x, one, False, needs))
    return [next(made) if needed else None for needed in needs]


def _zeros(factor: Tensor) -> Tensor:
    return factor.new_zeros(factor.shape)


def _groups(layer: Stack, ends: list[int], dtype: torch.dtype) -> Iterator[list[Expert]]:
    """The experts that have rows, those together whose weights are staged together."""
    weight, hut_A, hut_B, bias, gamma, beta, spec = layer
    most = 2 * sum(start < end for start, end in pairwise(ends)) > len(weight)
    residual = spec.constant == 1.0 and gamma is None
    if most and residual and dtype == weight.dtype == torch.bfloat16:
        # Once for all experts; the torch backend would cast them to this type one by one.
        hut_A = None if hut_A is None else cast(hut_A, dtype)
        hut_B = None if hut_B is None else cast(hut_B, dtype)
    nothing = (None,) * len(weight)
    stacks = (weight, hut_A, hut_B, bias, gamma, beta)
    columns = (nothing if stack is None else stack.unbind(0) for stack in stacks)
    found = [
        Expert(index, Layer._make((*operands, spec)), slice(start, end))
        for index, (operands, (start, end)) in enumerate(
            zip(zip(*columns, strict=True), pairwise(ends), strict=True)
        )
        if start < end
    ]
    size = planner.group_size(len(weight), weight.device.type)
    return (found[first : first + size] for first in range(0, len(found), size))


def _stage(group: Sequence[Expert], dtype: torch.dtype, backend: Any) -> Tensor:
    """`gamma W` of a group's experts, `[group, out, in]`, with the weight's order of strides."""
    if len(group) == 1:
        return _staged(group[0].layer, dtype, backend)[None]
    first = group[0].layer.weight
    shape = first.shape if first.stride(1) == 1 else first.mT.shape
    workspace = first.new_empty((len(group), *shape), dtype=dtype)
    workspace = workspace if first.stride(1) == 1 else workspace.mT
    for W, one in zip(workspace.unbind(0), group, strict=True):
        W.copy_(_staged(one.layer, dtype, backend))
    return workspace


def _staged(one: Layer, dtype: torch.dtype, backend: Any) -> Tensor:
    if one.hut_A is None or one.hut_B is None:
        return cast(one.weight, dtype)
    if backend is not torch_backend:
        return backend.merged_weight(one, dtype)
    return torch_backend._merged(one, dtype, fresh=True)


def _multiply(x: Tensor, W: Tensor, group: Sequence[Expert], out: Tensor) -> None:
    """Writes `x W` of each expert's rows, W `[group, in, out]`."""
    first, last = group[0].rows.start, group[-1].rows.stop
    if len(group) > 1 and _grouped_mm_fits(x, W):
        ends = [one.rows.stop - first for one in group]
        offs = torch.tensor(ends, dtype=torch.int32, device=x.device)
        out[first:last] = torch._grouped_mm(x[first:last], W, offs=offs)
        return
    for matrix, one in zip(W.unbind(0), group, strict=True):
        part = x[one.rows]
        large = len(part) * matrix.numel() >= _LARGE_PRODUCT
        if large and x.dtype == torch.float32 and onednn.takes(part, matrix):
            out[one.rows] = onednn.linear(part, matrix.t())
        else:
            torch.mm(part, matrix, out=out[one.rows])


def _grouped_mm_fits(x: Tensor, W: Tensor) -> bool:
    """True where `torch._grouped_mm` takes these: no float64, rows at multiples of 16 bytes."""
    if x.dtype == torch.float64 or x.dtype != W.dtype:
        return False
    dense = all(min(t.stride()[-2:]) == 1 and t.data_ptr() % 16 == 0 for t in (x, W))
    steps = (*x.stride(), *W.stride())
    return dense and all(step == 1 or step * x.itemsize % 16 == 0 for step in steps)
