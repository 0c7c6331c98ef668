"""The operators where both Triton and the extension run: each call goes where the planner says.

The choice depends on the number of tokens, so it is made here, in
the operators, and not where a backend is named: there it would be a guard under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import cuda, planner
from .definition import Needs, Spec, as_rows
from .triton import backend as triton_backend


def forward(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
    layer = weight, hut_A, hut_B
    (winner,) = _winners(("forward",), x, x, *layer, spec)
    return winner.forward(x, *layer, bias, gamma, beta, spec)


def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    need_x: bool,
    needs: Needs,
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
    parts = "grad_input", "grad_factors"
    of_x, of_factors = _winners(parts, grad if x is None else x, grad, weight, hut_A, hut_B, spec)
    layer = weight, hut_A, hut_B, gamma, spec
    if not (need_x and any(needs)) or of_x is of_factors:
        return (of_x if need_x else of_factors).backward(grad, x, *layer, need_x, needs)
    dx = of_x.backward(grad, None, *layer, True, Needs(False, False, False))
    return dx + of_factors.backward(grad, x, *layer, False, needs)


def weight(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    return cuda.weight(weight, hut_A, hut_B, gamma, spec, dtype)


def _winners(
    parts: Sequence[str],
    x: Tensor,
    moving: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    spec: Spec,
) -> list[ModuleType]:
    """Who makes each of the parts. A small layer is not planned at all: that would take longer."""
    if planner.launch_bound(*weight.shape):
        return [cuda] * len(parts)
    plan = triton_backend.plan_of(as_rows(x), as_rows(moving), weight, hut_A, hut_B, spec)
    return [cuda if planner.extension_wins(part, plan) else triton_backend for part in parts]
