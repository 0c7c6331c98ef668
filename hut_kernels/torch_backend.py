"""The operators in PyTorch: the CPU fallback, and any device without kernels of ours.

W is built once a pass into one buffer. G, and any multiplier that is not W's own buffer, exist a
block of rows at a time, so that beside W no more than `_BLOCK` elements are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import definition
from .definition import FactorGrads, Needs, Spec, cast

# Elements of a row block: large enough for its product to run at full speed, small enough for a
# 4096 x 4096 layer to need a quarter of a weight beside W.
_BLOCK = 1 << 22

Maker = Callable[[float], Tensor]


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
    make = _maker(weight, hut_A, hut_B, gamma, spec, x.dtype)
    return staged_forward(x, weight, bias, gamma, beta, spec, make)


def grad_input(
    grad: Tensor, weight: Tensor, hut_A: Tensor, hut_B: Tensor, gamma: Tensor | None, spec: Spec
) -> Tensor:
    """`dx = (gamma * grad) W`, `[..., in]`, in grad's type."""
    make = _maker(weight, hut_A, hut_B, gamma, spec, grad.dtype)
    return staged_grad_input(grad, weight, gamma, spec, make)


def staged_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
    make: Maker,
) -> Tensor:
    """The forward as products with stored matrices: `x (gamma W)^T + (gamma bias + beta)`.

    `make(minus)` gives `gamma (W0 * (T - minus))` in x's type.
    """
    shift = definition.merged_bias(bias, gamma, beta, x.dtype)
    if spec.precision == "split":
        y = F.linear(x, _scaled_base(weight, gamma, x.dtype), shift)
        return y.add_(F.linear(x, make(1.0)))
    return F.linear(x, make(0.0), shift)


def staged_grad_input(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, spec: Spec, make: Maker
) -> Tensor:
    """The input gradient as products with stored matrices: `grad (gamma W)`."""
    if spec.precision == "split":
        dx = grad @ _scaled_base(weight, gamma, grad.dtype)
        return dx.add_(grad @ make(1.0))
    return grad @ make(0.0)


def weight(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    return _blockwise(weight, hut_A, hut_B, gamma, spec, dtype, minus=0.0)


def grad_factors(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    needs: Needs,
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, each where it is needed."""
    if x.dim() != 2:
        x, grad = definition.as_rows(x), definition.as_rows(grad)
    # bf16 has the range of float32, so G may be rounded to it once; in fp16 G would overflow.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    acc = definition.wide(dtype)
    x, grad_t = cast(x, dtype), cast(grad, dtype).t()
    A, B = cast(hut_A, dtype), cast(hut_B, dtype)
    if gamma is not None:
        B = (cast(hut_B, acc) * gamma[:, None]).to(dtype)
    reduce = _reduce_low_rank if spec.transform == "low_rank" else _reduce_two_sided
    parts = []
    for rows in _row_blocks(weight):
        H0 = torch.mm(_take(grad_t, rows), x)  # [rows, in]: G here, G * W0 from the next line on
        W0 = _take(weight, rows)
        H0 = H0.mul_(W0) if W0.dtype == dtype else H0 * cast(W0, dtype)
        Q, P = reduce(H0, A, _take(B, rows), rows, len(weight), needs)
        row_sums = H0.sum(1, dtype=acc) if needs.gamma and spec.constant else None
        parts.append((Q, P, row_sums))
        del H0
    Q, P, row_sums = parts[0] if len(parts) == 1 else _join(parts, acc)
    return definition.finish_factor_grads(Q, P, row_sums, hut_A, hut_B, gamma, spec, needs)


def _reduce_low_rank(
    H0: Tensor, A: Tensor, gamma_B: Tensor, rows: slice | None, out_features: int, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """`Q = (gamma B)^T H0`, `[r, in]`, and `P = H0 A^T`, `[rows, r]`."""
    Q = torch.mm(gamma_B.t(), H0) if needs.A else None
    P = F.linear(H0, A) if needs.B or needs.gamma else None
    return Q, P


def _reduce_two_sided(
    H0: Tensor, A: Tensor, gamma_B: Tensor, rows: slice | None, out_features: int, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """`Q[k, i] = sum_{p(o)=k} H0 gamma B[o, q(i)]` and `P[o, k] = sum_{q(i)=k} H0 A[p(o), i]`."""
    r, in_features = A.shape
    p, q = _groups(rows, out_features, A)
    Q = P = None
    acc = definition.wide(A.dtype)
    if needs.A:
        Q = torch.zeros_like(A, dtype=acc)
        Q.index_add_(0, p, (H0 * gamma_B.index_select(1, q)).to(acc))
    if needs.B or needs.gamma:
        product = H0 * A.index_select(0, p)
        groups = pairwise(definition.group_starts(in_features, r))
        P = torch.stack([product[:, a:b].sum(1, dtype=acc) for a, b in groups], dim=1)
    return Q, P


def _join(parts: list, dtype: torch.dtype) -> FactorGrads:
    """The row blocks' Q added, in order; their P and row sums one below the other."""
    columns = zip(*parts, strict=True)
    Q, P, row_sums = ([part for part in column if part is not None] for column in columns)
    return (
        torch.stack(Q).sum(0, dtype=dtype) if Q else None,
        torch.cat(P) if P else None,
        torch.cat(row_sums) if row_sums else None,
    )


def _scaled_base(weight: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`gamma W0`, the first matrix of `split`: W0 itself where nothing has to change."""
    if gamma is None:
        return cast(weight, dtype)
    return (cast(weight, definition.wide(dtype)) * gamma[:, None]).to(dtype)


def _maker(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
) -> Maker:
    """How `gamma (W0 * (T - minus))` is made; the residual form as `W0 + W0 * m` in m's buffer.

    The increment m may be formed in bf16 (its error stays relative to itself), but not in fp16,
    where small factors would underflow.
    """

    def make(minus: float) -> Tensor:
        residual = spec.constant == 1.0 and minus == 0.0 and gamma is None
        if not residual or weight.dtype != dtype or dtype == torch.float16:
            return _blockwise(weight, hut_A, hut_B, gamma, spec, dtype, minus)
        A, B = cast(hut_A, dtype), cast(hut_B, dtype)
        # m gets weight's strides: a transposed weight (Conv1D) is met by a transposed product.
        m = torch.mm(B, A) if weight.stride(1) == 1 else torch.mm(A.t(), B.t()).t()
        return torch.addcmul(weight, weight, m, value=spec.scaling, out=m)

    return make


def _blockwise(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
    minus: float,
) -> Tensor:
    """`gamma (W0 * (T - minus))` formed in float32 or float64, rounded once to `dtype`."""
    acc = dtype if dtype == torch.float64 else definition.common_type(weight, hut_A, hut_B)
    A, B = cast(hut_A, acc), cast(hut_B, acc)
    out = torch.empty_like(weight, dtype=dtype)
    for rows in _row_blocks(weight):
        if spec.transform == "low_rank":
            T = torch.mm(_take(B, rows), A).mul_(spec.scaling)
        else:
            p, q = _groups(rows, len(weight), A)
            T = _take(B, rows).index_select(1, q).mul_(A.index_select(0, p))
        if spec.constant != minus:
            T += spec.constant - minus
        if gamma is not None:
            T *= _take(gamma, rows)[:, None]
        torch.mul(_take(weight, rows), T, out=_take(out, rows))
    return out


def _groups(rows: slice | None, out_features: int, A: Tensor) -> tuple[Tensor, Tensor]:
    """The group p of each of `rows`, and the group q of each column."""
    r, in_features = A.shape
    p = definition.group_index(out_features, r, A.device)
    return _take(p, rows), definition.group_index(in_features, r, A.device)


def _row_blocks(weight: Tensor) -> Sequence[slice | None]:
    """Row slices of `_BLOCK` elements; None, "all rows", where one block is enough."""
    if weight.numel() <= _BLOCK:
        return (None,)
    rows, columns = weight.shape
    step = max(1, _BLOCK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _take(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]
