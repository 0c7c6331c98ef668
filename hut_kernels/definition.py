"""What a HUT layer computes in plain differentiable PyTorch: the oracle, and `fused=False`.

The formulas are those of docs/definition.md; every other implementation is checked against it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TRANSFORMS = ("low_rank", "two_sided")
PRECISIONS = ("merged", "split")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)


class Spec(NamedTuple):
    """The options that decide the mathematics.

    Attributes:
        transform: `"low_rank"` (`T = offset + scaling * hut_B @ hut_A`) or `"two_sided"`
            (`T[o, i] = hut_B[o, q(i)] * hut_A[p(o), i]`).
        offset: 1 for the residual form, 0 for the direct one; 1, without effect, in `two_sided`.
        scaling: factor of the product; 1 with `two_sided`.
        precision: `"merged"` rounds W once; `"split"` keeps `W0 * (T - 1)` apart from W0.
    """

    transform: str = "low_rank"
    offset: float = 1.0
    scaling: float = 1.0
    precision: str = "merged"

    @property
    def constant(self) -> float:
        """The part of T that the factors do not touch: `offset`, and 0 in `two_sided`."""
        return self.offset if self.transform == "low_rank" else 0.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of multipliers and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`; a tenth of its host time where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., size]` as `[N, size]`; unlike `reshape(-1, size)` also where size is 0."""
    if tensor.ndim == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def group_starts(size: int, r: int) -> list[int]:
    """Where each of the r balanced groups of `size` indices begins, and `size` at the end.

    Group k holds the indices i with `i * r // size == k`.
    """
    return [-(-k * size // r) for k in range(r + 1)]


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


def merged_weight(
    weight: Tensor, hut_A: Tensor, hut_B: Tensor, spec: Spec, gamma: Tensor | None = None
) -> Tensor:
    """`gamma[:, None] * (W0 * T)`, `[out, in]`, not rounded: float32, or float64 where one is."""
    dtype = common_type(weight, hut_A, hut_B)
    merged = weight.to(dtype) * multiplier(hut_A.to(dtype), hut_B.to(dtype), spec)
    return merged if gamma is None else gamma.to(dtype)[:, None] * merged


def linear(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
) -> Tensor:
    """`y = gamma * (x (W0 * T)^T + bias) + beta`, `[..., out_features]`, in x's type.

    W is formed in float32 (float64 for float64) and rounded once to x's type; `split` rounds
    W0 and `W0 * (T - 1)` each.
    """
    dtype = common_type(x, weight, hut_A, hut_B)
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


def merged_bias(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """`gamma * bias + beta`, `[out_features]`, rounded once to `dtype`; None where it is zero."""
    if gamma is beta is None:
        return bias if bias is None else cast(bias, dtype)
    if bias is None:
        return beta if beta is None else cast(beta, dtype)
    acc = common_type(bias) if dtype != torch.float64 else dtype
    shifted = bias.to(acc)
    if gamma is not None:
        shifted = gamma.to(acc) * shifted
    if beta is not None:
        shifted = shifted + beta.to(acc)
    return shifted.to(dtype)


class Needs(NamedTuple):
    """Which of the factor gradients are asked for."""

    A: bool
    B: bool
    gamma: bool

    @property
    def P(self) -> bool:
        """Whether P is needed, from which both d hut_B and d gamma come."""
        return self.B or self.gamma


FactorGrads = tuple[Tensor | None, Tensor | None, Tensor | None]


def finish_factor_grads(
    Q: Tensor | None,
    P: Tensor | None,
    row_sums: Tensor | None,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    needs: Needs,
) -> FactorGrads:
    """From the reductions of `H0 = G * W0` to the gradients, each in its parameter's type.

    Args:
        Q: `[r, in]`, `dL/d hut_A` but for `scaling` (gamma is already in it).
        P: `[out, r]`, `dL/d hut_B` but for `scaling` and gamma.
        row_sums: `[out]`, `sum_i H0[o, i]`; needed for d gamma where `spec.constant` is not 0.

    Returns:
        `d hut_A`, `d hut_B` and `sum_i W[o, i] G[o, i]`, the part of d gamma that holds G:
        `sum_i H0 T = constant * sum_i H0 + scaling * sum_k hut_B * P` in both transforms, so it
        costs no further pass.
    """
    d_A = d_B = d_gamma = None
    if Q is not None and needs.A:
        d_A = cast(_scaled(Q, spec.scaling), hut_A.dtype)
    if P is not None and needs.gamma:
        acc = common_type(P)
        d_gamma = _scaled((cast(P, acc) * cast(hut_B, acc)).sum(1), spec.scaling)
        if row_sums is not None:
            d_gamma = d_gamma + spec.constant * row_sums
    if P is not None and needs.B:
        d_B = P if gamma is None else P * gamma[:, None]
        d_B = cast(_scaled(d_B, spec.scaling), hut_B.dtype)
    return d_A, d_B, d_gamma


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1.0 else tensor * scaling


def common_type(*tensors: Tensor) -> torch.dtype:
    """The accumulation type of several tensors: float64 where any is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
