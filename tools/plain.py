"""Plain products with the tiles of a launch row: what a fused kernel's main loop is held against.

The matmul that Triton's tutorials teach, in the operand orders of HUT's kernels: pointers that wrap
at the last row and masks along the inner dimension alone, or tensor descriptors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hut_kernels.triton.launch import LaunchConfig
from hut_kernels.triton.tiles import ordered_tile


@triton.jit
def product_kernel(
    p_l, p_r, p_out, M, N, K, stride_lm, stride_lk, stride_rk, stride_rn,
    LEFT_STORED_TRANSPOSED: tl.constexpr, RIGHT_STORED_TRANSPOSED: tl.constexpr,
    STORE_TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out[M, N] = left[M, K] right[K, N]`, either of which may be stored transposed."""
    pid_m, pid_n = ordered_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    o_m = pid_m * BM + tl.arange(0, BM)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    if not TMA:
        p_left = p_l + (o_m % M)[:, None] * stride_lm + o_k[None, :] * stride_lk
        p_right = p_r + o_k[:, None] * stride_rk + (o_n % N)[None, :] * stride_rn
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        if TMA:
            if LEFT_STORED_TRANSPOSED:
                b_left = p_l.load([k * BK, pid_m * BM]).T
            else:
                b_left = p_l.load([pid_m * BM, k * BK])
            if RIGHT_STORED_TRANSPOSED:
                b_right = p_r.load([pid_n * BN, k * BK]).T
            else:
                b_right = p_r.load([k * BK, pid_n * BN])
        else:
            b_left = tl.load(p_left, mask=o_k[None, :] < K - k * BK, other=0.0)
            b_right = tl.load(p_right, mask=o_k[:, None] < K - k * BK, other=0.0)
            p_left += BK * stride_lk
            p_right += BK * stride_rk
        acc = tl.dot(b_left, b_right, acc)
    if STORE_TRANSPOSED:
        offsets = o_n.to(tl.int64)[None, :] * M + o_m[:, None]
    else:
        offsets = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p_out + offsets, acc.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def copy_kernel(p_in, p_out, K, O, BO: tl.constexpr, BK: tl.constexpr):
    """A scaled copy: what a kernel that writes W can cost at the least."""
    pid_o, pid_k = ordered_tile(tl.program_id(0), tl.cdiv(O, BO), tl.cdiv(K, BK), 8)
    o_o = (pid_o * BO + tl.arange(0, BO)).to(tl.int64)
    o_k = pid_k * BK + tl.arange(0, BK)
    offsets = o_o[:, None] * K + o_k[None, :]
    tl.store(p_out + offsets, (tl.load(p_in + offsets).to(tl.float32) * 1.5).to(tl.bfloat16))


def compile_product(kernel: str, row: LaunchConfig, N: int, size: int, w_first: bool) -> Any:
    """The plain product of `forward`, `grad_input` or `grad_factors` at a row's tiles, in bf16.

    Args:
        kernel: Whose product.
        row: Tiles, warps, stages, TMA.
        N: Tokens.
        size: `in_features` and `out_features`.
        w_first: The weight's tile is the left operand.
    """
    tokens = torch.empty(N, size, dtype=torch.bfloat16)
    weight = torch.empty(size, size, dtype=torch.bfloat16)
    if kernel == "grad_factors":  # G = g^T x
        left, right, blocks = tokens.t(), torch.empty_like(tokens), (row.BO, row.BK, row.BN)
    else:
        # y = x W^T over columns O, or dx = g W over columns K
        columns, inner = (row.BO, row.BK) if kernel == "forward" else (row.BK, row.BO)
        moving = weight.t() if kernel == "forward" else weight
        left, right, blocks = tokens, moving, (row.BN, columns, inner)
        if w_first:
            left, right, blocks = moving.t(), tokens.t(), (columns, row.BN, inner)
    BM, BN, BK = blocks
    (M, K), N_ = left.shape, right.shape[1]
    out = torch.empty(size, size, dtype=torch.float32 if kernel == "grad_factors" else left.dtype)
    return product_kernel.warmup(
        _operand(left, (BM, BK), row.TMA),
        _operand(right, (BK, BN), row.TMA),
        out,
        M,
        N_,
        K,
        *left.stride(),
        *right.stride(),
        LEFT_STORED_TRANSPOSED=left.stride(0) == 1,
        RIGHT_STORED_TRANSPOSED=right.stride(0) == 1,
        STORE_TRANSPOSED=w_first,
        TMA=row.TMA,
        BM=BM,
        BN=BN,
        BK=BK,
        **row.meta(),
        grid=(1,),
    )


def _operand(matrix: Tensor, block: tuple[int, int], tma: bool) -> Any:
    if not tma:
        return matrix
    if matrix.stride(0) == 1:
        matrix, block = matrix.t(), block[::-1]
    return TensorDescriptor.from_tensor(matrix, list(block))


def compile_copy(row: LaunchConfig, size: int) -> Any:
    """A copy of a weight in the weight kernel's tiles, in bf16."""
    weight = torch.empty(size, size, dtype=torch.bfloat16)
    options = {"BO": row.BO, "BK": row.BK, "num_warps": row.warps, "grid": (1,)}
    return copy_kernel.warmup(weight, torch.empty_like(weight), size, size, **options)
