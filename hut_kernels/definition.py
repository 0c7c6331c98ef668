"""A HUT layer in plain differentiable PyTorch: the oracle, and `fused=False`.

The formulas are those of docs/definition.md; every other implementation is checked against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer, Spec, acc_dtype


def group_index(size: int, r: int, device: torch.device | None = None) -> Tensor:
    """`q(i)` (or `p(o)`): the group of each index, `floor(i * r / size)`, int64 `[size]`."""
    return torch.arange(size, device=device) * r // size


def multiplier(hut_A: Tensor, hut_B: Tensor, spec: Spec) -> Tensor:
    """`T`, `[out_features, in_features]`, in the factors' common type."""
    if spec.transform == "low_rank":
        return spec.offset + spec.scaling * (hut_B @ hut_A)
    return _two_sided(hut_A, hut_B)


def increment(hut_A: Tensor, hut_B: Tensor, spec: Spec) -> Tensor:
    """`T - 1`, `[out_features, in_features]`, without cancellation where T is `1 + m`."""
    if spec.transform == "low_rank":
        return (spec.offset - 1.0) + spec.scaling * (hut_B @ hut_A)
    return _two_sided(hut_A, hut_B) - 1.0


def _two_sided(hut_A: Tensor, hut_B: Tensor) -> Tensor:
    r, in_features = hut_A.shape
    out_features = hut_B.shape[0]
    q = group_index(in_features, r, hut_A.device)
    p = group_index(out_features, r, hut_A.device)
    return hut_B.index_select(1, q) * hut_A.index_select(0, p)


def linear(x: Tensor, layer: Layer) -> Tensor:
    """`y = gamma * (x (W0 * T)^T + bias) + beta`, `[..., out_features]`, in x's type.

    W is formed in float32 (float64 for float64) and rounded once to x's type; `split` rounds
    W0 and `W0 * (T - 1)` each.
    """
    weight, hut_A, hut_B, bias, gamma, beta, spec = layer
    dtype = acc_dtype(x.dtype, weight.dtype, hut_A.dtype, hut_B.dtype)
    factors = hut_A.to(dtype), hut_B.to(dtype)
    if spec.precision == "split":
        update = (weight.to(dtype) * increment(*factors, spec)).to(x.dtype)
        y = F.linear(x, weight.to(x.dtype)) + F.linear(x, update)
    else:
        y = F.linear(x, (weight.to(dtype) * multiplier(*factors, spec)).to(x.dtype))
    if bias is gamma is beta is None:
        return y
    y = y.to(dtype)
    if bias is not None:
        y = y + bias
    if gamma is not None:
        y = gamma * y
    if beta is not None:
        y = y + beta
    return y.to(x.dtype)
