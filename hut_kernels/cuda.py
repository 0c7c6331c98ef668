"""The operators on the compiled extension of csrc/: one call for a layer and a direction.

The planner decides what is decided here; the rest of the host's work is done in C++
(docs/extension.md).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import planner
from .devices import gpu
from .layer import Layer, Needs
from .rules import undifferentiated

# Importing it defines torch.ops.hut_cuda; ImportError is for dispatch.py to tell about.
importlib.import_module("hut_kernels._C")
_operators = torch.ops.hut_cuda
_library = torch.library.Library("hut_cuda", "IMPL")


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_operators, name).default(*args)


# As ops.py's, which call these from below autograd's key: differentiated by themselves they raise.
for _name in ("forward", "backward", "weight"):
    _library.impl(_name, undifferentiated(_operator(_name)), "Autograd")


def linear_forward(x: Tensor, layer: Layer) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
    return _operators.forward.default(x, *layer[:6], *_multiplier(layer), _split(layer))


def linear_backward(
    grad: Tensor, x: Tensor | None, layer: Layer, need_x: bool, needs: Needs
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
    return _operators.backward.default(
        grad, x, *layer[:3], layer.gamma, *_multiplier(layer), _split(layer),
        need_x, *needs, *_splits(layer),
    )  # fmt: skip


def merged_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    return _operators.weight.default(*layer[:3], layer.gamma, *_multiplier(layer), dtype)


def _splits(layer: Layer) -> tuple[int, int, int]:
    """`chunk, row_splits, column_splits`: how the reduction of G is divided."""
    weight = layer.weight
    return _splits_of(*layer.sizes, *weight.stride(), weight.element_size(), weight.device)


@functools.lru_cache(maxsize=4096)
def _splits_of(
    O: int, K: int, r: int, stride_o: int, stride_k: int, weight_item: int, device: torch.device
) -> tuple[int, int, int]:
    rows, columns = (K, O) if stride_o < stride_k else (O, K)  # as the weight is stored
    return planner.reduction_splits(rows, columns, r, weight_item, gpu(device))


def _multiplier(layer: Layer) -> tuple[bool, float, float]:
    """`two_sided, constant, scaling`: what T is."""
    spec = layer.spec
    return spec.transform == "two_sided", spec.constant, spec.scaling


def _split(layer: Layer) -> bool:
    return layer.spec.precision == "split"
