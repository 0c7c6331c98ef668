"""`Stored`: a frozen weight as its library keeps it, which the operators take apart and rebuild."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements read at a time: 2 MB in float32, which stay in or near a core's cache until they are
# rounded, in calls that are few: each is a barrier where threads share it.
_TILE = 1 << 19
_kept = threading.local()


class Layout(NamedTuple):
    """The constants of a stored weight.

    Attributes:
        name: The format, a key of `formats.FORMATS`.
        sizes: `out_features` and `in_features`, then what the format needs.
        dtype: The type that the weight's library dequantizes to.
    """

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def text(self) -> str:
        """The layout as one word for an operator's schema: `nf4:4096,1024,64,256:bfloat16`."""
        sizes = ",".join(str(size) for size in self.sizes)
        return f"{self.name}:{sizes}:{str(self.dtype).removeprefix('torch.')}"

    @staticmethod
    @functools.cache
    def parse(text: str) -> Layout:
        """The layout that `text` stands for."""
        name, sizes, dtype = text.split(":")
        return Layout(name, tuple(map(int, sizes.split(","))), getattr(torch, dtype))


class Stored:
    """A frozen weight W0, `[out_features, in_features]`, that is not stored as floating point.

    W0 is what the weight's library dequantizes it to, formed in float32 as the library does, and
    rounded once to the compute type (docs/definition.md, "Number formats").

    Args:
        data: The codes, as one flat tensor.
        scales: What the codes are scaled by, one flat tensor each.
        form: The constants.
    """

    ndim = 2

    def __init__(self, data: Tensor, scales: tuple[Tensor, ...], form: Layout) -> None:
        self.data = data
        self.scales = scales
        self.form = form

    @property
    def shape(self) -> torch.Size:
        """`(out_features, in_features)`."""
        return torch.Size(self.form.sizes[:2])

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the weight's library dequantizes to."""
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and their scales."""
        return sum(tensor.nbytes for tensor in (self.data, *self.scales))

    def numel(self) -> int:
        """Weights, not codes."""
        return self.form.sizes[0] * self.form.sizes[1]

    def stride(self) -> tuple[int, int]:
        """The strides of W0 once it is dense: row by row."""
        return self.form.sizes[1], 1

    def element_size(self) -> int:
        """Bytes of a weight once it is dense in `dtype`."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self.form.sizes[0]

    def read(self, rows: slice, out: Tensor) -> Tensor:
        """Writes some rows of W0 into `out`, `[rows, in_features]`, rounded to its type.

        A few rows at a time, in buffers that the thread keeps: fresh memory would cost more than
        the arithmetic on it.
        """
        for part in self.parts(rows):
            out[part.start - rows.start : part.stop - rows.start].copy_(self._values(part))
        return out

    def parts(self, rows: slice) -> Iterator[slice]:
        """The rows a few at a time, as many as are read at once."""
        step = max(1, _TILE // max(1, self.shape[1]))
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W0 as a whole, `[out_features, in_features]`, in `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        return self.read(slice(0, len(self)), out)

    def _values(self, rows: slice) -> Tensor:
        """The library's own formula in float32, `[rows, in_features]`, in a buffer of `buffer`."""
        raise NotImplementedError


def buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor with undefined contents; on a CPU the thread's own of that name and type."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    key = f"{name} {dtype}"
    kept: Tensor | None = getattr(_kept, key, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=dtype)
        setattr(_kept, key, kept)
    return kept[:size]
