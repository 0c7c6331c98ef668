"""The operators in PyTorch: the CPU fallback, and any device without kernels of ours.

W is built once a pass into one buffer. G, and any multiplier that is not W's own buffer, exist some
rows at a time, so that beside W no more than `_BLOCK` elements are alive.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .definition import group_index
from .formats import Stored
from .formats.base import buffer
from .layer import (
    FactorGrads,
    Layer,
    Needs,
    acc_dtype,
    as_rows,
    cast,
    effective_bias,
    finish_factor_grads,
)

# Elements of a row block: large enough for its product to run at full speed, small enough for a
# 4096 x 4096 layer to need a quarter of a weight beside W.
_BLOCK = 1 << 22
# Elements from which a matrix is worth a place in the shared workspace.
_LARGE = 1 << 16
# Bytes up to which malloc hands out memory that it has had before, without page faults.
_FRESH = 1 << 23
# Elements of T formed at a time: in float32 they stay in a core's cache until they are used.
_TILE = 1 << 17
_shared = threading.local()

Stage = Callable[[bool], Tensor]


def linear_forward(x: Tensor, layer: Layer) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
    total_bias = effective_bias(layer.bias, layer.gamma, layer.beta, x.dtype)
    if layer.spec.precision == "split":
        return split_forward(x, layer, _stage(layer, x.dtype), total_bias)
    return F.linear(x, _merged(layer, x.dtype), total_bias)


def linear_backward(
    grad: Tensor, x: Tensor | None, layer: Layer, need_x: bool, needs: Needs
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
    grads = [grad_input(grad, layer)] if need_x else []
    if x is not None and any(needs):
        factors = grad_factors(grad, x, layer, needs)
        grads += [gradient for gradient in factors if gradient is not None]
    return grads


def merged_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    if dtype == torch.bfloat16:  # forward rounds an increment, for time; what is kept need not
        return _blockwise(layer, dtype)
    return _merged(layer, dtype, out=_empty_like(layer.weight, dtype))


def dequantize(weight: Stored, dtype: torch.dtype) -> Tensor:
    """W0, `[out, in]`, in `dtype`."""
    return weight.dense(dtype)


def grad_input(grad: Tensor, layer: Layer) -> Tensor:
    """`dx = (gamma * grad) W`, `[..., in]`, in grad's type."""
    if layer.spec.precision == "split":
        return split_grad_input(grad, layer, _stage(layer, grad.dtype))
    return grad @ _merged(layer, grad.dtype)


def split_forward(x: Tensor, layer: Layer, stage: Stage, total_bias: Tensor | None) -> Tensor:
    """`x (gamma W0)^T + x update^T + total_bias` with the update `gamma (W0 * (T - 1))`.

    `stage(True)` gives the update and `stage(False)` a stored W0, both in one workspace.
    """
    y = F.linear(x, _scaled_base(layer, x.dtype, stage), total_bias)
    return y.add_(F.linear(x, stage(True)))


def split_grad_input(grad: Tensor, layer: Layer, stage: Stage) -> Tensor:
    """`grad (gamma W0) + grad update` with the update `gamma (W0 * (T - 1))`."""
    dx = grad @ _scaled_base(layer, grad.dtype, stage)
    return dx.add_(grad @ stage(True))


def grad_factors(
    grad: Tensor, x: Tensor, layer: Layer, needs: Needs, fresh: bool = False
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, each where it is needed.

    `fresh` allows G memory of its own beside the workspace, where that saves time.
    """
    weight, hut_A, hut_B, _, gamma, _, spec = layer
    x, grad, x_dtype = as_rows(x), as_rows(grad), x.dtype
    # bf16 has the range of float32, so G may be rounded to it once; in fp16 G would overflow.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    acc = acc_dtype(dtype)
    x, grad_t = cast(x, dtype), cast(grad, dtype).t()
    A, B = cast(hut_A, dtype), cast(hut_B, dtype)
    if gamma is not None:
        B = (cast(hut_B, acc) * gamma[:, None]).to(dtype)
    reduce = _reduce_low_rank if spec.transform == "low_rank" else _reduce_two_sided
    parts = []
    for rows in _row_blocks(weight):
        H0 = _weighted(_take(grad_t, rows), x, weight, rows, x_dtype, fresh)
        Q, P = reduce(H0, A, _take(B, rows), rows, len(weight), needs)
        row_sums = H0.sum(1, dtype=acc) if needs.gamma and spec.constant else None
        parts.append((Q, P, row_sums))
        del H0
    Q, P, row_sums = parts[0] if len(parts) == 1 else _join(parts, acc)
    return finish_factor_grads(Q, P, row_sums, layer, needs)


def _weighted(
    grad_t: Tensor,
    x: Tensor,
    weight: Tensor | Stored,
    rows: slice | None,
    dtype: torch.dtype,
    fresh: bool,
) -> Tensor:
    """`H0 = (grad^T x) * W0` of a block of rows, `[rows, in]`, in x's type; W0's is `dtype`."""
    sizes = len(grad_t), x.shape[1]
    fresh &= x.dtype == torch.float32 and _fits_fresh(math.prod(sizes), x.dtype)
    if fresh and onednn.takes(grad_t, x):
        G = onednn.linear(grad_t, x.t())
    else:
        G = torch.mm(grad_t, x, out=_workspace(*sizes, x.dtype, x.device))
    if isinstance(weight, Stored):
        rows = slice(0, len(weight)) if rows is None else rows
        for part in weight.parts(rows):
            G[part.start - rows.start : part.stop - rows.start].mul_(_read(weight, part, dtype))
        return G
    W0 = _take(weight, rows)
    return G.mul_(W0) if W0.dtype == x.dtype else G * cast(W0, x.dtype)


def _reduce_low_rank(
    H0: Tensor, A: Tensor, gamma_B: Tensor, rows: slice | None, out_features: int, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """`Q = (gamma B)^T H0`, `[r, in]`, and `P = H0 A^T`, `[rows, r]`."""
    if (
        A.dtype == torch.float32
        and _fits_fresh(H0.numel(), H0.dtype)
        and onednn.takes(H0, A, gamma_B)
    ):
        Q = onednn.linear(gamma_B.t(), H0.t()) if needs.A else None
        return Q, onednn.linear(A, H0).t() if needs.P else None
    Q = torch.mm(gamma_B.t(), H0) if needs.A else None
    P = F.linear(H0, A) if needs.P else None
    return Q, P


def _reduce_two_sided(
    H0: Tensor, A: Tensor, gamma_B: Tensor, rows: slice | None, out_features: int, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """`Q[k, i] = sum_{p(o)=k} H0 gamma B[o, q(i)]` and `P[o, k] = sum_{q(i)=k} H0 A[p(o), i]`.

    Within the rows of one group p both are thin products: `P = H0 E` with `E[i, q(i)] = A[p, i]`,
    and Q's row is `(gamma B)^T H0`, of which column i keeps entry q(i).
    """
    r, in_features = A.shape
    q = group_index(in_features, r, A.device)
    Q = torch.zeros(A.shape, dtype=A.dtype, device=A.device) if needs.A else None
    P = torch.empty(gamma_B.shape, dtype=A.dtype, device=A.device) if needs.P else None
    for k, group in _row_groups(rows, out_features, r):
        if Q is not None:
            Q[k] = torch.mm(gamma_B[group].t(), H0[group]).gather(0, q[None])[0]
        if P is not None:
            spread = torch.zeros((in_features, r), dtype=A.dtype, device=A.device)
            spread.scatter_(1, q[:, None], A[k, :, None])  # [in, r]
            P[group] = torch.mm(H0[group], spread)
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


def _scaled_base(layer: Layer, dtype: torch.dtype, stage: Stage) -> Tensor:
    """`gamma W0`, the first matrix of `split`: W0 itself where nothing has to change."""
    weight, gamma = layer.weight, layer.gamma
    if isinstance(weight, Stored):
        weight = stage(False)
        return weight if gamma is None else weight.mul_(gamma[:, None])
    if gamma is None:
        return cast(weight, dtype)
    return (cast(weight, acc_dtype(dtype)) * gamma[:, None]).to(dtype)


def _merged(
    layer: Layer, dtype: torch.dtype, fresh: bool = False, out: Tensor | None = None
) -> Tensor:
    """`gamma W` for a product in `dtype`; in the residual form `W0 + W0 * m` in m's own buffer.

    The increment m may be formed in bf16 (its error stays relative to itself), but not in fp16,
    where small factors would underflow. `fresh` allows W memory of its own beside the workspace,
    where that saves time. Without `out` it is the workspace.
    """
    weight, hut_A, hut_B, _, gamma, _, spec = layer
    stored = isinstance(weight, Stored)
    residual = spec.constant == 1.0 and gamma is None
    if fresh and residual and not stored and dtype == torch.bfloat16:
        scaled = hut_B if spec.scaling == 1.0 else hut_B * spec.scaling
        A, B = cast(hut_A, dtype), cast(scaled, dtype)
        if _fits_fresh(weight.numel(), weight.dtype) and onednn.takes(A, B, weight):
            if weight.stride(1) == 1:
                return onednn.linear_mul(B, A.t(), 1.0, weight)
            return onednn.linear_mul(A.t(), B, 1.0, weight.t()).t()
    out = _workspace_like(weight, dtype) if out is None else out
    if not residual or dtype == torch.float16 or not (stored or weight.dtype == dtype):
        return _blockwise(layer, dtype, out)
    if isinstance(weight, Stored):
        return _merged_stored(weight, layer, dtype, out)
    A, B = cast(hut_A, dtype), cast(hut_B, dtype)
    if weight.numel() <= _BLOCK:
        m = torch.mm(B, A, out=out)
        return torch.addcmul(weight, weight, m, value=spec.scaling, out=m)
    # By blocks: on CPUs without bf16 instructions a product allocates its size in float32 as well.
    W = _empty_like(weight, dtype, out)
    for rows in _row_blocks(weight):
        W0, m = _take(weight, rows), _take(W, rows)
        torch.mm(_take(B, rows), A, out=m)
        torch.addcmul(W0, W0, m, value=spec.scaling, out=m)
    return W


def _merged_stored(weight: Stored, layer: Layer, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`W0 + W0 * m` of a stored W0: some rows are read, and m of them added while in the cache."""
    A, B = cast(layer.hut_A, dtype), cast(layer.hut_B, dtype)
    W = _empty_like(weight, dtype, out)
    for rows in weight.parts(slice(0, len(weight))):
        W0 = weight.read(rows, W[rows])
        m = torch.mm(B[rows], A, out=buffer("m", W0.numel(), dtype, W0.device).view(W0.shape))
        W0.addcmul_(W0, m, value=layer.spec.scaling)
    return W


def _stage(layer: Layer, dtype: torch.dtype) -> Stage:
    """The two matrices of `split`, each in the workspace once the other has been used."""

    def stage(update: bool) -> Tensor:
        out = _workspace_like(layer.weight, dtype)
        if update:
            return _blockwise(layer, dtype, out, subtract_identity=True)
        return layer.weight.read(slice(0, len(layer.weight)), _empty_like(layer.weight, dtype, out))

    return stage


def _read(weight: Stored, rows: slice, dtype: torch.dtype) -> Tensor:
    """A few rows of a stored W0, in a buffer that the next call writes over."""
    size = (rows.stop - rows.start) * weight.shape[1]
    out = buffer("W0", size, dtype, weight.device)
    return weight.read(rows, out.view(-1, weight.shape[1]))


def _blockwise(
    layer: Layer, dtype: torch.dtype, out: Tensor | None = None, subtract_identity: bool = False
) -> Tensor:
    """`gamma (W0 * T)`, or `gamma (W0 * (T - 1))`, formed in float32 or float64, rounded once.

    `gamma T` exists a tile of rows at a time; gamma and scaling are in B already.
    """
    weight, hut_A, hut_B, _, gamma, _, spec = layer
    acc = acc_dtype(dtype, weight.dtype, hut_A.dtype, hut_B.dtype)
    out_features, in_features = weight.shape
    A, B = cast(hut_A, acc), cast(hut_B, acc) * spec.scaling
    constant = spec.constant - subtract_identity
    constants = torch.full((out_features, 1), constant, dtype=acc, device=A.device)
    if gamma is not None:
        scale = cast(gamma, acc)[:, None]
        B, constants = B * scale, constants * scale
    out = _empty_like(weight, dtype, out)
    if spec.transform == "two_sided":
        q, p = (group_index(size, len(A), A.device) for size in weight.shape[::-1])
    step = max(1, _TILE // max(1, in_features))
    buffer = torch.empty((min(step, out_features), in_features), dtype=acc, device=A.device)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        T = buffer[: rows.stop - start]
        if spec.transform == "low_rank":
            torch.mm(B[rows], A, out=T)
        else:
            torch.index_select(B[rows], 1, q, out=T)
            T *= A.index_select(0, p[rows])
        if constant != 0.0:
            T += constants[rows]
        stored = isinstance(weight, Stored)
        torch.mul(_read(weight, rows, dtype) if stored else weight[rows], T, out=out[rows])
    return out


def _fits_fresh(size: int, dtype: torch.dtype) -> bool:
    """True where a matrix has the size at which one fused pass over it pays, in fresh memory."""
    return size >= _LARGE and size * dtype.itemsize <= _FRESH


def _group_starts(size: int, r: int) -> list[int]:
    """The first index of each of the r balanced groups of `size` indices, and `size` at the end.

    Group k holds the indices i with `i * r // size == k`.
    """
    return [-(-k * size // r) for k in range(r + 1)]


def _row_groups(rows: slice | None, out_features: int, r: int) -> Iterator[tuple[int, slice]]:
    """Each group p that meets a block of rows, with its rows counted from the block's first."""
    first, last = (0, out_features) if rows is None else (rows.start, rows.stop)
    for k, (start, end) in enumerate(pairwise(_group_starts(out_features, r))):
        start, end = max(start, first), min(end, last)
        if start < end:
            yield k, slice(start - first, end - first)


def _workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A row-major matrix for W or G that does not outlive the pass; None: let PyTorch allocate.

    On a CPU all layers of a thread share one buffer, as large as the largest of them: fresh memory
    for every pass would cost more time, in page faults, than the arithmetic on it. For small
    matrices and on other devices PyTorch's allocator is good.
    """
    size = rows * columns
    if size < _LARGE or device.type != "cpu":
        return None
    needed = size * dtype.itemsize
    buffer: Tensor | None = getattr(_shared, "buffer", None)
    if buffer is None or buffer.numel() < needed:
        _shared.buffer = None  # the old one goes before the new one comes
        buffer = _shared.buffer = torch.empty(needed, dtype=torch.uint8)
    return buffer[:needed].view(dtype).view(rows, columns)


def _empty_like(weight: Tensor | Stored, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The workspace, or where there is none a new matrix with weight's order of strides."""
    if out is not None:
        return out
    if isinstance(weight, Stored):
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.empty_like(weight, dtype=dtype)


def _workspace_like(weight: Tensor | Stored, dtype: torch.dtype) -> Tensor | None:
    """A workspace with weight's order of strides, as a transposed one (Conv1D) needs it."""
    rows, columns = weight.shape
    if weight.stride()[1] == 1:
        return _workspace(rows, columns, dtype, weight.device)
    matrix = _workspace(columns, rows, dtype, weight.device)
    return _empty_like(weight, dtype) if matrix is None else matrix.t()


def _row_blocks(weight: Tensor | Stored) -> Sequence[slice | None]:
    """Row slices of `_BLOCK` elements; None, "all rows", where one block is enough."""
    if weight.numel() <= _BLOCK:
        return (None,)
    rows, columns = weight.shape
    step = max(1, _BLOCK // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _take(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]
