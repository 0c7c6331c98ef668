"""The operators where both Triton and the extension run: each call goes where the planner says.

The choice depends on the number of tokens, so it is made here, in
the operators, and not where a backend is named: there it would be a guard under `torch.compile`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import cuda, planner
from .definition import Needs, Spec
from .dispatch import gpu
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
    return _winner("forward", x, weight).forward(x, weight, hut_A, hut_B, bias, gamma, beta, spec)


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
    of_x, of_factors = (_winner(part, grad, weight) for part in ("grad_input", "grad_factors"))
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


def _winner(part: str, moving: Tensor, weight: Tensor) -> ModuleType:
    O, K = weight.shape
    tokens = moving.numel() // max(1, moving.shape[-1])
    wins = planner.extension_wins(part, tokens, O, K, gpu(moving.device))
    return cuda if wins else triton_backend
