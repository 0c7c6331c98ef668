"""A HUT layer's operands in one tuple, and the few functions that every backend needs of them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRANSFORMS = ("low_rank", "two_sided")
PRECISIONS = ("merged", "split")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")


class Spec(NamedTuple):
    """The options that decide the mathematics.

    Attributes:
        transform: `"low_rank"` (`T = offset + scaling * hut_B @ hut_A`) or `"two_sided"`
            (`T[o, i] = hut_B[o, q(i)] * hut_A[p(o), i]`).
        offset: 1 for the residual form, 0 for the direct one; 1, without effect, in `two_sided`.
        scaling: Factor of the product; 1 with `two_sided`.
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


class Layer(NamedTuple):
    """The operands and options of a call, apart from its activations.

    A stack of experts has a first dimension more in each operand.

    Attributes:
        weight: The frozen weight W0, `[out_features, in_features]`: a tensor of any strides, or a
            `formats.Stored`, which has a tensor's shape, dtype and device.
        hut_A: `[r, in_features]`.
        hut_B: `[out_features, r]`.
        bias: `[out_features]` or None; None in backward.
        gamma: `[out_features]` or None.
        beta: `[out_features]` or None; None in backward.
        spec: The options.
    """

    weight: Any
    hut_A: Tensor
    hut_B: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    spec: Spec = Spec()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`out_features, in_features, r`: O, K and r of the kernels."""
        r, K = self.hut_A.shape[-2:]
        return self.hut_B.shape[-2], K, r

    @property
    def transposed(self) -> Layer:
        """The layer of `W^T`: factors and groups change places, in both transforms.

        bias, gamma and beta stay `[out_features]` of this layer, its `in_features`.
        """
        return self._replace(weight=self.weight.t(), hut_A=self.hut_B.t(), hut_B=self.hut_A.t())


class Needs(NamedTuple):
    """The factor gradients that are asked for."""

    A: bool
    B: bool
    gamma: bool

    @property
    def P(self) -> bool:
        """True where P is needed, from which both d hut_B and d gamma come."""
        return self.B or self.gamma


FactorGrads = tuple[Tensor | None, Tensor | None, Tensor | None]


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type of multipliers and sums: float64 where any of the types is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`; a tenth of its host time where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., size]` as `[N, size]`; unlike `reshape(-1, size)` also where size is 0."""
    if tensor.ndim == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def effective_bias(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """`gamma * bias + beta`, `[out_features]`, rounded once to `dtype`; None where it is zero."""
    if gamma is beta is None:
        return bias if bias is None else cast(bias, dtype)
    if bias is None:
        return beta if beta is None else cast(beta, dtype)
    acc = acc_dtype(bias.dtype, dtype)
    total = cast(bias, acc)
    if gamma is not None:
        total = cast(gamma, acc) * total
    if beta is not None:
        total = total + cast(beta, acc)
    return cast(total, dtype)


def finish_factor_grads(
    Q: Tensor | None, P: Tensor | None, row_sums: Tensor | None, layer: Layer, needs: Needs
) -> FactorGrads:
    """The factor gradients, each in its parameter's type, from the reductions of `H0 = G * W0`.

    Args:
        Q: `[r, in]`, `dL/d hut_A` but for `scaling` (gamma is already in it).
        P: `[out, r]`, `dL/d hut_B` but for `scaling` and gamma.
        row_sums: `[out]`, `sum_i H0[o, i]`; needed for d gamma where `spec.constant` is not 0.
        layer: The layer.
        needs: The gradients asked for.

    Returns:
        `d hut_A`, `d hut_B` and `sum_i W[o, i] G[o, i]`, the part of d gamma that holds G:
        `sum_i H0 T = constant * sum_i H0 + scaling * sum_k hut_B * P` in both transforms, so it
        costs no further pass.
    """
    _, hut_A, hut_B, _, gamma, _, spec = layer
    d_A = d_B = d_gamma = None
    if Q is not None and needs.A:
        d_A = cast(_scaled(Q, spec.scaling), hut_A.dtype)
    if P is not None and needs.gamma:
        acc = acc_dtype(P.dtype)
        d_gamma = _scaled((cast(P, acc) * cast(hut_B, acc)).sum(-1), spec.scaling)
        if row_sums is not None:
            d_gamma = d_gamma + spec.constant * row_sums
    if P is not None and needs.B:
        d_B = P if gamma is None else P * gamma[..., None]
        d_B = cast(_scaled(d_B, spec.scaling), hut_B.dtype)
    return d_A, d_B, d_gamma


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return tensor if scaling == 1.0 else cast(tensor, acc_dtype(tensor.dtype)) * scaling
