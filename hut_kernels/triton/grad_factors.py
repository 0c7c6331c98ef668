"""Fused factor gradients: G stays in registers over all tokens and is reduced where it stands."""

import triton
import triton.language as tl
from torch import Tensor

from ..definition import FactorGrads, Needs, Spec
from .launch import (
    REDUCTION_RANK,
    Row,
    cdiv,
    descriptors,
    on_device,
    optional,
    product_precision,
    transform_options,
)
from .partials import Partials
from .tiles import load_tile, reduce_tile, settle


@triton.jit
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
    spans_k,
    NEED_Q: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    THIN: tl.constexpr,
    SETTLE: tl.constexpr,
    TMA: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """A program owns a span of tiles_o x tiles_k tiles and adds them up in a fixed order."""
    span_o = tl.program_id(0) // spans_k
    span_k = tl.program_id(0) % spans_k
    p_Q += span_o.to(tl.int64) * r * K
    p_P += span_k.to(tl.int64) * O * r
    p_sums += span_k.to(tl.int64) * O
    for tile in range(0, tiles_o * tiles_k):
        tile_o = tile // tiles_k
        tile_k = tile % tiles_k
        first_o = (span_o * tiles_o + tile_o) * BO
        first_k = (span_k * tiles_k + tile_k) * BK
        o_o = first_o + tl.arange(0, BO)
        o_k = first_k + tl.arange(0, BK)
        acc = tl.zeros((BO, BK), tl.float32)
        for n in range(0, N, BN):
            # Through pointers, a left operand transposed after its load has no asynchronous copy.
            if TMA:
                b_g = tl.trans(p_g.load([n, first_o]))  # [BO, BN]
            else:
                b_g = load_tile(p_g, first_o, n, O, N, stride_go, stride_gn, BO, BN, False)
            b_x = load_tile(p_x, n, first_k, N, K, stride_xn, stride_xk, BN, BK, TMA)  # [BN, BK]
            acc = tl.dot(b_g, b_x, acc, input_precision=PRECISION)
            acc = settle(acc, SETTLE)
        b_w = load_tile(p_w, first_o, first_k, O, K, stride_wo, stride_wk, BO, BK, TMA)  # [BO, BK]
        reduce_tile(
            acc * b_w.to(tl.float32), p_a, p_b, p_gamma, p_Q, p_P, p_sums, o_o, o_k,
            tile_o == 0, tile_k == 0, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
            NEED_Q, NEED_P, NEED_SUMS, HAS_GAMMA, TWO_SIDED, UNIFORM_P, UNIFORM_Q, BR, THIN,
        )  # fmt: skip


def grad_factors(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    needs: Needs,
    row: Row,
    spans: tuple[int, int],
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W G` from grad `[N, O]` and x `[N, K]`, where needed.

    `spans` is how many programs share O and K; each writes its own partial sums, and the partials
    are added in order, so that two runs agree to the bit.
    """
    (N, K), (O, r) = x.shape, hut_B.shape
    spans_o, spans_k = spans
    partials = Partials(weight, hut_B, spans, spec, needs)
    tma, (p_g, p_x, p_w) = descriptors(
        row, (grad, [row.BN, row.BO]), (x, [row.BN, row.BK]), (weight, [row.BO, row.BK])
    )
    with on_device(x):
        hut_grad_factors_kernel[(spans_o * spans_k,)](
            p_g,
            p_x,
            p_w,
            hut_A,
            hut_B,
            optional(gamma, x),
            partials.Q,
            partials.P,
            partials.sums,
            N,
            K,
            O,
            r,
            *grad.stride(),
            *x.stride(),
            *weight.stride(),
            *hut_A.stride(),
            *hut_B.stride(),
            cdiv(cdiv(O, row.BO), spans_o),
            cdiv(cdiv(K, row.BK), spans_k),
            spans_k,
            NEED_Q=partials.NEED_Q,
            NEED_P=partials.NEED_P,
            NEED_SUMS=partials.NEED_SUMS,
            HAS_GAMMA=gamma is not None,
            PRECISION=product_precision(x.dtype),
            SETTLE=row.settle,
            TMA=tma,
            BN=row.BN,
            BR=REDUCTION_RANK,
            **transform_options(weight, hut_A, spec, x.dtype, row),
            **row.meta(),
        )
    return partials.finish(hut_A, hut_B, gamma, spec)
