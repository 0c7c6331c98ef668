"""Fused input gradient: `dx = (gamma * g) W` with W made again tile by tile."""

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
    product_precision,
)
from .split import add_parts
from .tiles import factor_tile, load_tile, modulate, ordered_tile, settle, two_sided_tile


@triton.jit
def hut_grad_input_kernel(
    p_g,
    p_w,
    p_a,
    p_b,
    p_dx,
    N,
    K,
    O,
    r,
    splits,
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
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    THIN: tl.constexpr,
    PRECISION: tl.constexpr,
    SETTLE: tl.constexpr,
    TMA: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of dx; with IS_SPLIT its sum over a part of O, to p_dx [splits, N, K]."""
    pid = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    pid_n, pid_k = ordered_tile(pid, tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_k = pid_k * BK + tl.arange(0, BK)
    if not TWO_SIDED:
        b_a = factor_tile(
            p_a, 0, pid_k * BK, r, K, stride_ar, stride_ak, scaling, BR, BK, FACTOR
        )  # [BR, BK]

    acc = tl.zeros((BN, BK), tl.float32)
    part = tl.cdiv(tl.cdiv(O, BO), splits) * BO
    for o in range(split * part, min(O, (split + 1) * part), BO):
        o_o = o + tl.arange(0, BO)
        b_g = load_tile(p_g, pid_n * BN, o, N, O, stride_gn, stride_go, BN, BO, TMA)  # [BN, BO]
        b_w = load_tile(p_w, o, pid_k * BK, O, K, stride_wo, stride_wk, BO, BK, TMA)  # [BO, BK]
        if TWO_SIDED:
            b_t = two_sided_tile(
                p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
                UNIFORM_P, UNIFORM_Q,
            )  # fmt: skip
        else:
            b_b = factor_tile(p_b, o, 0, O, r, stride_bo, stride_br, 1.0, BO, BR, FACTOR)
            b_t = tl.dot(b_b, b_a, input_precision=THIN)  # [BO, BK]
        b_W = modulate(b_w, b_t, constant, RESIDUAL, b_g.dtype)
        acc = tl.dot(b_g, b_W, acc, input_precision=PRECISION)
        acc = settle(acc, SETTLE)

    o_dx = (split.to(tl.int64) * N + o_n)[:, None] * K + o_k[None, :]
    mask = (o_n < N)[:, None] & (o_k < K)[None, :]
    tl.store(p_dx + o_dx, acc.to(p_dx.dtype.element_ty), mask=mask)


def grad_input(
    grad: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    row: Row,
    split: int = 1,
) -> Tensor:
    """`[N, K]` from grad `[N, O]`, any strides, with `split` programs over O for each tile.

    gamma joins grad before, in one pass over few tokens: a load of it in the main loop would keep
    the tensor cores of sm_90 waiting (ptxas C7519).
    """
    (N, O), K = grad.shape, weight.shape[1]
    if gamma is not None:
        grad = torch.mul(grad, gamma, out=torch.empty_like(grad))  # multiplied in float32
    dx = torch.empty((N, K), dtype=grad.dtype, device=grad.device)
    out = dx if split == 1 else torch.empty((split, N, K), dtype=torch.float32, device=dx.device)
    tma, (p_g, p_w) = descriptors(row, (grad, [row.BN, row.BO]), (weight, [row.BO, row.BK]))
    grid = (cdiv(N, row.BN) * cdiv(K, row.BK) * split,)
    with on_device(grad):
        hut_grad_input_kernel[grid](
            p_g,
            p_w,
            hut_A,
            hut_B,
            out,
            N,
            K,
            O,
            len(hut_A),
            split,
            *grad.stride(),
            *weight.stride(),
            *hut_A.stride(),
            *hut_B.stride(),
            spec.constant,
            spec.scaling,
            PRECISION=product_precision(grad.dtype),
            SETTLE=row.settle,
            TMA=tma,
            IS_SPLIT=split > 1,
            BN=row.BN,
            GROUP=row.GROUP,
            **multiplier_options(weight, hut_A, spec, grad.dtype, row, residual=True),
            **row.meta(),
        )
        if split > 1:
            add_parts(out, dx)
    return dx
