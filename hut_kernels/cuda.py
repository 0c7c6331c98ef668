"""The operators on the compiled extension of csrc/: one call for a layer and a direction.

What `ops.py` asks of every backend: forward, backward, weight. What is decided here is decided
by the planner; what is left of the host's work is done in C++ (docs/extension.md).
"""

from __future__ import annotations

import functools
import importlib

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
for _name in ("forward", "backward", "group_forward", "group_backward", "weight"):
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
        x, weight, hut_A, hut_B, bias, gamma, beta, *_multiplier(spec), _split(spec)
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
    return _operators.backward.default(
        grad, x, weight, hut_A, hut_B, gamma, *_multiplier(spec), _split(spec),
        need_x, *needs, *_strips(weight, hut_A),
    )  # fmt: skip


def group_forward(
    x: Tensor,
    weights: list[Tensor],
    hut_A: list[Tensor],
    hut_B: list[Tensor],
    bias: list[Tensor | None],
    gamma: list[Tensor | None],
    beta: list[Tensor | None],
    transform: str,
    offset: float,
    scalings: list[float],
) -> Tensor:
    """The outputs of several layers that read x, side by side: one weight kernel, one product."""
    two_sided, constant, _ = _multiplier(Spec(transform, offset))
    return _operators.group_forward.default(
        x, weights, hut_A, hut_B, bias, gamma, beta, two_sided, constant, scalings
    )


def group_backward(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor],
    hut_A: list[Tensor],
    hut_B: list[Tensor],
    gamma: list[Tensor | None],
    transform: str,
    offset: float,
    scalings: list[float],
    need_x: bool,
    need_A: list[bool],
    need_B: list[bool],
    need_gamma: list[bool],
) -> list[Tensor]:
    """One dx of all the layers, where asked for; then each layer's gradients as in `backward`."""
    two_sided, constant, _ = _multiplier(Spec(transform, offset))
    strips = zip(*map(_strips, weights, hut_A), strict=True)
    return _operators.group_backward.default(
        grad, x, weights, hut_A, hut_B, gamma, two_sided, constant, scalings,
        need_x, need_A, need_B, need_gamma, *strips,
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
    return _operators.weight.default(weight, hut_A, hut_B, gamma, *_multiplier(spec), dtype)


def _empty(moving: Tensor, weight: Tensor) -> bool:
    """Whether there is nothing to launch a kernel for."""
    return moving.numel() == 0 or weight.numel() == 0


def _strips(weight: Tensor, hut_A: Tensor) -> tuple[int, int, int]:
    """`chunk, row_spans, column_spans`: how the reduction of G is divided."""
    layout = (*weight.shape, *weight.stride())
    return _strips_of(*layout, hut_A.shape[0], weight.element_size(), weight.device)


@functools.lru_cache(maxsize=4096)
def _strips_of(
    O: int, K: int, stride_o: int, stride_k: int, r: int, weight_item: int, device: torch.device
) -> tuple[int, int, int]:
    rows, columns = (K, O) if stride_o < stride_k else (O, K)  # as the weight is stored
    return planner.strips(rows, columns, r, weight_item, gpu(device))


def _multiplier(spec: Spec) -> tuple[bool, float, float]:
    """`two_sided, constant, scaling`: what T is."""
    return spec.transform == "two_sided", spec.constant, spec.scaling


def _split(spec: Spec) -> bool:
    return spec.precision == "split"
