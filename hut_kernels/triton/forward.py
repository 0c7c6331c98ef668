"""Fused forward: `y = gamma * (x W^T + bias) + beta` with W made tile by tile, never stored.

Where few tokens leave most of the device idle, several programs share K: each writes a float32
partial of its tile, and `split_k` adds them in order, so that two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Stored
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
from .stored import stored_tile, weight_operands, weight_options
from .tiles import (
    factor_tile,
    keep_wgmma_async,
    load_tile,
    modulate,
    ordered_tile,
    scale_shift,
    two_sided_tile,
)


@triton.jit(do_not_specialize=["N", "num_splits"])
def hut_forward_kernel(
    p_x,
    p_w,
    p_scales,
    p_map,
    p_scales2,
    p_offset,
    p_table,
    row_bytes,
    p_a,
    p_b,
    p_bias,
    p_gamma,
    p_beta,
    p_y,
    N,
    K,
    O,
    r,
    num_splits,
    stride_xn,
    stride_xk,
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
    SPLIT_K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    IN_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of y; with SPLIT_K its sum over a part of K, to p_y [num_splits, N, O].

    W0 is dense without a FORMAT; else it is read as it is stored, and rounded to DTYPE.
    """
    pid, split_k = tl.program_id(0), 0
    if SPLIT_K:
        pid, split_k = pid // num_splits, pid % num_splits
    pid_n, pid_o = ordered_tile(pid, tl.cdiv(N, BN), tl.cdiv(O, BO), GROUP)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_o = pid_o * BO + tl.arange(0, BO)
    m_n = o_n < N
    m_o = o_o < O
    if not TWO_SIDED:
        b_b = factor_tile(
            p_b, pid_o * BO, 0, O, r, stride_bo, stride_br, scaling, BO, BR, FACTOR
        )  # [BO, BR]

    acc = tl.zeros((BO, BN) if W_FIRST else (BN, BO), tl.float32)
    part = tl.cdiv(tl.cdiv(K, BK), num_splits) * BK if SPLIT_K else K
    for k in range(split_k * part, min(K, (split_k + 1) * part), BK):
        if FORMAT is None:
            b_w = load_tile(
                p_w, pid_o * BO, k, O, K, stride_wo, stride_wk, BO, BK, TMA, WHOLE
            )  # [BO, BK]
        else:
            b_w = stored_tile(
                p_w, p_scales, p_map, p_scales2, p_offset, p_table, o_o, k // BK, m_o, K,
                row_bytes, FORMAT, BLOCK, NESTED, IN_ROWS, PAIRS, BO, BK, ASM, DTYPE, WHOLE,
            )  # fmt: skip
        b_x = load_tile(
            p_x, pid_n * BN, k, N, K, stride_xn, stride_xk, BN, BK, TMA, WHOLE, True
        )  # [BN, BK]
        if TWO_SIDED:
            b_t = two_sided_tile(
                p_a, p_b, o_o, k + tl.arange(0, BK), r, O, K, stride_ar, stride_ak, stride_bo,
                stride_br, UNIFORM_P, UNIFORM_Q,
            )  # fmt: skip
        else:
            b_a = load_tile(
                p_a, 0, k, r, K, stride_ar, stride_ak, BR, BK, FACTOR_TMA, WHOLE and WHOLE_R
            )  # [BR, BK]
            b_t = tl.dot(b_b, b_a.to(FACTOR), input_precision=THIN)  # [BO, BK]
        b_W = modulate(b_w, b_t, constant, RESIDUAL, b_x.dtype)
        if W_FIRST:
            acc = tl.dot(b_W, tl.trans(b_x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(b_x, tl.trans(b_W), acc, input_precision=PRECISION)
        acc = keep_wgmma_async(acc, WGMMA_ASYNC)

    if W_FIRST:
        acc = tl.trans(acc)
    if not SPLIT_K:
        acc = scale_shift(acc, p_bias, p_gamma, p_beta, o_o, m_o, HAS_BIAS, HAS_GAMMA, HAS_BETA)
    o_y = (tl.cast(split_k, tl.int64) * N + o_n)[:, None] * O + o_o[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=m_n[:, None] & m_o[None, :])


def launch_forward(x: Tensor, layer: Layer, config: LaunchConfig, num_splits: int = 1) -> Tensor:
    """`[N, O]` from x `[N, K]`, any strides, with `num_splits` programs over K for each tile."""
    (N, K), O = x.shape, layer.sizes[0]
    y = torch.empty((N, O), dtype=x.dtype, device=x.device)
    partials = (num_splits, N, O)
    out = y if num_splits == 1 else torch.empty(partials, dtype=torch.float32, device=x.device)
    p_w, *stored = weight_operands(layer.weight)
    if isinstance(layer.weight, Stored):
        tma, (p_x,) = descriptors(config, (x, [config.BN, config.BK]))
    else:
        tma, (p_x, p_w) = descriptors(
            config, (x, [config.BN, config.BK]), (p_w, [config.BO, config.BK])
        )
    options = multiplier_options(layer, x.dtype, config, residual=True)
    with on_device(x):
        hut_A, factor_tma, p_a = moving_factor(
            layer.hut_A, [options["BR"], config.BK], config, N, options
        )
        layer = layer._replace(hut_A=hut_A)
        hut_forward_kernel[(cdiv(N, config.BN) * cdiv(O, config.BO) * num_splits,)](
            p_x,
            p_w,
            *stored,
            p_a,
            layer.hut_B,
            optional(layer.bias, x),
            optional(layer.gamma, x),
            optional(layer.beta, x),
            out,
            N,
            K,
            O,
            layer.sizes[2],
            num_splits,
            *x.stride(),
            *layer_strides(layer),
            layer.spec.constant,
            layer.spec.scaling,
            HAS_BIAS=layer.bias is not None,
            HAS_GAMMA=layer.gamma is not None,
            HAS_BETA=layer.beta is not None,
            PRECISION=product_precision(x.dtype),
            WGMMA_ASYNC=config.wgmma_async,
            TMA=tma,
            FACTOR_TMA=factor_tma,
            W_FIRST=config.W_FIRST,
            SPLIT_K=num_splits > 1,
            BN=config.BN,
            GROUP=config.GROUP,
            **weight_options(layer.weight, x.dtype),
            **options,
            **config.meta(),
        )
        if num_splits > 1:
            add_partial_sums(out, y, layer.bias, layer.gamma, layer.beta)
    return y
