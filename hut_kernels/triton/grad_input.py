"""Fused input gradient: `dx = (gamma * g) W` with W made again tile by tile.

The forward of a W0 that is stored `[in, out]` is the same product, with an epilogue.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer import Layer
from .launch import (
    LaunchConfig,
    cdiv,
    descriptors,
    layer_strides,
    moving_factor,
    multiplier_options,
    on_device,
    optional,
    product_precision,
)
from .split_k import add_partial_sums
from .tiles import (
    factor_tile,
    keep_wgmma_async,
    load_tile,
    modulate,
    ordered_tile,
    scale_shift,
    two_sided_tile,
    unchain,
)


@triton.jit(do_not_specialize=["N", "num_splits"])
def hut_grad_input_kernel(
    p_g,
    p_w,
    p_a,
    p_b,
    p_bias,
    p_gamma,
    p_beta,
    p_dx,
    N,
    K,
    O,
    r,
    num_splits,
    stride_gn,
    stride_go,
    stride_wo,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    constant,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    FACTOR_TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_R: tl.constexpr,
    THIN: tl.constexpr,
    PRECISION: tl.constexpr,
    WGMMA_ASYNC: tl.constexpr,
    TMA: tl.constexpr,
    W_FIRST: tl.constexpr,
    UNCHAIN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of dx; with SPLIT_K its sum over a part of O, to p_dx [num_splits, N, K]."""
    pid, split_k = tl.program_id(0), 0
    if SPLIT_K:
        pid, split_k = pid // num_splits, pid % num_splits
    pid_n, pid_k = ordered_tile(pid, tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_k = pid_k * BK + tl.arange(0, BK)
    if not TWO_SIDED:
        b_a = factor_tile(
            p_a, 0, pid_k * BK, r, K, stride_ar, stride_ak, scaling, BR, BK, FACTOR
        )  # [BR, BK]
        if W_FIRST:
            b_a = tl.trans(b_a)

    acc = tl.zeros((BK, BN) if W_FIRST else (BN, BK), tl.float32)
    part = tl.cdiv(tl.cdiv(O, BO), num_splits) * BO if SPLIT_K else O
    for o in range(split_k * part, min(O, (split_k + 1) * part), BO):
        o_o = o + tl.arange(0, BO)
        b_g = load_tile(
            p_g, pid_n * BN, o, N, O, stride_gn, stride_go, BN, BO, TMA, WHOLE, True
        )  # [BN, BO]
        b_w = load_tile(
            p_w, o, pid_k * BK, O, K, stride_wo, stride_wk, BO, BK, TMA, WHOLE
        )  # [BO, BK]
        if not TWO_SIDED:
            b_b = load_tile(
                p_b, o, 0, O, r, stride_bo, stride_br, BO, BR, FACTOR_TMA, WHOLE and WHOLE_R
            ).to(FACTOR)  # [BO, BR]
        if W_FIRST:
            if TWO_SIDED:  # as of the transposed layer, whose factors have changed places
                b_t = two_sided_tile(
                    p_b, p_a, o_k, o_o, r, K, O, stride_br, stride_bo, stride_ak, stride_ar,
                    UNIFORM_Q, UNIFORM_P,
                )  # fmt: skip
            else:
                b_t = tl.dot(b_a, tl.trans(b_b), input_precision=THIN)  # [BK, BO]
            b_W = modulate(tl.trans(b_w), b_t, constant, RESIDUAL, b_g.dtype)
            acc = tl.dot(b_W, tl.trans(b_g), acc, input_precision=PRECISION)
        else:
            if TWO_SIDED:
                b_t = two_sided_tile(
                    p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
                    UNIFORM_P, UNIFORM_Q,
                )  # fmt: skip
            else:
                b_t = tl.dot(b_b, b_a, input_precision=THIN)  # [BO, BK]
            b_W = modulate(b_w, b_t, constant, RESIDUAL, b_g.dtype)
            acc = tl.dot(b_g, unchain(b_W, UNCHAIN), acc, input_precision=PRECISION)
        acc = keep_wgmma_async(acc, WGMMA_ASYNC)

    if W_FIRST:
        acc = tl.trans(acc)
    if not SPLIT_K:
        acc = scale_shift(acc, p_bias, p_gamma, p_beta, o_k, o_k < K, HAS_BIAS, HAS_GAMMA, HAS_BETA)
    o_dx = (tl.cast(split_k, tl.int64) * N + o_n)[:, None] * K + o_k[None, :]
    mask = (o_n < N)[:, None] & (o_k < K)[None, :]
    tl.store(p_dx + o_dx, acc.to(p_dx.dtype.element_ty), mask=mask)


def join_gamma(grad: Tensor, layer: Layer) -> tuple[Tensor, Layer]:
    """`gamma * grad`, and the layer without its vectors: dx is the product of the two.

    In one pass over few tokens: a load of gamma in the main loop would keep the tensor cores of
    sm_90 waiting (ptxas C7519).
    """
    if layer.gamma is not None:
        grad = torch.mul(grad, layer.gamma, out=torch.empty_like(grad))  # multiplied in float32
    return grad, layer._replace(bias=None, gamma=None, beta=None)


def launch_grad_input(
    grad: Tensor, layer: Layer, config: LaunchConfig, num_splits: int = 1
) -> Tensor:
    """`gamma * (grad W + bias) + beta`, `[N, K]`, with `num_splits` programs over O for each tile.

    The vectors are `[K]`, a transposed layer's. grad `[N, O]` may have any strides.
    """
    (N, O), K = grad.shape, layer.sizes[1]
    dx = torch.empty((N, K), dtype=grad.dtype, device=grad.device)
    partials = (num_splits, N, K)
    out = dx if num_splits == 1 else torch.empty(partials, dtype=torch.float32, device=dx.device)
    tma, (p_g, p_w) = descriptors(
        config, (grad, [config.BN, config.BO]), (layer.weight, [config.BO, config.BK])
    )
    options = multiplier_options(layer, grad.dtype, config, residual=True)
    with on_device(grad):
        hut_B, factor_tma, p_b = moving_factor(
            layer.hut_B, [config.BO, options["BR"]], config, N, options
        )
        layer = layer._replace(hut_B=hut_B)
        hut_grad_input_kernel[(cdiv(N, config.BN) * cdiv(K, config.BK) * num_splits,)](
            p_g,
            p_w,
            layer.hut_A,
            p_b,
            optional(layer.bias, grad),
            optional(layer.gamma, grad),
            optional(layer.beta, grad),
            out,
            N,
            K,
            O,
            layer.sizes[2],
            num_splits,
            *grad.stride(),
            *layer_strides(layer),
            layer.spec.constant,
            layer.spec.scaling,
            HAS_BIAS=layer.bias is not None,
            HAS_GAMMA=layer.gamma is not None,
            HAS_BETA=layer.beta is not None,
            PRECISION=product_precision(grad.dtype),
            WGMMA_ASYNC=config.wgmma_async,
            TMA=tma,
            FACTOR_TMA=factor_tma,
            W_FIRST=config.W_FIRST,
            UNCHAIN=config.unchain and not triton.knobs.runtime.interpret,
            SPLIT_K=num_splits > 1,
            BN=config.BN,
            GROUP=config.GROUP,
            **options,
            **config.meta(),
        )
        if num_splits > 1:
            add_partial_sums(out, dx, layer.bias, layer.gamma, layer.beta)
    return dx
