"""Fused factor gradients: G stays in registers over all tokens and is reduced where it stands."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import FactorGrads, Layer, Needs
from .launch import (
    REDUCTION_RANK,
    LaunchConfig,
    cdiv,
    descriptors,
    layer_strides,
    on_device,
    optional,
    padded_rank,
    product_precision,
    transform_options,
)
from .partial_sums import PartialSums, with_operands
from .tiles import (
    add_up,
    columns_tile,
    keep_wgmma_async,
    load_tile,
    reduce_columns,
    reduce_rows,
    within,
)


@triton.jit(do_not_specialize=["N"])
def hut_grad_factors_kernel(
    p_g,
    p_x,
    p_w,
    p_a,
    p_b,
    p_gamma,
    p_Q,
    p_P,
    p_sums,
    N,
    K,
    O,
    r,
    stride_gn,
    stride_go,
    stride_xn,
    stride_xk,
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
    PRECISION: tl.constexpr,
    THIN: tl.constexpr,
    OPERAND: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_R: tl.constexpr,
    WGMMA_ASYNC: tl.constexpr,
    TMA: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """A program keeps a tile of columns while it goes down its rows of G, as in `grad_reduce`.

    Q's tile stays in registers where BR holds all of r, else its pieces are added up in memory.
    """
    o_split = tl.program_id(0) // k_splits
    k_split = tl.program_id(0) % k_splits
    p_Q += o_split.to(tl.int64) * r * K
    p_P += k_split.to(tl.int64) * O * r
    p_sums += k_split.to(tl.int64) * O
    for tile_k in range(0, min(tiles_k, tl.cdiv(K, BK) - k_split * tiles_k)):
        first_k = (k_split * tiles_k + tile_k) * BK
        o_k = first_k + tl.arange(0, BK)
        m_k = within(o_k, K, WHOLE)
        b_Q = tl.zeros((BR, BK), tl.float32)
        for tile_o in range(0, min(tiles_o, tl.cdiv(O, BO) - o_split * tiles_o)):
            first_o = (o_split * tiles_o + tile_o) * BO
            o_o = first_o + tl.arange(0, BO)
            m_o = within(o_o, O, WHOLE)
            acc = tl.zeros((BO, BK), tl.float32)
            for n in range(0, N, BN):
                # Through pointers, what is transposed after its load has no asynchronous copy.
                if TMA:
                    b_g = tl.trans(p_g.load([n, first_o]))  # [BO, BN]
                else:
                    b_g = load_tile(p_g, first_o, n, O, N, stride_go, stride_gn, BO, BN, False)
                b_x = load_tile(
                    p_x, n, first_k, N, K, stride_xn, stride_xk, BN, BK, TMA
                )  # [BN, BK]
                acc = tl.dot(b_g, b_x, acc, input_precision=PRECISION)
                acc = keep_wgmma_async(acc, WGMMA_ASYNC)
            b_w = load_tile(
                p_w, first_o, first_k, O, K, stride_wo, stride_wk, BO, BK, TMA, WHOLE
            )  # [BO, BK]
            b_h = acc * b_w.to(tl.float32)
            if NEED_SUMS:
                add_up(p_sums + o_o, m_o, tl.sum(b_h, 1), tile_k == 0, ONE_TILE)
            for first_r in tl.range(0, BR if ONE_PIECE else r, BR, num_stages=1):
                o_r = first_r + tl.arange(0, BR)
                m_r = within(o_r, r, WHOLE_R)
                # P, then Q; the other way round in `two_sided`, where sm_90 would else spill.
                for turn in tl.static_range(2):
                    if NEED_P and turn == TWO_SIDED:
                        b_q = columns_tile(
                            p_a, o_k, o_r, m_k, m_r, r, K, stride_ar, stride_ak, TWO_SIDED, OPERAND
                        )  # [BK, BR]
                        reduce_columns(
                            b_h, b_q, p_a, p_P, first_k, o_o, o_k, o_r, m_o, m_r, tile_k == 0, r,
                            O, K, stride_ar, stride_ak, TWO_SIDED, UNIFORM_P, UNIFORM_Q, OPERAND,
                            THIN, ONE_TILE,
                        )  # fmt: skip
                    # Always so; but beside P's product Triton would arrange the warps of Q's by
                    # P's rows, of which Q has one for eight, and all of them would make the same.
                    if NEED_Q and turn != TWO_SIDED and r > 0:
                        b_Q = reduce_rows(
                            b_h, b_Q, p_b, p_gamma, first_o, o_o, o_k, o_r, m_o, m_r, r, O, K,
                            stride_bo, stride_br, HAS_GAMMA, TWO_SIDED, UNIFORM_P, UNIFORM_Q,
                            OPERAND, THIN,
                        )  # fmt: skip
                if NEED_Q and not ONE_PIECE:
                    o_Q = o_r.to(tl.int64)[:, None] * K + o_k[None, :]
                    add_up(p_Q + o_Q, m_r[:, None] & m_k[None, :], b_Q, tile_o == 0, False)
                    b_Q = tl.zeros((BR, BK), tl.float32)
            if not (ONE_TILE and ONE_PIECE):
                tl.debug_barrier()  # the next visit may read through another thread of this program
        if NEED_Q and ONE_PIECE:
            o_r = tl.arange(0, BR)
            o_Q = o_r.to(tl.int64)[:, None] * K + o_k[None, :]
            tl.store(p_Q + o_Q, b_Q, mask=within(o_r, r, WHOLE_R)[:, None] & m_k[None, :])


def launch_grad_factors(
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    needs: Needs,
    config: LaunchConfig,
    splits: tuple[int, int],
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W G` from grad `[N, O]` and x `[N, K]`, where needed.

    A program takes one of the `splits` of O and of K. Each writes its own partial sums, and these
    are added in order, so that two runs agree to the bit.
    """
    (O, K, r), (o_splits, k_splits) = layer.sizes, splits
    partials = PartialSums(x, layer, splits, needs)
    tma, (p_g, p_x, p_w) = descriptors(
        config,
        (grad, [config.BN, config.BO]),
        (x, [config.BN, config.BK]),
        (layer.weight, [config.BO, config.BK]),
    )
    reduced = with_operands(layer, x.dtype)
    rounds = x.dtype == torch.bfloat16  # H0 and the factors: then registers hold all of r
    BR = padded_rank(r) if rounds and r <= 64 else REDUCTION_RANK
    tiles_k = cdiv(cdiv(K, config.BK), k_splits)
    with on_device(x):
        hut_grad_factors_kernel[(o_splits * k_splits,)](
            p_g,
            p_x,
            p_w,
            reduced.hut_A,
            reduced.hut_B,
            optional(reduced.gamma, x),
            partials.Q,
            partials.P,
            partials.sums,
            len(x),
            K,
            O,
            r,
            *grad.stride(),
            *x.stride(),
            *layer_strides(reduced),
            cdiv(cdiv(O, config.BO), o_splits),
            tiles_k,
            k_splits,
            NEED_Q=partials.NEED_Q,
            NEED_P=partials.NEED_P,
            NEED_SUMS=partials.NEED_SUMS,
            HAS_GAMMA=reduced.gamma is not None,
            PRECISION=product_precision(x.dtype),
            WGMMA_ASYNC=config.wgmma_async,
            TMA=tma,
            BN=config.BN,
            OPERAND=tl.bfloat16 if rounds else tl.float32,
            ONE_TILE=tiles_k == 1,
            ONE_PIECE=r <= BR,
            BR=BR,
            WHOLE_R=r % BR == 0,
            **transform_options(layer, x.dtype, config),
            **config.meta(),
        )
    return partials.finish()
