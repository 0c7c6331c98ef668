"""Fused forward: `y = gamma * (x W^T + bias) + beta` with W made tile by tile, never stored.

Where few tokens leave most of the device idle, several programs share K: each writes a float32
partial of its tile, and `split.add_parts` adds them in order, so that two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition import Spec
from .launch import (
    Row,
    cdiv,
    descriptors,
    multiplier_options,
    on_device,
    optional,
    product_precision,
)
from .split import add_parts
from .tiles import (
    factor_tile,
    load_tile,
    modulate,
    ordered_tile,
    scale_shift,
    settle,
    two_sided_tile,
)


@triton.jit
def hut_forward_kernel(
    p_x,
    p_w,
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
    splits,
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
    THIN: tl.constexpr,
    PRECISION: tl.constexpr,
    SETTLE: tl.constexpr,
    TMA: tl.constexpr,
    W_FIRST: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of y; with IS_SPLIT its sum over a part of K, to p_y [splits, N, O]."""
    pid = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
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
    part = tl.cdiv(tl.cdiv(K, BK), splits) * BK
    for k in range(split * part, min(K, (split + 1) * part), BK):
        b_w = load_tile(p_w, pid_o * BO, k, O, K, stride_wo, stride_wk, BO, BK, TMA)  # [BO, BK]
        b_x = load_tile(p_x, pid_n * BN, k, N, K, stride_xn, stride_xk, BN, BK, TMA)  # [BN, BK]
        if TWO_SIDED:
            b_t = two_sided_tile(
                p_a, p_b, o_o, k + tl.arange(0, BK), r, O, K, stride_ar, stride_ak, stride_bo,
                stride_br, UNIFORM_P, UNIFORM_Q,
            )  # fmt: skip
        else:
            b_a = factor_tile(p_a, 0, k, r, K, stride_ar, stride_ak, 1.0, BR, BK, FACTOR)
            b_t = tl.dot(b_b, b_a, input_precision=THIN)  # [BO, BK]
        b_W = modulate(b_w, b_t, constant, RESIDUAL, b_x.dtype)
        if W_FIRST:
            acc = tl.dot(b_W, tl.trans(b_x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(b_x, tl.trans(b_W), acc, input_precision=PRECISION)
        acc = settle(acc, SETTLE)

    if W_FIRST:
        acc = tl.trans(acc)
    if not IS_SPLIT:
        acc = scale_shift(acc, p_bias, p_gamma, p_beta, o_o, m_o, HAS_BIAS, HAS_GAMMA, HAS_BETA)
    o_y = (split.to(tl.int64) * N + o_n)[:, None] * O + o_o[None, :]
    tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=m_n[:, None] & m_o[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
    row: Row,
    split: int = 1,
) -> Tensor:
    """`[N, O]` from x `[N, K]`, any strides, with `split` programs over K for each tile."""
    (N, K), O = x.shape, len(weight)
    y = torch.empty((N, O), dtype=x.dtype, device=x.device)
    out = y if split == 1 else torch.empty((split, N, O), dtype=torch.float32, device=x.device)
    tma, (p_x, p_w) = descriptors(row, (x, [row.BN, row.BK]), (weight, [row.BO, row.BK]))
    with on_device(x):
        hut_forward_kernel[(cdiv(N, row.BN) * cdiv(O, row.BO) * split,)](
            p_x,
            p_w,
            hut_A,
            hut_B,
            optional(bias, x),
            optional(gamma, x),
            optional(beta, x),
            out,
            N,
            K,
            O,
            len(hut_A),
            split,
            *x.stride(),
            *weight.stride(),
            *hut_A.stride(),
            *hut_B.stride(),
            spec.constant,
            spec.scaling,
            HAS_BIAS=bias is not None,
            HAS_GAMMA=gamma is not None,
            HAS_BETA=beta is not None,
            PRECISION=product_precision(x.dtype),
            SETTLE=row.settle,
            TMA=tma,
            W_FIRST=row.W_FIRST,
            IS_SPLIT=split > 1,
            BN=row.BN,
            GROUP=row.GROUP,
            **multiplier_options(weight, hut_A, spec, x.dtype, row, residual=True),
            **row.meta(),
        )
        if split > 1:
            add_parts(out, y, bias, gamma, beta)
    return y
