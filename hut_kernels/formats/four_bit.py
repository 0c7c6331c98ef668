"""NF4 and FP4 of bitsandbytes: four-bit codes of a table, scaled by the absmax of their block.

W0 is `table[code] * absmax`, formed in float32 and rounded once. Two codes lie in a byte, the first
in the high half; blocks run across the ends of rows. The absmax of a block is float32, or a byte of
a 256-entry map, scaled by the absmax of its own block, plus an offset (double quantization).
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from ..errors import HUTBackendError
from .base import Layout, Stored, buffer

# Quantiles of a normal distribution, and the values of a sign, two bits of exponent and one of
# mantissa over 12. FP4's second zero has no sign in bitsandbytes' own table either.
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip


class FourBit(Stored):
    """Codes `[ceil(out * in / 2)]`, uint8, two to a byte.

    Scales: the absmax of each block, float32; or, doubly quantized, its code (uint8), the map of
    256 float32, the absmax of each block of codes (float32), and the offset (one number).
    Sizes: out_features, in_features, weights a block, codes a block of codes (0: not quantized).
    """

    @property
    def block(self) -> int:
        """Weights that share one absmax."""
        return self.form.sizes[2]

    @property
    def nested(self) -> int:
        """Codes of absmax that share one absmax of their own; 0: absmax is not quantized."""
        return self.form.sizes[3]

    @property
    def in_rows(self) -> bool:
        """True where no block runs across the end of a row."""
        return self.shape[1] % self.block == 0

    def absmax(self, first: int, last: int) -> Tensor:
        """The absmax of blocks `first ... last`, float32."""
        if not self.nested:
            return self.scales[0][first:last]
        codes, table, absmax, offset = self.scales
        start, stop = first // self.nested, -(-last // self.nested)
        codes = codes[start * self.nested : stop * self.nested]
        values = table.index_select(0, codes.int())
        values *= absmax[start:stop].repeat_interleave(self.nested)[: len(values)]
        values += offset
        return values[first - start * self.nested : last - start * self.nested]

    def _values(self, rows: slice) -> Tensor:
        columns = self.shape[1]
        begin, end = rows.start * columns, rows.stop * columns
        first, last = begin // self.block, -(-end // self.block)
        values = self._look_up(self.data[first * self.block // 2 : last * self.block // 2])
        blocks = values[: (last - first) * self.block].view(-1, self.block)
        torch.mul(blocks, self.absmax(first, last)[:, None], out=blocks)
        start = first * self.block
        return values[begin - start : end - start].view(-1, columns)

    def _look_up(self, codes: Tensor) -> Tensor:
        """Two float32 a byte, selected as one int64; then a block more, whatever is in it."""
        size = len(codes)
        index = buffer("index", size, torch.int32, codes.device).copy_(codes)
        pairs = buffer("pairs", size + self.block // 2, torch.int64, codes.device)
        table = _pairs(self.form.name, codes.device)
        torch.index_select(table, 0, index, out=pairs[:size])
        return pairs.view(torch.float32)


class RepackedFourBit(FourBit):
    """A bitsandbytes weight as an evaluation on an AVX512 CPU leaves it, changed in place.

    Byte `[n, k, j]` of `[out / 32, in / 2, 32]` holds column `2 k + j % 2` of two rows of block n:
    row `j // 2` in its low half, row `16 + j // 2` in its high half.
    """

    def _values(self, rows: slice) -> Tensor:
        columns = self.shape[1]
        first, last = rows.start // 32, -(-rows.stop // 32)
        codes = self.data[first * 16 * columns : last * 16 * columns]
        pairs = self._look_up(codes)[: 2 * len(codes)].view(-1, columns // 2, 16, 2, 2)
        # [n, k, row of 16, odd column, low half] -> [n, high half, row of 16, k, odd column]
        values = pairs.permute(0, 4, 2, 1, 3).flip(1).reshape(-1, columns // self.block, self.block)
        blocks = columns // self.block
        absmax = self.absmax(first * 32 * blocks, last * 32 * blocks).view(-1, blocks, 1)
        values = values.mul_(absmax).view(-1, columns)
        return values[rows.start - first * 32 : rows.stop - first * 32]

    def in_order(self) -> Tensor:
        """The codes as a `FourBit` has them."""
        codes = self.data.view(-1, self.shape[1] // 2, 16, 2)
        codes = torch.stack([codes & 15, codes >> 4], 1).permute(0, 1, 3, 2, 4)
        return (codes[..., 0] << 4 | codes[..., 1]).reshape(-1)


def read(weight: Any) -> FourBit:
    """A `Params4bit` taken apart.

    Raises:
        HUTBackendError: It is not quantized yet, has no data, or its bytes are no codes any more.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise HUTBackendError(
            "weight is a Params4bit that is not quantized yet: move its layer to a device first "
            "(layer.to('cpu') or .cuda()), or restore the quant_state that it has lost"
        )
    if weight.device.type == "meta":
        raise HUTBackendError("weight (Params4bit) is on the meta device: it has no data to read")
    if len(state.shape) != 2:
        raise HUTBackendError(f"weight (Params4bit) must have 2 dimensions; got {state.shape}")
    out_features, in_features = state.shape
    size, repacked = out_features * in_features, _is_repacked(weight, state)
    storage = torch.uint8 if repacked else weight.quant_storage
    # Bytes of another type than they were stored as were converted as if they were numbers.
    if weight.dtype != storage or weight.nbytes != (size + 1) // 2:
        raise HUTBackendError(
            f"weight is a Params4bit stored as {storage}, and {tuple(state.shape)} weights take "
            f"{(size + 1) // 2} bytes; got {weight.nbytes} of {weight.dtype}: a conversion such as "
            f".half() has changed its packed bytes as numbers, or a part of it is elsewhere. Load "
            f"it again, with quant_storage=torch.uint8 where the model is converted"
        )
    data = weight.data.view(torch.uint8).reshape(-1)
    scales, nested = _scales(state)
    sizes = out_features, in_features, state.blocksize, nested
    dtype = getattr(state, "original_dtype", state.dtype)
    if repacked:
        return RepackedFourBit(data, scales, Layout(f"{state.quant_type}_repacked", sizes, dtype))
    return FourBit(data, scales, Layout(state.quant_type, sizes, dtype))


def _is_repacked(weight: Any, state: Any) -> bool:
    """Tell codes in the order of `RepackedFourBit`, by their shape.

    The mark is the quant_state's, which several weights may share, one of them repacked.

    Raises:
        HUTBackendError: They have that shape, and a quant_state that knows nothing of it.
    """
    out_features, in_features = state.shape
    if weight.shape != (out_features, in_features // 2) or in_features <= 2:
        return False
    if not hasattr(state, "packing_format_for_cpu"):
        raise HUTBackendError(
            f"weight is a Params4bit of {tuple(weight.shape)} bytes, the shape that an evaluation "
            f"on a CPU repacks it to, but its quant_state is one of before: give it that of the "
            f"evaluated layer's weight, or load it again"
        )
    return True


def in_order(weight: Any) -> Any:
    """A `Params4bit` of the same W0, with a quant_state of its own, and repacked no more."""
    other = copy.copy(weight)
    other.module = None  # the layer, which asks for it when it quantizes
    state = other.quant_state = copy.copy(weight.quant_state)
    state.state2 = copy.copy(getattr(state, "state2", None))
    if hasattr(state, "packing_format_for_cpu"):
        W0 = read(weight)
        if isinstance(W0, RepackedFourBit):
            other.data = W0.in_order().view(weight.quant_storage).view(-1, 1)
        if not state.nested:
            (state.absmax,) = W0.scales
        state.dtype, state.packing_format_for_cpu = W0.dtype, False
    return other


def restored(codes: Tensor, layer: Any) -> Any:
    """The `Params4bit` of codes that have lost their class, with what their layer keeps of it.

    FSDP hands out what it has gathered as a plain parameter, and so does pickle.
    """
    state = getattr(codes, "quant_state", None) or layer.quant_state
    kind = sys.modules["bitsandbytes"].nn.Params4bit  # as sure as there is a quant_state of it
    return kind(
        codes.detach(),
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.quant_storage,
        bnb_quantized=True,
    )


def _scales(state: Any) -> tuple[tuple[Tensor, ...], int]:
    """The absmax of a `QuantState`, and the block size of its own quantization or 0."""
    if state.nested:
        codes, second = state.absmax.reshape(-1), state.state2
        if second.dtype == torch.float32 == state.offset.dtype:
            offset = state.offset.reshape(1)
            return (codes, second.code, second.absmax, offset), second.blocksize
        # What became of it on the way back from a repacked weight: formed in a 16-bit type.
        values = second.code.index_select(0, codes.int())
        values *= second.absmax.repeat_interleave(second.blocksize)[: len(values)]
        return ((values.to(second.dtype) + state.offset).float(),), 0
    # Repacking transposes it; state_dict() then restores the codes, and forgets to turn it back.
    absmax = state.absmax.t() if state.absmax.ndim > 1 else state.absmax
    return (absmax.float().reshape(-1),), 0


@functools.cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """The two table entries of each byte as one int64, `[256]`."""
    table = torch.tensor(TABLES[name.removesuffix("_repacked")])
    byte = torch.arange(256)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], 1)
    return pairs.view(torch.int64).flatten().to(device)
