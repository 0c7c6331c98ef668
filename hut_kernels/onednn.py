"""Products on a CPU: with an epilogue, by oneDNN's fused operators, and of bfloat16, widened.

Where the operators are missing, callers take PyTorch's own products. They are those that
`torch.compile` emits for a linear layer followed by a pointwise operation.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

# Elements of W that are widened at a time: 8 MB, which malloc has had before.
_WIDENED = 1 << 21


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """True for bfloat16 on a CPU whose instructions multiply it."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and _multiplies_bf16()
        and not emulates_bf16()
    )


@functools.cache
def _multiplies_bf16() -> bool:
    operators = torch.ops.mkldnn
    has_operators = torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise")
    return has_operators and operators._is_mkldnn_bf16_supported()


def linear_mul(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """`(x weight^T + 1) * other`, `[N, out]`, summed in float32 and rounded once."""
    # Dense: the operator reads its shift without regard to strides.
    shift = x.new_ones(len(weight))
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, shift, "mul")


@functools.cache
def emulates_bf16() -> bool:
    """True on an x86 CPU without bfloat16's instructions.

    There oneDNN converts in the product itself, and float32 operands are multiplied several times
    faster. Both sum in float32, so the results are the same but for the order of sums.
    """
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name)() for name in instructions if hasattr(torch.cpu, name)]
    return platform.machine() in ("x86_64", "AMD64") and len(known) == 2 and not any(known)


def is_widened(operand: Tensor) -> bool:
    """True for bfloat16 of which products are made in float32, of the same rounded operands."""
    return operand.is_cpu and operand.dtype == torch.bfloat16 and emulates_bf16()


def multiply_widened(x: Tensor, W: Tensor, out: Tensor) -> None:
    """Writes `x W`, x in float32, rounded to out's type, some columns of W at a time."""
    step = max(1, _WIDENED // max(1, len(W)))
    for first in range(0, W.shape[1], step):
        columns = slice(first, first + step)
        out[:, columns] = x @ W[:, columns].float()
