"""Fused factor gradients: G stays in registers over all tokens and is reduced where it stands."""

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
    product_precision,
    transform_options,
)
from .partial_sums import PartialSums
from .tiles import keep_wgmma_async, load_tile, reduce_tile


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
    WHOLE: tl.constexpr,
    WGMMA_ASYNC: tl.constexpr,
    TMA: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """A program owns a split of tiles_o x tiles_k tiles and adds them up in a fixed order."""
    o_split = tl.program_id(0) // k_splits
    k_split = tl.program_id(0) % k_splits
    p_Q += o_split.to(tl.int64) * r * K
    p_P += k_split.to(tl.int64) * O * r
    p_sums += k_split.to(tl.int64) * O
    for tile in range(0, tiles_o * tiles_k):
        tile_o = tile // tiles_k
        tile_k = tile % tiles_k
        first_o = (o_split * tiles_o + tile_o) * BO
        first_k = (k_split * tiles_k + tile_k) * BK
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
            acc = keep_wgmma_async(acc, WGMMA_ASYNC)
        b_w = load_tile(p_w, first_o, first_k, O, K, stride_wo, stride_wk, BO, BK, TMA)  # [BO, BK]
        reduce_tile(
            acc * b_w.to(tl.float32), p_a, p_b, p_gamma, p_Q, p_P, p_sums, o_o, o_k,
            tile_o == 0, tile_k == 0, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
            NEED_Q, NEED_P, NEED_SUMS, HAS_GAMMA, TWO_SIDED, UNIFORM_P, UNIFORM_Q, BR, THIN,
        )  # fmt: skip


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
    with on_device(x):
        hut_grad_factors_kernel[(o_splits * k_splits,)](
            p_g,
            p_x,
            p_w,
            layer.hut_A,
            layer.hut_B,
            optional(layer.gamma, x),
            partials.Q,
            partials.P,
            partials.sums,
            len(x),
            K,
            O,
            r,
            *grad.stride(),
            *x.stride(),
            *layer_strides(layer),
            cdiv(cdiv(O, config.BO), o_splits),
            cdiv(cdiv(K, config.BK), k_splits),
            k_splits,
            NEED_Q=partials.NEED_Q,
            NEED_P=partials.NEED_P,
            NEED_SUMS=partials.NEED_SUMS,
            HAS_GAMMA=layer.gamma is not None,
            PRECISION=product_precision(x.dtype),
            WGMMA_ASYNC=config.wgmma_async,
            TMA=tma,
            BN=config.BN,
            BR=REDUCTION_RANK,
            **transform_options(layer, x.dtype, config),
            **config.meta(),
        )
    return partials.finish()
