"""The grouped operators: experts staged one group after the other, by any backend.

Only experts that have rows are staged, into one workspace of a quarter of the stack or of one
expert, and G exists for a group at a time. On a CPU a group is one expert. On a GPU the offsets are
read once a direction, which waits for the device: the host must know which experts have rows to
stage no others, and from which row a group's product starts, for the grouped GEMM starts at row 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn, planner, torch_backend
from .layer import FactorGrads, Layer, Needs, Spec, acc_dtype, cast, effective_bias

_Result = TypeVar("_Result")


class Stack(NamedTuple):
    """A stack of experts' operands, `[experts, ...]` each; without factors a plain product's."""

    weight: Tensor
    hut_A: Tensor | None
    hut_B: Tensor | None
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    spec: Spec


class Group(NamedTuple):
    """Experts with rows that are staged together: neighbors but for those without.

    Attributes:
        experts: Their numbers in the stack.
        rows: Each one's rows.
        numbers: The numbers on the stack's device, int64; None for one expert by itself.
        ends: The end of each one's rows, counted from the group's first, int32; likewise.
    """

    experts: Sequence[int]
    rows: Sequence[slice]
    numbers: Tensor | None = None
    ends: Tensor | None = None

    @property
    def run(self) -> slice:
        """The rows of all."""
        return slice(self.rows[0].start, self.rows[-1].stop)


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
    shift = effective_bias(layer.bias, layer.gamma, layer.beta, x.dtype)

    def run(passes: _Kernels | _OneByOne) -> Tensor:
        for group in _groups(offsets, ends, passes.size):
            _multiply(x, passes.stage(group).mT, group, y)
            if shift is not None:
                for expert, rows in zip(group.experts, group.rows, strict=True):
                    y[rows] += shift[expert]
        y[ends[-1] :] = 0
        return y

    return _with_passes(run, layer, x.dtype, ends, backend, x)


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
    sums = None
    if need_sums:
        sums = grad.new_zeros((experts, out_features), dtype=acc_dtype(grad.dtype))

    def run(passes: _Kernels | _OneByOne) -> list[Tensor]:
        if x is not None and any(needs):
            passes.start_reduction(grad, x, needs)
        for group in _groups(offsets, ends, passes.size):
            if dx is not None:
                _multiply(grad, passes.stage(group), group, dx)
            if x is not None and any(needs):
                passes.reduce(grad, x, group)
            if sums is not None:
                for expert, rows in zip(group.experts, group.rows, strict=True):
                    torch.sum(grad[rows], 0, dtype=sums.dtype, out=sums[expert])
        if dx is not None:
            dx[ends[-1] :] = 0
        factors = passes.finish_reduction() if x is not None and any(needs) else ()
        return [made for made in (dx, *factors, sums) if made is not None]

    return _with_passes(run, layer, grad.dtype, ends, backend, grad, x)


def _groups(offsets: Tensor, ends: list[int], size: int | None) -> list[Group]:
    """The experts that have rows, by `size` of them; each by itself without a size."""
    found = [(n, slice(*span)) for n, span in enumerate(pairwise(ends)) if span[0] < span[1]]
    if size is None:
        return [Group((expert,), (rows,)) for expert, rows in found]
    # On the device itself: a copy from the host would wait for all that is enqueued.
    idle = offsets == F.pad(offsets[:-1], (1, 0))
    numbers = torch.argsort(idle.int(), stable=True)[: len(found)]
    stops = offsets[numbers]
    groups = []
    for first in range(0, len(found), size):
        experts, rows = zip(*found[first : first + size], strict=True)
        here = slice(first, first + len(experts))
        groups.append(Group(experts, rows, numbers[here], stops[here] - rows[0].start))
    return groups


def _with_passes(
    run: Callable[[_Kernels | _OneByOne], _Result],
    layer: Stack,
    dtype: torch.dtype,
    ends: list[int],
    backend: Any,
    *activations: Tensor | None,
) -> _Result:
    """Runs a direction by kernels over groups, where the backend has them, or one by one."""
    if layer.hut_A is None or not hasattr(backend, "over_experts"):
        return run(_OneByOne(layer, dtype, ends, backend))

    def with_kernels(kernels: Any) -> _Result:
        if kernels is None:
            return run(_OneByOne(layer, dtype, ends, torch_backend))
        return run(_Kernels(kernels, layer, dtype))

    return backend.over_experts(with_kernels, Layer._make(layer), *activations)


class _Kernels:
    """The passes by a backend's kernels over a stack, a launch for each group."""

    def __init__(self, kernels: Any, layer: Stack, dtype: torch.dtype) -> None:
        self.kernels, self.dtype = kernels, dtype
        self.size = planner.group_size(len(layer.weight), kernels.plan.device.arch)

    def stage(self, group: Group) -> Tensor:
        """`gamma W`, `[group, out, in]`, with the weight's order of strides."""
        return self.kernels.stage(self.dtype, group.numbers)

    def start_reduction(self, grad: Tensor, x: Tensor, needs: Needs) -> None:
        """Makes place for the factor gradients, and for G where it is wider than W."""
        if not _gram_is_grouped(grad, x):
            self.size = max(1, self.size * x.itemsize // 4)
        self.kernels.start_reduction(self.dtype, needs, self.size)

    def reduce(self, grad: Tensor, x: Tensor, group: Group) -> None:
        """Makes G of a group, and its factor gradients of that."""
        if _gram_is_grouped(grad, x):
            left, right = grad[group.run].t(), x[group.run]
            G = torch._grouped_mm(left, right, offs=group.ends)
        else:
            G = x.new_empty((len(group.rows), grad.shape[1], x.shape[1]), dtype=torch.float32)
            for matrix, rows in zip(G.unbind(0), group.rows, strict=True):
                self.kernels.gram(grad[rows], x[rows], out=matrix)
        self.kernels.reduce(G, group.numbers)

    def finish_reduction(self) -> FactorGrads:
        """`d hut_A`, `d hut_B` and `sum_i W G` of all experts, each where it is needed."""
        return self.kernels.finish_reduction()


class _OneByOne:
    """The passes by a backend's operators, an expert after the other; without factors W is W0."""

    def __init__(self, layer: Stack, dtype: torch.dtype, ends: list[int], backend: Any) -> None:
        self.stack, self.dtype, self.backend = layer, dtype, backend
        weight, hut_A, hut_B, *vectors, spec = layer
        size = planner.group_size(len(weight), weight.device.type)
        self.size = size if size > 1 else None
        most = 2 * sum(start < end for start, end in pairwise(ends)) > len(weight)
        residual = spec.constant == 1.0 and layer.gamma is None
        if most and residual and dtype == weight.dtype == torch.bfloat16:
            # Once for all experts; the torch backend would cast them to this type one by one.
            hut_A = None if hut_A is None else cast(hut_A, dtype)
            hut_B = None if hut_B is None else cast(hut_B, dtype)
        nothing = (None,) * len(weight)
        stacks = (weight, hut_A, hut_B, *vectors)
        columns = (nothing if stack is None else stack.unbind(0) for stack in stacks)
        self.layers = [Layer._make((*one, spec)) for one in zip(*columns, strict=True)]

    def stage(self, group: Group) -> Tensor:
        """`gamma W`, `[group, out, in]` or of one by itself, with the weight's order of strides."""
        if len(group.experts) == 1:
            W = self._staged(self.layers[group.experts[0]])
            return W if group.ends is None else W[None]
        weight = self.stack.weight[: len(group.experts)]
        workspace = torch.empty_like(weight, dtype=self.dtype)
        for W, expert in zip(workspace.unbind(0), group.experts, strict=True):
            self._staged(self.layers[expert], W)
        return workspace

    def _staged(self, one: Layer, out: Tensor | None = None) -> Tensor:
        """`gamma W` of an expert, in `out` where that is given."""
        if one.hut_A is not None and self.backend is torch_backend:
            return torch_backend._merged(one, self.dtype, fresh=out is None, out=out)
        if one.hut_A is None:
            W = cast(one.weight, self.dtype)
        else:
            W = self.backend.merged_weight(one, self.dtype)
        return W if out is None else out.copy_(W)

    def start_reduction(self, grad: Tensor, x: Tensor, needs: Needs) -> None:
        """Makes place for the factor gradients: zeros, for experts without rows."""
        weight, hut_A, hut_B = self.stack[:3]
        assert hut_A is not None
        assert hut_B is not None
        self.needs = needs
        acc = acc_dtype(self.dtype)
        self.grads = (
            torch.zeros_like(hut_A) if needs.A else None,
            torch.zeros_like(hut_B) if needs.B else None,
            weight.new_zeros(weight.shape[:2], dtype=acc) if needs.gamma else None,
        )

    def reduce(self, grad: Tensor, x: Tensor, group: Group) -> None:
        """Makes G of each expert, and its factor gradients of that."""
        for expert, rows in zip(group.experts, group.rows, strict=True):
            parts = self._reduced(grad[rows], x[rows], self.layers[expert])
            for whole, part in zip(self.grads, parts, strict=True):
                if whole is not None and part is not None:
                    whole[expert] = part

    def _reduced(self, grad: Tensor, x: Tensor, one: Layer) -> Iterable[Tensor | None]:
        if self.backend is torch_backend:
            return torch_backend.grad_factors(grad, x, one, self.needs)
        made = iter(self.backend.linear_backward(grad, x, one, False, self.needs))
        return [next(made) if needed else None for needed in self.needs]

    def finish_reduction(self) -> FactorGrads:
        """`d hut_A`, `d hut_B` and `sum_i W G` of all experts, each where it is needed."""
        return self.grads


def _gram_is_grouped(grad: Tensor, x: Tensor) -> bool:
    """True where one grouped GEMM makes every G: in bf16, which has float32's range.

    In other types G is float32, made one after the other.
    """
    return x.dtype == torch.bfloat16 and _grouped_mm_fits(grad.t(), x)


def _multiply(x: Tensor, W: Tensor, group: Group, out: Tensor) -> None:
    """Writes `x W` of each expert's rows, W `[group, in, out]`, or of one by itself."""
    if group.ends is not None and _grouped_mm_fits(x, W):
        out[group.run] = torch._grouped_mm(x[group.run], W, offs=group.ends)
        return
    matrices = (W,) if group.ends is None else W.unbind(0)
    for matrix, rows in zip(matrices, group.rows, strict=True):
        part = x[rows]
        if onednn.is_widened(part):
            onednn.multiply_widened(part.float(), matrix, out[rows])
        else:
            torch.mm(part, matrix, out=out[rows])


def _grouped_mm_fits(x: Tensor, W: Tensor) -> bool:
    """True where `torch._grouped_mm` takes these: no float64, rows at multiples of 16 bytes."""
    if x.dtype == torch.float64 or x.dtype != W.dtype:
        return False
    dense = all(min(t.stride()[-2:]) == 1 and t.data_ptr() % 16 == 0 for t in (x, W))
    steps = (*x.stride(), *W.stride())
    return dense and all(step == 1 or step * x.itemsize % 16 == 0 for step in steps)
