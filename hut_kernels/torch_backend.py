"""The operators in PyTorch: the CPU fallback, and any device without kernels of ours.

W is formed some rows at a time, in tiles that stay in a core's cache. They make up a workspace for
one large product or, where tokens are few, are multiplied at once and never written to memory: in
backward, and of one token in forward. G exists a block of rows at a time, a tile where tokens are
few, and is reduced in tiles. On a CPU that multiplies bf16, what is made of products stays in that
type: W of the residual form, and the reduction of G.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
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
from .multiplier import Multiplier, take

# Elements of a row block: large enough for its product to run at full speed, small enough for a
# 4096 x 4096 layer to need a quarter of a weight beside W.
_BLOCK = 1 << 22
# Elements from which a matrix is worth a place in the shared workspace.
_LARGE = 1 << 16
# Bytes up to which malloc hands out memory that it has had before, without page faults.
_FRESH = 1 << 23
# Tokens up to which a tile's product costs no more by itself than within that of the whole weight;
# of a CPU that multiplies bf16 the latter are the faster, and W takes less time than they.
_FEW, _FEW_NATIVE = 64, 1
# Tokens up to which they cost less to multiply by A than the weight does, on such a CPU.
_FEW_IN_BLOCKS = 16
_shared = threading.local()

Stage = Callable[[bool], Tensor]


def linear_forward(x: Tensor, layer: Layer) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
    total_bias = effective_bias(layer.bias, layer.gamma, layer.beta, x.dtype)
    if layer.spec.precision == "split":
        return split_forward(x, layer, _stage(layer, x.dtype), total_bias)
    if x.numel() == x.shape[-1] and _are_few(x, layer.weight):
        bias = x.new_zeros(len(layer.weight)) if total_bias is None else total_bias
        # No tile goes to memory.
        parts = [F.linear(x, W, bias[rows]) for rows, W in _weight_tiles(layer, x.dtype)]
        return torch.cat(parts, -1)
    return F.linear(x, _merged(layer, x.dtype), total_bias)


def linear_backward(
    grad: Tensor, x: Tensor | None, layer: Layer, need_x: bool, needs: Needs
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
    if x is None or not any(needs):
        return [grad_input(grad, layer)] if need_x else []
    if layer.spec.transform == "two_sided" and _takes_blocks(grad, layer):
        dx, factors = _backward_by_blocks(grad, x, layer, need_x, needs)
    else:
        dx = grad_input(grad, layer) if need_x else None
        factors = grad_factors(grad, x, layer, needs)
    return [gradient for gradient in (dx, *factors) if gradient is not None]


def merged_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    return _formed(layer, dtype)


def dequantize(weight: Stored, dtype: torch.dtype) -> Tensor:
    """W0, `[out, in]`, in `dtype`."""
    return weight.dense(dtype)


def grad_input(grad: Tensor, layer: Layer) -> Tensor:
    """`dx = (gamma * grad) W`, `[..., in]`, in grad's type."""
    if layer.spec.precision == "split":
        return split_grad_input(grad, layer, _stage(layer, grad.dtype))
    if _are_few(grad, layer.weight):
        return _grad_input_by_tiles(grad, layer)
    return _multiplied(grad, _merged(layer, grad.dtype))


def _is_small(weight: Tensor | Stored) -> bool:
    """True for a dense weight so small that calls cost more than what they do."""
    return not isinstance(weight, Stored) and weight.numel() < _LARGE


def _are_few(tokens: Tensor, weight: Tensor | Stored, native: int = _FEW_NATIVE) -> bool:
    """True where tiles of W and G are used one by one: few tokens, a weight that has tiles.

    `native` is the most of them on a CPU that multiplies bf16, in that type.
    """
    most = native if onednn.is_native(tokens.dtype, tokens.device) else _FEW
    size = weight.numel()
    return (
        size >= _LARGE
        and 0 < tokens.numel() <= most * tokens.shape[-1]
        and weight.device.type == "cpu"
        and weight.stride()[1] == 1
    )


def _grad_input_by_tiles(grad: Tensor, layer: Layer) -> Tensor:
    """`grad_input` of few tokens."""
    rows_of_grad = cast(as_rows(grad), acc_dtype(grad.dtype))
    dx = rows_of_grad.new_zeros((len(rows_of_grad), layer.weight.shape[1]))
    for rows, W in _weight_tiles(layer, grad.dtype):
        torch.addmm(dx, rows_of_grad[:, rows], cast(W, dx.dtype), out=dx)
    return cast(dx, grad.dtype).view(*grad.shape[:-1], -1)


def _takes_blocks(grad: Tensor, layer: Layer) -> bool:
    """True where A may multiply few tokens of a `two_sided` layer, not more than a group's rows."""
    sizes, groups = layer.weight.shape, layer.hut_A.shape[0]
    return (
        layer.spec.precision == "merged"
        and _are_few(grad, layer.weight, _FEW_IN_BLOCKS)
        and len(as_rows(grad)) * groups <= sizes[0]
        and all(size % groups == 0 for size in sizes)
    )


def _backward_by_blocks(
    grad: Tensor, x: Tensor, layer: Layer, need_x: bool, needs: Needs
) -> tuple[Tensor | None, FactorGrads]:
    """`grad_input` and `grad_factors` of `two_sided` for few tokens and groups of one size.

    Within a group p of rows, A multiplies the activations in place of the weight. With
    `U = g (W0 * B)` over its rows, dx is the sum of `A[p] * U` and `Q[p] = sum_n x * U`; P is
    `g^T (x * A[p]) * W0` summed over each group q. A weight is multiplied twice, not seven times.
    """
    weight, acc = layer.weight, acc_dtype(grad.dtype)
    x, g_t = cast(as_rows(x), acc), cast(as_rows(grad), acc).t()
    multiplier = _gradient_multiplier(layer, acc)
    Q = x.new_zeros(layer.hut_A.shape) if needs.A else None
    P = x.new_empty(layer.hut_B.shape) if needs.P else None
    dx = x.new_zeros(x.shape) if need_x else None
    for rows in multiplier.tiles():
        groups, sizes = multiplier.blocks(rows)
        A = take(multiplier.right, groups)[:, None]  # [groups, 1, in]
        W0 = cast(_base_rows(weight, rows, grad.dtype), acc)
        g = g_t[rows].view(*sizes[:2], -1)  # [groups, size, N]
        if dx is not None or Q is not None:
            weighted = W0.view(sizes) * take(multiplier.left, rows).view(*sizes[:3], 1)
            U = torch.bmm(g.mT, weighted.view(*sizes[:2], -1))  # [groups, N, in]
            if Q is not None:
                take(Q, groups).add_((x * U).sum(1))
            if dx is not None:
                dx += (A * U).sum(0)
        if P is not None:
            H0 = torch.bmm(g, x * A).view(len(W0), -1).mul_(W0)
            torch.sum(H0.view(len(W0), *sizes[2:]), 2, out=take(P, rows))
    if dx is not None:
        dx = cast(dx, grad.dtype).view(*grad.shape[:-1], -1)
    return dx, finish_factor_grads(Q, P, None, layer, needs)


def split_forward(x: Tensor, layer: Layer, stage: Stage, total_bias: Tensor | None) -> Tensor:
    """`x (gamma W0)^T + x update^T + total_bias` with the update `gamma (W0 * (T - 1))`.

    `stage(True)` gives the update and `stage(False)` a stored W0, both in one workspace.
    """
    y = F.linear(x, _scaled_base(layer, x.dtype, stage), total_bias)
    return y.add_(F.linear(x, stage(True)))


def split_grad_input(grad: Tensor, layer: Layer, stage: Stage) -> Tensor:
    """`grad (gamma W0) + grad update` with the update `gamma (W0 * (T - 1))`."""
    dx = _multiplied(grad, _scaled_base(layer, grad.dtype, stage))
    return dx.add_(_multiplied(grad, stage(True)))


def _multiplied(grad: Tensor, W: Tensor) -> Tensor:
    """`grad W`, `[..., in]`; forward's product is that of the base layer instead, to the bit."""
    if not onednn.is_widened(grad):
        return grad @ W
    dx = grad.new_empty((*grad.shape[:-1], W.shape[1]))
    onednn.multiply_widened(as_rows(grad).float(), W, as_rows(dx))
    return dx


def grad_factors(grad: Tensor, x: Tensor, layer: Layer, needs: Needs) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, each where it is needed."""
    weight, x_dtype = layer.weight, x.dtype
    acc = acc_dtype(x_dtype)
    native = onednn.is_native(x_dtype, x.device)
    few = not native and _are_few(x, weight)
    # G may be rounded to bf16, which has the range of float32, once; in fp16 it would overflow.
    dtype = acc if few or x_dtype == torch.float16 or onednn.is_widened(x) else x_dtype
    x, grad_t = cast(as_rows(x), dtype), cast(as_rows(grad), dtype).t()
    # So may H0 and the factors, whose thin products are then of bf16.
    rounds = native and layer.spec.transform == "low_rank" and not _is_small(weight)
    multiplier = _gradient_multiplier(layer, dtype if rounds else acc)
    need_rows = needs.gamma and layer.spec.constant != 0.0
    stored = isinstance(weight, Stored)
    tiles = multiplier.tiles(stored)
    if len(tiles) == 1 and not stored:
        H0 = cast(_product(grad_t, x), multiplier.left.dtype).mul_(weight)
        Q, P = multiplier.reduce(tiles[0], H0, needs.A, needs.P)
        row_sums = H0.sum(1, dtype=acc) if need_rows else None
        return finish_factor_grads(Q, P, row_sums, layer, needs)
    sums = _Sums(multiplier, needs, need_rows)
    by_tiles = few or rounds
    for block in ([tile] for tile in tiles) if by_tiles else _row_blocks(tiles, weight.shape[1]):
        first = block[0].start
        G = _product(take(grad_t, slice(first, block[-1].stop)), x)
        for rows in block:
            tile = take(G, slice(rows.start - first, rows.stop - first))
            H0 = cast(tile, multiplier.left.dtype)
            sums.add(rows, H0.mul_(_base_rows(weight, rows, x_dtype)))
    return finish_factor_grads(sums.Q, sums.P, sums.rows, layer, needs)


def _product(grad_t: Tensor, x: Tensor) -> Tensor:
    """`G = grad^T x` of a block of rows, `[rows, in]`."""
    return torch.mm(grad_t, x, out=_workspace(len(grad_t), x.shape[1], x.dtype, x.device))


class _Sums:
    """The reductions of `H0 = G * W0`, which comes in tiles.

    Attributes:
        Q: `[r, in]`, for `low_rank` `(gamma B)^T H0`, for `two_sided`
            `Q[k, i] = sum_{p(o)=k} H0[o, i] (gamma B)[o, q(i)]`.
        P: `[out, r]`, `H0 A^T`, or `P[o, k] = sum_{q(i)=k} H0[o, i] A[p(o), i]`.
        rows: `[out]`, `sum_i H0[o, i]`.
    """

    def __init__(self, multiplier: Multiplier, needs: Needs, need_rows: bool) -> None:
        left, right = multiplier.left, multiplier.right
        acc = acc_dtype(left.dtype)
        self.multiplier = multiplier
        self.Q = right.new_zeros(right.shape, dtype=acc) if needs.A else None
        self.P = left.new_empty(left.shape, dtype=acc) if needs.P else None
        self.rows = left.new_empty(len(left), dtype=acc) if need_rows else None

    def add(self, rows: slice, H0: Tensor) -> None:
        """Adds the tile of some rows, `[rows, in]`."""
        Q, P = self.multiplier.reduce(rows, H0, self.Q is not None, self.P is not None)
        if self.Q is not None and Q is not None:
            blocks = self.multiplier.has_blocks
            part = take(self.Q, self.multiplier.blocks(rows)[0]) if blocks else self.Q
            part += Q
        if self.P is not None and P is not None:
            self.P[rows] = P
        if self.rows is not None:
            torch.sum(H0, 1, dtype=self.rows.dtype, out=take(self.rows, rows))


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
    """`gamma W` for a product in `dtype`, in `out` or, without that, in the workspace.

    `fresh` allows W memory of its own, where that saves time.
    """
    weight = layer.weight
    if out is None and _is_small(weight):
        return _formed_at_once(layer, dtype)
    if not _rounds_increment(layer, dtype):
        return _formed(layer, dtype, _workspace_like(weight, dtype) if out is None else out)
    if weight.stride()[1] != 1:
        return _merged(layer.transposed, dtype, fresh, out if out is None else out.t()).t()
    if fresh and out is None and weight.numel() * dtype.itemsize <= _FRESH:
        rounded = _rounded_multiplier(layer)
        return _form_rounded(rounded, slice(0, rounded.rows), weight)
    W = _empty_like(weight, dtype, _workspace_like(weight, dtype) if out is None else out)
    for rows, part in _weight_tiles(layer, dtype):
        W[rows] = part
    return W


def _rounds_increment(layer: Layer, dtype: torch.dtype) -> bool:
    """True where W is formed by products of bf16: in the residual form, on a CPU that has them.

    The factors are rounded, which leaves the increment's error relative to itself. A W0
    neither whose rows nor whose columns lie dense takes the tiles in float32.
    """
    weight, spec = layer.weight, layer.spec
    return (
        spec.constant == 1.0
        and layer.gamma is None
        and onednn.is_native(dtype, weight.device)
        and (isinstance(weight, Stored) or weight.dtype == dtype)
        and 1 in weight.stride()
    )


def _rounded_multiplier(layer: Layer) -> Multiplier:
    """The multiplier of such a W, less its constant."""
    B = layer.hut_B if layer.spec.scaling == 1.0 else layer.hut_B * layer.spec.scaling
    A, B = cast(layer.hut_A, torch.bfloat16), cast(B, torch.bfloat16)
    return Multiplier(B, A, layer.spec.transform)


def _form_rounded(multiplier: Multiplier, rows: slice, weight: Tensor | Stored) -> Tensor:
    """Some rows of such a W, `[rows, in]`, in new memory."""
    W0 = _base_rows(weight, rows, torch.bfloat16)
    return onednn.linear_mul(take(multiplier.left, rows), multiplier.right.t(), W0)


def _formed_at_once(layer: Layer, dtype: torch.dtype) -> Tensor:
    """`_formed` of a small weight, in the fewest calls."""
    multiplier, shift = _multiplier(layer, dtype)
    rows = slice(0, multiplier.rows)
    return cast(_form(multiplier, shift, rows, layer.weight, None), dtype)


def _stage(layer: Layer, dtype: torch.dtype) -> Stage:
    """The two matrices of `split`, each in the workspace once the other has been used."""

    def stage(update: bool) -> Tensor:
        out = _workspace_like(layer.weight, dtype)
        if update:
            return _formed(layer, dtype, out, subtract_identity=True)
        return layer.weight.read(slice(0, len(layer.weight)), _empty_like(layer.weight, dtype, out))

    return stage


def _formed(
    layer: Layer,
    dtype: torch.dtype,
    out: Tensor | None = None,
    subtract_identity: bool = False,
) -> Tensor:
    """`gamma (W0 * T)`, or `gamma (W0 * (T - 1))`, formed in float32 or float64, rounded once."""
    weight = layer.weight
    out = W = _empty_like(weight, dtype, out)
    multiplier, shift = _multiplier(layer, dtype, subtract_identity)
    transposed = weight.stride()[1] != 1 and weight.stride()[0] == 1  # a Conv1D's
    if transposed and not _is_small(weight):  # which forward forms as it is: the same to the bit
        multiplier, weight, W = multiplier.t(), weight.t(), W.t()
        shift = shift.t() if isinstance(shift, Tensor) else shift
    in_place = dtype == multiplier.left.dtype and W.stride()[1] == 1
    tile = None if in_place else multiplier.new_tile()
    for rows in multiplier.tiles():
        part = take(W, rows)
        T = part if tile is None else tile[: len(part)]
        _form(multiplier, shift, rows, _base_rows(weight, rows, dtype), T)
        if tile is not None:
            part.copy_(T)
    return out


def _weight_tiles(layer: Layer, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`gamma W` some rows at a time, `[rows, in]`, in memory that the next ones may write over."""
    if _rounds_increment(layer, dtype):
        rounded = _rounded_multiplier(layer)
        for rows in rounded.tiles(isinstance(layer.weight, Stored)):
            yield rows, _form_rounded(rounded, rows, layer.weight)
        return
    multiplier, shift = _multiplier(layer, dtype)
    tile = multiplier.new_tile()
    for rows in multiplier.tiles():
        T = tile[: rows.stop - rows.start]
        W = _form(multiplier, shift, rows, _base_rows(layer.weight, rows, dtype), T)
        yield rows, cast(W, dtype)


def _form(
    multiplier: Multiplier,
    shift: float | Tensor,
    rows: slice,
    W0: Tensor,
    out: Tensor | None,
) -> Tensor:
    """Some rows of `W0 * (T + shift)`, in `out` or in new memory."""
    T = multiplier.write(rows, out)
    if isinstance(shift, Tensor):
        T += shift if shift.shape[0] == 1 else take(shift, rows)
    elif shift == 1.0:
        W0 = cast(W0, T.dtype)
        return torch.addcmul(W0, W0, T, out=T)
    elif shift != 0.0:
        T += shift
    return T.mul_(W0)


def _gradient_multiplier(layer: Layer, dtype: torch.dtype) -> Multiplier:
    """`gamma T` without its constant and scaling, which the gradients are multiplied by at last."""
    B = layer.hut_B
    if layer.gamma is not None:
        acc = acc_dtype(dtype)
        B = cast(B, acc) * cast(layer.gamma, acc).unsqueeze(1)
    return Multiplier(cast(B, dtype), cast(layer.hut_A, dtype), layer.spec.transform)


def _multiplier(
    layer: Layer, dtype: torch.dtype, subtract_identity: bool = False
) -> tuple[Multiplier, float | Tensor]:
    """`gamma T`, or `gamma (T - 1)`, less its constant; and that constant, `[out, 1]` by gamma."""
    weight, hut_A, hut_B, _, gamma, _, spec = layer
    acc = acc_dtype(dtype, weight.dtype, hut_A.dtype, hut_B.dtype)
    B, shift = cast(hut_B, acc), spec.constant - subtract_identity
    if spec.scaling != 1.0:
        B = B * spec.scaling
    if gamma is None:
        return Multiplier(B, cast(hut_A, acc), spec.transform), shift
    scale = cast(gamma, acc).unsqueeze(1)
    multiplier = Multiplier(B * scale, cast(hut_A, acc), spec.transform)
    return multiplier, scale * shift if shift else shift


def _base_rows(weight: Tensor | Stored, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of W0; a stored one's in `dtype`, in a buffer that the next call writes over."""
    if not isinstance(weight, Stored):
        return take(weight, rows)
    size = (rows.stop - rows.start) * weight.shape[1]
    out = buffer("W0", size, dtype, weight.device)
    return weight.read(rows, out.view(-1, weight.shape[1]))


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


def _row_blocks(tiles: Sequence[slice], columns: int) -> Iterator[list[slice]]:
    """The tiles in groups of at most `_BLOCK` elements, or of one."""
    block: list[slice] = []
    for tile in tiles:
        if block and (tile.stop - block[0].start) * columns > _BLOCK:
            yield block
            block = []
        block.append(tile)
    if block:
        yield block
