"""The formats in which a frozen weight may be stored, one file each; docs/quantized.md.

A dense weight is a plain tensor, and stays one. `Stored` is one that a Triton kernel and PyTorch
read a piece at a time: `four_bit.py`, `int8.py`. Any other tensor that dequantizes itself is made
dense for each pass. The libraries are recognized by their classes' names and never imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import HUTBackendError
from . import four_bit, int8
from .base import Layout, Stored
from .four_bit import FourBit, RepackedFourBit
from .int8 import Int8Rows
from .modules import (
    base_weight,
    compute_dtype,
    dense_dtype,
    float_dtype,
    forget_quantization,
    load_statistics,
    multiplies_only,
    shared,
    statistics,
    warn_of_size,
)

__all__ = [
    "FORMATS",
    "FourBit",
    "Layout",
    "RepackedFourBit",
    "Stored",
    "base_weight",
    "compute_dtype",
    "dense",
    "dense_dtype",
    "float_dtype",
    "forget_quantization",
    "is_quantized",
    "load_statistics",
    "multiplies_only",
    "restore",
    "shared",
    "statistics",
    "stored",
    "warn_of_size",
]

FORMATS: dict[str, type[Stored]] = {
    "nf4": FourBit,
    "fp4": FourBit,
    "nf4_repacked": RepackedFourBit,
    "fp4_repacked": RepackedFourBit,
    "int8": Int8Rows,
}
_PLAIN = (Tensor, torch.nn.Parameter)


def stored(weight: Tensor) -> Tensor | Stored:
    """The weight as the operators take it: taken apart where it is quantized in a known format.

    Raises:
        HUTBackendError: A quantized weight that cannot be read, with the reason and a way out.
    """
    kind = type(weight)
    if kind in _PLAIN:
        return weight
    names = {base.__name__ for base in kind.__mro__}
    if "Params4bit" in names:
        return four_bit.read(weight)
    if "Int8Params" in names:
        return int8.read_bitsandbytes(weight)
    if kind.__module__.startswith("torchao."):
        if kind.__name__ == "Int8Tensor" and (rows := int8.read_torchao(weight)) is not None:
            return rows
        if not _dequantizes(kind):
            raise HUTBackendError(
                f"weight is a {kind.__name__}, which has no dequantize() of its own: quantize with "
                f"another configuration (docs/quantized.md lists those that work), or leave this "
                f"layer out of quantization"
            )
    return weight


def restore(data: Tensor, scales: Sequence[Tensor] | None, text: str) -> Tensor | Stored:
    """The weight from what an operator was given of it; a dense one, without text, is the data."""
    if not text:
        return data
    form = Layout.parse(text)
    return FORMATS[form.name](data, tuple(scales or ()), form)


def dense(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense weight for one pass: the weight itself, or what it dequantizes to.

    `dtype` is the compute type of a stored weight, which the operators read by themselves.
    """
    if dtype is not None and isinstance(W0 := stored(weight), Stored):
        return W0.dense(dtype)
    kind = type(weight)
    return weight.dequantize() if kind not in _PLAIN and _dequantizes(kind) else weight


def is_quantized(weight: Tensor) -> bool:
    """Tell a weight that is not a plain one, but can be read.

    Raises:
        HUTBackendError: As `stored`.
    """
    kind = type(weight)
    return kind not in _PLAIN and (isinstance(stored(weight), Stored) or _dequantizes(kind))


def _dequantizes(kind: type[Tensor]) -> bool:
    """Tell a subclass with a method `dequantize` of its own; Tensor has one that does nothing."""
    own = inspect.getattr_static(kind, "dequantize")
    return own is not inspect.getattr_static(Tensor, "dequantize") and not isinstance(
        own, staticmethod
    )
