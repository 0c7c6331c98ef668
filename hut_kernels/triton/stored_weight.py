"""The weight kernel over a stored W0: `gamma (W0 * (T - 1 or 0))`, or W0 itself, into memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Stored
from ..layer import Layer
from .launch import LaunchConfig, cdiv, multiplier_options, on_device, optional
from .stored import (
    modulate_pairs,
    pair_tile,
    stored_operands,
    stored_options,
    stored_tile,
)
from .tiles import factor_tile, keep_wgmma_async, modulate, two_sided_tile


@triton.jit
def hut_stored_weight_kernel(
    p_w,
    p_scales,
    p_map,
    p_scales2,
    p_offset,
    p_table,
    p_a,
    p_b,
    p_gamma,
    p_out,
    K,
    O,
    r,
    row_bytes,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    constant,
    scaling,
    MULTIPLY: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    UNIFORM_P: tl.constexpr,
    UNIFORM_Q: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    THIN: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_R: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ASM: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    # Row by row: both factors stay in L2, and a better order would cost divisions.
    tiles_k = tl.cdiv(K, BK)
    pid_o, pid_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    o_o = pid_o * BO + tl.arange(0, BO)
    o_k = pid_k * BK + tl.arange(0, BK)
    m_o = o_o < O
    m_k = o_k < K
    dtype: tl.constexpr = p_out.dtype.element_ty

    if TWO_SIDED:
        b_t = two_sided_tile(
            p_a, p_b, o_o, o_k, r, O, K, stride_ar, stride_ak, stride_bo, stride_br,
            UNIFORM_P, UNIFORM_Q,
        )  # fmt: skip
    elif MULTIPLY:
        b_b = factor_tile(
            p_b, pid_o * BO, 0, O, r, stride_bo, stride_br, scaling, BO, BR, FACTOR
        )  # [BO, BR]
        b_a = factor_tile(p_a, 0, pid_k * BK, r, K, stride_ar, stride_ak, 1.0, BR, BK, FACTOR)
        # Or T's constant would become the accumulator's first value, set behind wgmma's fence.
        b_t = keep_wgmma_async(tl.dot(b_b, b_a, input_precision=THIN), ASM)  # [BO, BK]

    if PACKED:  # pairs of weights from the look-up to memory
        b_pairs = pair_tile(
            p_w, p_scales, p_map, p_scales2, p_offset, o_o, pid_k, m_o, K, row_bytes,
            FORMAT, BLOCK, NESTED, BO, BK, ASM, dtype, WHOLE,
        )  # [BO, BK / 2]  # fmt: skip
        if MULTIPLY:
            b_pairs = modulate_pairs(b_pairs, b_t, BO, BK, dtype)
        o_pair = pid_k * (BK // 2) + tl.arange(0, BK // 2)
        offsets = o_o.to(tl.int64)[:, None] * row_bytes + o_pair[None, :]
        p_pairs = p_out.to(tl.pointer_type(tl.int32)) + offsets
        if WHOLE:
            tl.store(p_pairs, b_pairs)
        else:
            tl.store(p_pairs, b_pairs, mask=m_o[:, None] & (o_pair < row_bytes)[None, :])
    else:
        b_w = stored_tile(
            p_w, p_scales, p_map, p_scales2, p_offset, p_table, o_o, pid_k, m_o, K, row_bytes,
            FORMAT, BLOCK, NESTED, IN_ROWS, PAIRS, BO, BK, ASM, dtype, WHOLE,
        )  # fmt: skip
        if HAS_GAMMA:
            gamma = tl.load(p_gamma + o_o, mask=m_o, other=0.0).to(tl.float32)
            b_w = modulate(b_w, (constant + b_t) * gamma[:, None], 0.0, False, dtype)
        elif MULTIPLY:
            b_w = modulate(b_w, b_t, constant, RESIDUAL, dtype)
        offsets = o_o.to(tl.int64)[:, None] * K + o_k[None, :]
        tl.store(p_out + offsets, b_w, mask=m_o[:, None] & m_k[None, :])


def launch_stored_weight(
    layer: Layer,
    dtype: torch.dtype,
    config: LaunchConfig,
    subtract_identity: bool = False,
    exact: bool = False,
) -> Tensor:
    """`gamma (W0 * T)` of a layer whose W0 is stored; arguments and result as `launch_weight`'s."""
    residual = layer.gamma is None and not subtract_identity and not exact
    options = multiplier_options(layer, dtype, config, residual)
    if exact:
        options["THIN"] = "ieee"
    constant = layer.spec.constant - subtract_identity
    factors = layer.hut_A, layer.hut_B
    return _launch(
        layer.weight, factors, layer.gamma, constant, layer.spec.scaling, dtype, config, options
    )


def launch_dequantize(weight: Stored, dtype: torch.dtype, config: LaunchConfig) -> Tensor:
    """W0, `[O, K]`, in `dtype`."""
    options = {
        "TWO_SIDED": False, "UNIFORM_P": False, "UNIFORM_Q": False, "RESIDUAL": True,
        "FACTOR": tl.float32, "THIN": "ieee", "BO": config.BO, "BK": config.BK, "BR": 16,
        "WHOLE": False, "WHOLE_R": False,
    }  # fmt: skip
    return _launch(weight, None, None, 0.0, 1.0, dtype, config, options)


def _launch(
    weight: Stored,
    factors: tuple[Tensor, Tensor] | None,
    gamma: Tensor | None,
    constant: float,
    scaling: float,
    dtype: torch.dtype,
    config: LaunchConfig,
    options: dict[str, Any],
) -> Tensor:
    O, K = weight.shape
    out = torch.empty((O, K), dtype=dtype, device=weight.device)
    hut_A, hut_B = factors or (out, out)
    stored = stored_options(weight, dtype)
    with on_device(out):
        hut_stored_weight_kernel[(cdiv(O, config.BO) * cdiv(K, config.BK),)](
            *stored_operands(weight),
            hut_A,
            hut_B,
            optional(gamma, out),
            out,
            K,
            O,
            len(hut_A) if factors else 0,
            K // 2,
            *hut_A.stride(),
            *hut_B.stride(),
            constant,
            scaling,
            MULTIPLY=factors is not None,
            HAS_GAMMA=gamma is not None,
            # A pair of 16-bit weights goes from the look-up to memory as one word.
            PACKED=stored["PAIRS"] and options["RESIDUAL"] and gamma is None,
            **stored,
            **options,
            **config.meta(),
        )
    return out
