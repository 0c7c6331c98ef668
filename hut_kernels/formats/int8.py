"""Int8 codes with one scale a row: bitsandbytes' `Int8Params` and torchao's `Int8Tensor`.

bitsandbytes: W0 is `code * SCB * (1 / 127)`, multiplied from the left in float32. torchao: W0 is
`(code - zero_point) * scale`. Both are rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import HUTBackendError
from .base import Layout, Stored, buffer

RECIPROCAL = 7.874015718698502e-3  # of 127, as bitsandbytes writes it


class Int8Rows(Stored):
    """Codes `[out * in]`, int8, row by row.

    Scales: one float32 a row; then, where there are any, the zero points, one int8 a row.
    Sizes: out_features, in_features, and 1 where the scale is yet to be divided by 127.
    """

    @property
    def over_127(self) -> bool:
        """True if the product with the scale is divided by 127."""
        return bool(self.form.sizes[2])

    def _values(self, rows: slice) -> Tensor:
        columns = self.shape[1]
        codes = self.data[rows.start * columns : rows.stop * columns].view(-1, columns)
        values = buffer("rows", codes.numel(), torch.float32, codes.device).view(codes.shape)
        values.copy_(codes)
        if len(self.scales) > 1:
            values -= self.scales[1][rows, None]
        values *= self.scales[0][rows, None]
        return values.mul_(RECIPROCAL) if self.over_127 else values


def read_bitsandbytes(weight: Any) -> Stored:
    """An `Int8Params` taken apart.

    Raises:
        HUTBackendError: It is not quantized, or its scales are elsewhere.
    """
    if weight.dtype != torch.int8:
        raise HUTBackendError(
            f"weight is an Int8Params of {weight.dtype}, which is not quantized yet: move its "
            f"layer to a device first (layer.to('cpu') or .cuda()), with has_fp16_weights=False"
        )
    if weight.device.type == "meta":
        raise HUTBackendError("weight (Int8Params) is on the meta device: it has no data to read")
    if getattr(weight, "SCB", None) is None:
        raise HUTBackendError(
            "weight is an Int8Params without its row scales, which a forward of its Linear8bitLt "
            "has moved to layer.state: set layer.weight.SCB = layer.state.SCB first"
        )
    scale = weight.SCB.to(weight.device).reshape(-1)
    form = Layout("int8", (*weight.shape, 1), torch.float32)
    return Int8Rows(weight.data.reshape(-1), (scale,), form)


def read_torchao(weight: Any) -> Stored | None:
    """An `Int8Tensor` taken apart; None where it has no scale for each whole row.

    Raises:
        HUTBackendError: Its inputs are scaled before it.
    """
    if weight.act_pre_scale is not None:
        raise HUTBackendError(
            "weight is an Int8Tensor with act_pre_scale, which scales the layer's inputs as well: "
            "HUT multiplies weights only"
        )
    if weight.ndim != 2 or list(weight.block_size) != [1, weight.shape[1]]:
        return None
    scales: tuple[Tensor, ...] = (weight.scale.float().reshape(-1),)
    if weight.zero_point is not None:
        scales = (*scales, weight.zero_point.reshape(-1))
    return Int8Rows(
        weight.qdata.reshape(-1), scales, Layout("int8", (*weight.shape, 0), weight.dtype)
    )
