"""T some rows at a time, and the sums over tiles of `dL/dT` that the factors' gradients are.

All of it in whole-matrix operations: a tile of `two_sided` is seen as its blocks, groups of rows by
groups of columns, in each of which either factor is constant in one direction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .definition import group_index

# Elements of a tile: in float32 they stay in a core's cache until they are used.
_TILE = 1 << 18
# The same on devices other than a CPU, where a launch costs more than a cache saves.
_LAUNCHED_TILE = 1 << 22


class Multiplier(NamedTuple):
    """T, `[rows, columns]`, but for its constant.

    Attributes:
        left: B, with what it is multiplied by, `[rows, r]`.
        right: A, `[r, columns]`.
        transform: As in `Spec`.
    """

    left: Tensor
    right: Tensor
    transform: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns and r."""
        (rows, r), columns = self.left.shape, self.right.shape[1]
        return rows, columns, r

    def tiles(self) -> Sequence[slice]:
        """The rows in pieces; those of `two_sided` are whole groups, or parts of one."""
        rows, columns, r = self.sizes
        most = _TILE if self.left.device.type == "cpu" else _LAUNCHED_TILE
        return _tiles(rows, columns, r if self.transform == "two_sided" else 1, most)

    def new_tile(self) -> Tensor:
        """Memory for any of the tiles."""
        most = max((tile.stop - tile.start for tile in self.tiles()), default=0)
        return self.left.new_empty((most, self.right.shape[1]))

    def t(self) -> Multiplier:
        """The multiplier of the transposed weight."""
        return Multiplier(self.right.t(), self.left.t(), self.transform)

    def write(self, rows: slice, out: Tensor) -> Tensor:
        """Writes some rows of T, `[rows, columns]`, into `out`."""
        left = take(self.left, rows)
        if self.transform == "low_rank":
            return torch.mm(left, self.right, out=out)
        if not self.has_blocks:
            p, q = self._groups(rows)
            torch.index_select(left, 1, q, out=out)
            out *= self.right.index_select(0, p)
            return out
        groups, sizes = self.blocks(rows)
        right = take(self.right, groups)
        torch.mul(
            left.reshape(*sizes[:3], 1), right.reshape(sizes[0], 1, *sizes[2:]), out=out.view(sizes)
        )
        return out

    def reduce(self, rows: slice, H0: Tensor, Q: Tensor | None, P: Tensor | None) -> None:
        """Adds to Q, `[r, columns]`, and writes P, `[rows, r]`; the sums of `H0`."""
        left = take(self.left, rows)
        if self.transform == "low_rank":
            if H0.dtype == torch.float32 and onednn.beats_mkl() and onednn.takes(H0, left):
                if Q is not None:
                    Q += onednn.linear(left.t(), H0.t())
                if P is not None:
                    P.copy_(onednn.linear(self.right, H0).t())
                return
            if Q is not None:
                torch.addmm(Q, left.t(), H0, out=Q)
            if P is not None:
                torch.mm(H0, self.right.t(), out=P)
            return
        if not self.has_blocks:
            return self._reduce_unequal(rows, H0, Q, P)
        groups, sizes = self.blocks(rows)
        if Q is not None:
            weighted = H0.view(sizes) * left.reshape(*sizes[:3], 1)
            take(Q, groups).view(sizes[0], *sizes[2:]).add_(weighted.sum(1))
        if P is not None:
            right = take(self.right, groups)
            weighted = H0.view(sizes[0], -1, H0.shape[1]) * right[:, None]
            torch.sum(weighted.view(len(H0), *sizes[2:]), 2, out=P)

    def _reduce_unequal(self, rows: slice, H0: Tensor, Q: Tensor | None, P: Tensor | None) -> None:
        """The sums over groups that differ in size, as products with a matrix of zeros and ones."""
        p, q = self._groups(rows)
        r = torch.arange(len(self.right), device=H0.device)
        if Q is not None:
            weighted = H0 * take(self.left, rows).index_select(1, q)
            torch.addmm(Q, (r[:, None] == p).to(H0.dtype), weighted, out=Q)
        if P is not None:
            weighted = H0 * self.right.index_select(0, p)
            torch.mm(weighted, (q[:, None] == r).to(H0.dtype), out=P)

    @property
    def has_blocks(self) -> bool:
        """True for `two_sided` with groups of rows of one size, and groups of columns of one."""
        rows, columns, r = self.sizes
        return self.transform == "two_sided" and rows % r == columns % r == 0

    def blocks(self, rows: slice) -> tuple[slice, tuple[int, int, int, int]]:
        """The groups p of some rows, and these rows' sizes `[groups, size, r, columns / r]`."""
        all_rows, columns, r = self.sizes
        size, count = all_rows // r, rows.stop - rows.start
        first, groups = rows.start // size, max(1, count // size)
        return slice(first, first + groups), (groups, count // groups, r, columns // r)

    def _groups(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The group p of each of some rows, and q of each column."""
        all_rows, columns, r = self.sizes
        device = self.left.device
        return group_index(all_rows, r, device)[rows], group_index(columns, r, device)


@functools.cache
def _tiles(rows: int, columns: int, groups: int, most: int) -> tuple[slice, ...]:
    """Slices of rows with at most `most` elements, or one row.

    Where the groups of rows are equal, a slice is of whole groups, or lies within one.
    """
    step = max(1, most // max(1, columns))
    size = rows // groups if rows % groups == 0 and groups > 1 else rows
    if size <= step:
        step -= step % size if size else 0
        return tuple(slice(start, min(start + step, rows)) for start in range(0, rows, step))
    return tuple(
        slice(group + start, group + min(start + step, size))
        for group in range(0, rows, size)
        for start in range(0, size, step)
    )


def take(tensor: Tensor, rows: slice) -> Tensor:
    """`tensor[rows]`, at less cost where these are all of them."""
    return tensor if rows.stop - rows.start == len(tensor) else tensor[rows]
