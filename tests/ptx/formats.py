"""Number formats that NumPy lacks (bf16, tf32, two values in a register), and sums rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def odd_sum(a: Array, b: Array) -> Array:
    """`a + b` in float64, rounded to odd, so that a later rounding to fewer bits is exact.

    Rounding twice to nearest differs from rounding once; rounding to odd first does not, given two
    bits to spare.
    """
    total = a + b
    c = total - a
    rest = (a - (total - c)) + (b - c)  # what the sum lost, exactly
    return _odd(total, rest, np.int64)


def _odd(nearest: Array, rest: Array, bits: type) -> Array:
    """`nearest + rest`, of which `nearest` is the rounding, rounded to odd."""
    even = (rest != 0) & np.isfinite(nearest) & (nearest.view(bits) & 1 == 0)
    if not even.any():
        return nearest
    toward = np.where(rest > 0, np.inf, -np.inf).astype(nearest.dtype)
    return np.where(even, np.nextafter(nearest, toward), nearest)


def to_16(value: Array, kind: str) -> Array:
    """The bits of `value` (float32 or float64) in `"f16"` or `"bf16"`, rounded once, to even."""
    with np.errstate(all="ignore"):
        if kind == "f16":
            return value.astype(np.float16).view(np.uint16)
        single = value.astype(np.float32)
        if value.dtype == np.float64:
            single = _odd(single, value - single, np.int32)
        bits = np.ascontiguousarray(single).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return np.where(np.isnan(single), 0x7FFF, rounded >> np.uint32(16)).astype(np.uint16)


def from_16(bits: Array, kind: str) -> Array:
    """float32 of 16-bit patterns."""
    bits = np.ascontiguousarray(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_tf32(bits: Array) -> Array:
    """A float32 operand as a tensor core reads it: its low 13 bits are ignored (truncation)."""
    return (np.ascontiguousarray(bits) & np.uint32(0xFFFFE000)).view(np.float32)


def operand(bits: Array, kind: str) -> Array:
    """float64 values of the elements of a product: patterns of 16 bits, or of 32 for tf32."""
    return (from_tf32(bits) if kind == "tf32" else from_16(bits, kind)).astype(np.float64)


def lanes(bits: Array, kind: str) -> Array:
    """`[threads, 1 or 2]` float64: the values in registers of type `f32`, `bf16x2` and the like."""
    scalar, _, pair = kind.partition("x")
    part = np.ascontiguousarray(bits).view(np.uint32 if scalar == "f32" else np.uint16)
    values = part.view(np.float32) if scalar == "f32" else from_16(part, scalar)
    return values.reshape(len(bits), 2 if pair else 1).astype(np.float64)


def pack(values: Array, kind: str) -> Array:
    """The register of `lanes`, each value rounded once."""
    scalar = kind.partition("x")[0]
    with np.errstate(all="ignore"):
        parts = values.astype(np.float32) if scalar == "f32" else to_16(values, scalar)
    width = parts.itemsize * values.shape[1]
    return np.ascontiguousarray(parts).view(f"u{width}")[:, 0]
