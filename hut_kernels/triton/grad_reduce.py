"""Chunked factor gradients: G for a block of rows from cuBLAS, reduced while it is in L2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import FactorGrads, Layer, Needs
from .launch import (
    REDUCTION_RANK,
    LaunchConfig,
    cdiv,
    layer_strides,
    on_device,
    optional,
    transform_options,
)
from .partial_sums import PartialSums
from .tiles import load_2d, reduce_tile


@triton.jit
def hut_grad_reduce_kernel(
    p_G,
    p_w,
    p_a,
    p_b,
    p_gamma,
    p_Q,
    p_P,
    p_sums,
    start,
    rows,
    K,
    O,
    r,
    stride_wo,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    tiles_o,
    tiles_k,
    k_splits,
    NEED_Q: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    THIN: tl.constexpr,
    WHOLE: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Rows `start ... start + rows` of G; d hut_A's partials go on from one block to the next."""
    o_split = tl.program_id(0) // k_splits
    k_split = tl.program_id(0) % k_splits
    p_Q += o_split.to(tl.int64) * r * K
    p_P += k_split.to(tl.int64) * O * r
    p_sums += k_split.to(tl.int64) * O
    for tile in range(0, tiles_o * tiles_k):
        tile_o = tile // tiles_k
        tile_k = tile % tiles_k
        o_row = (o_split * tiles_o + tile_o) * BO + tl.arange(0, BO)
        o_k = (k_split * tiles_k + tile_k) * BK + tl.arange(0, BK)
        o_o = start + o_row
        m_o = o_row < rows
        m_k = o_k < K
        b_G = load_2d(p_G, o_row, K, o_k, 1, m_o, m_k)  # [BO, BK]
        b_w = load_2d(p_w, o_o, stride_wo, o_k, stride_wk, m_o, m_k)  # [BO, BK]
        reduce_tile(
            b_G * b_w.to(tl.float32), p_a, p_b, p_gamma, p_Q, p_P, p_sums, o_o, o_k,
            (tile_o == 0) & (start == 0), tile_k == 0, r, O, K,
            stride_ar, stride_ak, stride_bo, stride_br,
            NEED_Q, NEED_P, NEED_SUMS, HAS_GAMMA, TWO_SIDED, UNIFORM_P, UNIFORM_Q, BR, THIN,
        )  # fmt: skip


def launch_grad_reduce(
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    needs: Needs,
    config: LaunchConfig,
    splits: tuple[int, int],
    chunk: int,
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W G` from grad `[N, O]` and x `[N, K]`, where needed.

    `chunk` is the rows of G made at a time (float32); a program takes one of the `splits` of a
    chunk's rows and of K.
    """
    (O, K, r), (o_splits, k_splits) = layer.sizes, splits
    partials = PartialSums(x, layer, splits, needs)
    G = torch.empty((min(chunk, O), K), dtype=torch.float32, device=x.device)  # all that is alive
    for start in range(0, O, chunk):
        rows = min(chunk, O - start)
        _gram(grad[:, start : start + rows], x, out=G[:rows])
        with on_device(x):
            hut_grad_reduce_kernel[(o_splits * k_splits,)](
                G,
                layer.weight,
                layer.hut_A,
                layer.hut_B,
                optional(layer.gamma, x),
                partials.Q,
                partials.P,
                partials.sums,
                start,
                rows,
                K,
                O,
                r,
                *layer_strides(layer),
                cdiv(cdiv(chunk, config.BO), o_splits),
                cdiv(cdiv(K, config.BK), k_splits),
                k_splits,
                NEED_Q=partials.NEED_Q,
                NEED_P=partials.NEED_P,
                NEED_SUMS=partials.NEED_SUMS,
                HAS_GAMMA=layer.gamma is not None,
                BR=REDUCTION_RANK,
                **transform_options(layer, x.dtype, config),
                **config.meta(),
            )
    return partials.finish()


def _gram(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes `left^T right` in float32; on CUDA the 16-bit operands stay as they are."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.mm(left.t(), right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float().t(), right.float(), out=out)
