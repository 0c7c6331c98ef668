"""What the launchers share on the host: a table row, and constexprs that follow from arguments."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..definition import Spec


@dataclass(frozen=True)
class Row:
    """One launch configuration: tile sizes, warps, pipeline stages, operand order.

    Attributes:
        BN, BO, BK: Tile sizes over tokens, out_features, in_features.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        W_FIRST: The modulated weight tile is the left operand of the product.
        TMA: Load activations and weight through tensor descriptors where their strides allow it.
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
    TMA: bool = False
    settle: bool = False
    GROUP: int = 8
    maxnreg: int | None = None

    def meta(self) -> dict[str, Any]:
        """The launch's own options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


# How many of the r columns `tiles.reduce_tile` makes at a time: 32 already spill beside G's tile.
REDUCTION_RANK = 16


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def padded_rank(r: int) -> int:
    """The next power of two from 16 up: `tl.dot` takes no smaller inner size."""
    return max(16, triton.next_power_of_2(r))


def multiplier_options(
    weight: Tensor, hut_A: Tensor, spec: Spec, dtype: torch.dtype, row: Row, residual: bool
) -> dict[str, Any]:
    """The constexprs that say how a tile of W is made.

    Args:
        weight: W0, `[O, K]`.
        hut_A: `[r, K]`.
        spec: The layer's options.
        dtype: The compute type.
        row: The launch row.
        residual: Whether T is `1 + increment` with nothing else in it.
    """
    residual = residual and spec.transform == "low_rank" and spec.offset == 1.0
    # Only an increment may be rounded to 16 bits, and only bf16 has the factors' range.
    small = residual and dtype == torch.bfloat16
    return {
        **transform_options(weight, hut_A, spec, dtype, row),
        "RESIDUAL": residual,
        "FACTOR": tl.bfloat16 if small else tl.float32,
        "BR": padded_rank(len(hut_A)),
    }


def transform_options(
    weight: Tensor, hut_A: Tensor, spec: Spec, dtype: torch.dtype, row: Row
) -> dict[str, Any]:
    """The constexprs of the transform: which it is, on what tiles, at what precision."""
    (O, K), r = weight.shape, len(hut_A)
    two_sided = spec.transform == "two_sided"
    return {
        "TWO_SIDED": two_sided,
        "UNIFORM_P": two_sided and _uniform(O, r, row.BO),
        "UNIFORM_Q": two_sided and _uniform(K, r, row.BK),
        "THIN": thin_precision(dtype),
        "BO": row.BO,
        "BK": row.BK,
    }


def _uniform(size: int, r: int, block: int) -> bool:
    """Whether every tile of `block` indices lies within one of the r groups."""
    return r == 1 or size % (r * block) == 0


def is_heavy(weight: Tensor, r: int, spec: Spec, dtype: torch.dtype, row: Row) -> bool:
    """Whether a call's tiles need more memory than a plain one's, for which the tables were made.

    So it is with a weight wider than the compute type or stored transposed, and with `two_sided`
    where a tile holds pieces of several groups: its factors are gathered, `[BO, BK]` each.
    """
    O, K = weight.shape
    ragged = not (_uniform(O, r, row.BO) and _uniform(K, r, row.BK))
    wide = weight.dtype.itemsize > dtype.itemsize
    return wide or weight.stride(1) != 1 or (spec.transform == "two_sided" and ragged)


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


def descriptors(row: Row, *operands: tuple[Tensor, list[int]]) -> tuple[bool, list[Any]]:
    """The operands, each given with its block shape, as TMA descriptors if all of them can be.

    Returns:
        Whether they are descriptors, and they or the tensors themselves.
    """
    if row.TMA and all(_describable(tensor) for tensor, _ in operands):
        return True, [TensorDescriptor.from_tensor(tensor, block) for tensor, block in operands]
    return False, [tensor for tensor, _ in operands]


def _describable(tensor: Tensor) -> bool:
    """Rows of unit stride that do not overlap, on 16-byte addresses: what the hardware takes."""
    rows, columns = tensor.stride()
    aligned = tensor.data_ptr() % 16 == 0 and rows * tensor.element_size() % 16 == 0
    return columns == 1 and rows >= tensor.shape[1] > 0 and aligned


def optional(vector: Tensor | None, stand_in: Tensor) -> Tensor:
    """A contiguous vector, or any tensor for a pointer that the kernel never reads."""
    return stand_in if vector is None else vector.contiguous()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current around a launch."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
