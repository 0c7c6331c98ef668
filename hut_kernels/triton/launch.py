"""The launchers' host side: launch configs, split-K, constexprs that follow from arguments."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formats import FourBit, Stored
from ..layer import Layer

# An option of every launch: left unset it turns off in Triton 3.10, and results and speed change.
FP_FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class LaunchConfig:
    """One launch configuration: tile sizes, warps, pipeline stages, operand order.

    Attributes:
        BN, BO, BK: Tile sizes over tokens, out_features, in_features.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        W_FIRST: The modulated weight tile is the left operand of the product.
        TMA: Load activations and weight through tensor descriptors where their strides allow it.
        wgmma_async: Keep wgmma's from being serialized (`tiles.keep_wgmma_async`); only on sm_90.
        unchain: Arrange the warps of T's product by its own shape (`tiles.unchain`); for mma.sync.
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
    wgmma_async: bool = False
    unchain: bool = False
    GROUP: int = 8
    maxnreg: int | None = None

    def meta(self) -> dict[str, Any]:
        """The launch's own options."""
        options = {"num_warps": self.warps, "num_stages": self.stages, **FP_FUSION}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


# How many of the r columns `grad_factors` reduces at a time in float32: 32 spill beside G's tile.
REDUCTION_RANK = 16


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def padded_rank(r: int) -> int:
    """The next power of two from 16 up: `tl.dot` takes no smaller inner size."""
    return max(16, triton.next_power_of_2(r))


def choose_num_splits(tiles: int, steps: int, sms: int) -> int:
    """The splits of K for each tile of a fused forward (split-K).

    As many programs as fill the device where the tiles alone do not, but each with 4 of the `steps`
    over K at least, or its pipeline never runs full.
    """
    wanted = -(-sms // max(1, tiles)) if 2 * tiles <= sms else 1
    return max(1, min(wanted, steps // 4, 16))


def busy_programs(sms: int, warps: int) -> int:
    """The programs that keep a device busy: eight warps on each of its multiprocessors."""
    return cdiv(8 * sms, warps)


@functools.lru_cache(maxsize=1024)
def choose_reduction_splits(
    tiles_o: int, tiles_k: int, O: int, K: int, r: int, partial_bytes: int, programs: int
) -> tuple[int, int]:
    """The splits of O and of K in a factor-gradient kernel: one program for each pair of them.

    Each split of O costs a partial of d hut_A, each split of K one of d hut_B, in memory and in
    bytes moved. The partials together stay within `partial_bytes` (one split each is no partial at
    all but the result). Splits of K come first: with one for each tile of columns a program writes
    its rows of d hut_B once. Fewer are taken only where less than 7/8 of the device would be busy,
    which `programs` fill: no split leaves a wave of them nearly empty.

    Returns:
        `(o_splits, k_splits)`, none of them empty.
    """
    best, busy = (1, 1), 0.0
    k_splits = max(1, tiles_k)
    while True:
        spare = partial_bytes // (4 * max(1, r)) - (k_splits - 1) * O
        for waves in (1, 2):
            filling = waves * programs // k_splits
            most = min(max(1, tiles_o), filling, 1 + spare // max(1, K))
            if spare >= 0 and most >= 1:
                o_splits = -(-tiles_o // -(-tiles_o // most)) if tiles_o else 1
                share = o_splits * k_splits / (cdiv(o_splits * k_splits, programs) * programs)
                if share > busy:
                    best, busy = (o_splits, k_splits), share
        if k_splits == 1 or busy >= 7 / 8:
            return best
        k_splits = _fewer(tiles_k, k_splits)


def _fewer(tiles: int, splits: int) -> int:
    """The next smaller number of equal splits of `tiles` that leaves none empty."""
    length = -(-tiles // (splits - 1))
    return -(-tiles // length)


def layer_strides(layer: Layer) -> tuple[int, ...]:
    """The strides of weight, hut_A and hut_B, two each, in the kernels' order."""
    operands = layer.weight, layer.hut_A, layer.hut_B
    return tuple(stride for operand in operands for stride in operand.stride()[-2:])


def expert_strides(layer: Layer) -> tuple[int, ...]:
    """The strides from one expert to the next of weight, hut_A and hut_B; 0 for a layer."""
    operands = layer.weight, layer.hut_A, layer.hut_B
    return tuple(operand.stride(0) if operand.ndim == 3 else 0 for operand in operands)


def multiplier_options(
    layer: Layer, dtype: torch.dtype, config: LaunchConfig, residual: bool
) -> dict[str, Any]:
    """The constexprs that say how a tile of W is made.

    Args:
        layer: The layer.
        dtype: The compute type.
        config: The launch config.
        residual: Whether T is `1 + increment` with nothing else in it.
    """
    spec = layer.spec
    residual = residual and spec.transform == "low_rank" and spec.offset == 1.0
    # Only an increment may be rounded to 16 bits, and only bf16 has the factors' range.
    small = residual and dtype == torch.bfloat16
    return {
        **transform_options(layer, dtype, config),
        "RESIDUAL": residual,
        "FACTOR": tl.bfloat16 if small else tl.float32,
        "BR": padded_rank(layer.sizes[2]),
        "WHOLE_R": layer.sizes[2] == padded_rank(layer.sizes[2]),
    }


def moving_factor(
    factor: Tensor, block: list[int], config: LaunchConfig, N: int, options: dict[str, Any]
) -> tuple[Tensor, bool, Any]:
    """The factor whose tiles move with the main loop, rounded once a call to the operand type.

    Rounded in the kernel it would be read in twice the bytes and rounded by every program; that is
    cheaper than another launch where few tokens leave W0's own bytes to cover those of a thin one.

    Returns:
        The factor; whether the kernel takes it as a TMA descriptor with tiles of `block`; the
        descriptor, or else the factor.
    """
    covered = N <= 16 and options["BR"] <= 16
    if options["TWO_SIDED"] or options["FACTOR"] != tl.bfloat16 or covered:
        return factor, False, factor
    factor = factor.to(torch.bfloat16, memory_format=torch.contiguous_format)
    tma, (operand,) = descriptors(config, (factor, block))
    return factor, tma, operand


def transform_options(layer: Layer, dtype: torch.dtype, config: LaunchConfig) -> dict[str, Any]:
    """The constexprs of the transform: which it is, on what tiles, at what precision."""
    O, K, r = layer.sizes
    two_sided = layer.spec.transform == "two_sided"
    return {
        "TWO_SIDED": two_sided,
        "UNIFORM_P": two_sided and _is_uniform(O, r, config.BO),
        "UNIFORM_Q": two_sided and _is_uniform(K, r, config.BK),
        "THIN": thin_precision(dtype),
        "WHOLE": O % config.BO == 0 and K % config.BK == 0,
        "BO": config.BO,
        "BK": config.BK,
    }


def _is_uniform(size: int, r: int, block: int) -> bool:
    """True where every tile of `block` indices lies within one of the r groups."""
    return r == 1 or size % (r * block) == 0


def is_heavy(kernel: str, layer: Layer, dtype: torch.dtype, config: LaunchConfig) -> bool:
    """True where a call's tiles need more memory than a plain one's, for which the tables are made.

    So it is with a weight wider than the compute type or stored transposed, and with `two_sided`
    where a tile holds pieces of several groups: its factors are gathered, `[BO, BK]` each. A stored
    weight comes in the compute type; four bits' kernels are made for blocks within rows, and the
    reduction for four bits.
    """
    (O, K, r), weight = layer.sizes, layer.weight
    ragged = not (_is_uniform(O, r, config.BO) and _is_uniform(K, r, config.BK))
    wide = not isinstance(weight, Stored) and weight.dtype.itemsize > dtype.itemsize
    if kernel in ("stored", "stored_reduce") and isinstance(weight, FourBit) and not weight.in_rows:
        return True
    if kernel == "stored_reduce" and not isinstance(weight, FourBit):
        return True
    if kernel == "grad_reduce" and (O % config.BO or K % config.BK):
        return True  # its masks take registers, beside tiles that leave none
    return wide or weight.stride()[-1] != 1 or (layer.spec.transform == "two_sided" and ragged)


def is_transposed(weight: Tensor) -> bool:
    """True where W0 is stored `[in, out]`, as Conv1D's: the weight of a layer of `W^T` as it lies.

    By its own strides it would have no asynchronous copies, and no descriptors.
    """
    rows, columns = weight.stride()
    return rows == 1 and columns != 1


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


def descriptors(
    config: LaunchConfig, *operands: tuple[Tensor, list[int]]
) -> tuple[bool, list[Any]]:
    """The operands, each given with its block shape, as TMA descriptors if all of them can be.

    Returns:
        Whether they are descriptors, and they or the tensors themselves.
    """
    if config.TMA and all(_describable(tensor) for tensor, _ in operands):
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
