"""The operators on the compiled extension of csrc/: one call for a layer and a direction.

What `ops.py` asks of every backend: forward, backward, weight. What is decided here is decided
by the planner; what is left of the host's work is done in C++ (docs/extension.md).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from . import planner, torch_backend
from .definition import Needs, Spec
from .dispatch import gpu

# Importing it defines torch.ops.hut_cuda; ImportError is for dispatch.py to tell about.
importlib.import_module("hut_kernels._C")
_operators = torch.ops.hut_cuda
# As in ops.py: not differentiable by themselves, and cheaper without autograd's detour.
_library = torch.library.Library("hut_cuda", "IMPL")
for _name in ("forward", "backward", "weight"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


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
    if _empty(x, weight):
        return torch_backend.forward(x, weight, hut_A, hut_B, bias, gamma, beta, spec)
    return _operators.forward.default(
        x, weight, hut_A, hut_B, bias, gamma, beta, *_layout(weight, spec), _split(spec)
    )


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
    if _empty(grad, weight):
        return torch_backend.backward(grad, x, weight, hut_A, hut_B, gamma, spec, need_x, needs)
    layout = _layout(weight, spec)
    rows, columns = weight.shape[::-1] if layout[0] else weight.shape
    chunk, row_spans, column_spans = planner.strips(
        rows, columns, len(hut_A), weight.element_size(), gpu(grad.device)
    )
    return _operators.backward.default(
        grad, x, weight, hut_A, hut_B, gamma, *layout, _split(spec),
        need_x, *needs, chunk, row_spans, column_spans,
    )  # fmt: skip


def weight(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    if _empty(weight, weight):
        return torch_backend.weight(weight, hut_A, hut_B, gamma, spec, dtype)
    return _operators.weight.default(weight, hut_A, hut_B, gamma, *_layout(weight, spec), dtype)


def _empty(moving: Tensor, weight: Tensor) -> bool:
    """Whether there is nothing to launch a kernel for."""
    return moving.numel() == 0 or weight.numel() == 0


def _layout(weight: Tensor, spec: Spec) -> tuple[Any, ...]:
    """`transposed, two_sided, constant, scaling`: whether weight is stored `[in, out]`; T."""
    stride_out, stride_in = weight.stride()
    return stride_out < stride_in, spec.transform == "two_sided", spec.constant, spec.scaling


def _split(spec: Spec) -> bool:
    return spec.precision == "split"
