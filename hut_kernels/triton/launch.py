"""What the launchers share on the host: a table row, and constexprs that follow from arguments."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definition import Spec


@dataclass(frozen=True)
class Row:
    """One launch configuration: tile sizes, warps, pipeline stages, operand order.

    Attributes:
        BN, BO, BK: Tile sizes over tokens, out_features, in_features.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        W_FIRST: The modulated weight tile is the left operand of the product.
        settle: Keep wgmma's from being serialised (`tiles.settle`); sm_90 alone.
        GROUP: Tile rows that share a sweep over the columns (L2 reuse).
        maxnreg: Register limit a thread, or None.
    """

    BN: int
    BO: int
    BK: int
    warps: int
    stages: int
    W_FIRST: bool = False
    settle: bool = False
    GROUP: int = 8
    maxnreg: int | None = None

    def meta(self) -> dict[str, Any]:
        """The launch's own options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def padded_rank(r: int) -> int:
    """The next power of two from 16 up: `tl.dot` takes no smaller inner size."""
    return max(16, triton.next_power_of_2(r))


def reduction_rank(r: int) -> int:
    """How many of the r columns `tiles.reduce_tile` makes at a time."""
    return min(padded_rank(r), 32)


def multiplier_options(
    weight: Tensor, hut_A: Tensor, spec: Spec, dtype: torch.dtype, row: Row, residual: bool
) -> dict[str, Any]:
    """The constexprs of `tiles.multiplier_tile` and `tiles.modulate`.

    Args:
        weight: W0, `[O, K]`.
        hut_A: `[r, K]`.
        spec: The layer's options.
        dtype: The compute type.
        row: The launch row.
        residual: Whether T is `1 + increment` with nothing else in it.
    """
    (O, K), r = weight.shape, len(hut_A)
    two_sided = spec.transform == "two_sided"
    residual = residual and not two_sided and spec.offset == 1.0
    # Only an increment may be rounded to 16 bits, and only bf16 has the factors' range.
    small = residual and dtype == torch.bfloat16
    return {
        "TWO_SIDED": two_sided,
        "UNIFORM_P": two_sided and _uniform(O, r, row.BO),
        "UNIFORM_Q": two_sided and _uniform(K, r, row.BK),
        "RESIDUAL": residual,
        "FACTOR": tl.bfloat16 if small else tl.float32,
        "THIN": thin_precision(dtype),
        "BO": row.BO,
        "BK": row.BK,
        "BR": padded_rank(r),
    }


def _uniform(size: int, r: int, block: int) -> bool:
    """Whether every tile of `block` indices lies within one of the r groups."""
    return r == 1 or size % (r * block) == 0


def kind(dtype: torch.dtype) -> str:
    """The tables' name of a compute type: `"bf16"`, `"fp16"`, `"tf32"` or `"fp32"`."""
    if dtype == torch.float32:
        return "tf32" if product_precision(dtype) == "tf32" else "fp32"
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def product_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a product in `dtype`: tf32 only for float32, and only where allowed."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def thin_precision(dtype: torch.dtype) -> str:
    """`input_precision` of thin float32 products: tf32 is enough beside 16-bit products."""
    return "tf32" if dtype != torch.float32 else product_precision(dtype)


def optional(vector: Tensor | None, stand_in: Tensor) -> Tensor:
    """A contiguous vector, or any tensor for a pointer that the kernel never reads."""
    return stand_in if vector is None else vector.contiguous()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current around a launch."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
