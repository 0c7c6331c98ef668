"""T some rows at a time, and the sums over tiles of `dL/dT` that the factors' gradients are.

All of it in whole-matrix operations: a tile of `two_sided` is seen as its blocks, groups of rows by
groups of columns, in each of which either factor is constant in one direction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .definition import group_index

# Elements of a tile: in float32 they stay in a core's cache until they are used. Of a smaller
# matrix it is a quarter, so that a tile costs little memory next to W.
_TILE = 1 << 18
_WHOLE = 1 << 16  # elements up to which a matrix is one tile
# Elements of a tile in bf16, which has no second form beside it: few products, each of many rows.
_ROUNDED_TILE = 1 << 20
# The same on devices other than a CPU, where a launch costs more than a cache saves.
_LAUNCHED_TILE = 1 << 22


class Multiplier:
    """T, `[rows, columns]`, but for its constant.

    Args:
        left: B, with what it is multiplied by, `[rows, r]`.
        right: A, `[r, columns]`.
        transform: As in `Spec`.
    """

    def __init__(self, left: Tensor, right: Tensor, transform: str) -> None:
        self.left = left
        self.right = right
        self.transform = transform
        self.rows, self.r = left.shape
        self.columns = right.shape[1]
        # Groups of rows of one size, and groups of columns of one.
        self.has_blocks = (
            transform == "two_sided" and self.rows % self.r == self.columns % self.r == 0
        )

    def tiles(self, stored: bool = False) -> Sequence[slice]:
        """The rows in pieces; those of `two_sided` are whole groups, or parts of one.

        A stored weight's are small in every type: they hold W0 too.
        """
        if not self.left.is_cpu:
            most = _LAUNCHED_TILE
        elif self.left.dtype == torch.bfloat16 and not stored:
            most = _ROUNDED_TILE
        else:
            most = min(_TILE, max(_WHOLE, self.rows * self.columns // 4))
        groups = self.r if self.transform == "two_sided" else 1
        return _tiles(self.rows, self.columns, groups, most)

    def new_tile(self) -> Tensor:
        """Memory for any of the tiles."""
        most = max((tile.stop - tile.start for tile in self.tiles()), default=0)
        return self.left.new_empty((most, self.columns))

    def t(self) -> Multiplier:
        """The multiplier of the transposed weight."""
        return Multiplier(self.right.t(), self.left.t(), self.transform)

    def write(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Some rows of T, `[rows, columns]`, in `out` or in new memory."""
        left = take(self.left, rows)
        if self.transform == "low_rank":
            return torch.mm(left, self.right, out=out)
        if not self.has_blocks:
            p, q = self._groups(rows)
            T = torch.index_select(left, 1, q, out=out)
            return T.mul_(self.right.index_select(0, p))
        groups, sizes = self.blocks(rows)
        right = take(self.right, groups).reshape(sizes[0], 1, *sizes[2:])
        blocks = None if out is None else out.view(sizes)
        # Without `out` the result has its operands' order of strides: a transposed one is copied.
        T = torch.mul(left.reshape(*sizes[:3], 1), right, out=blocks)
        return T.reshape(-1, self.columns)

    def reduce(
        self, rows: slice, H0: Tensor, need_Q: bool, need_P: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The part of some rows in Q, `[r, columns]` or of blocks `[groups, columns]`, and in P."""
        left, Q, P = take(self.left, rows), None, None
        if self.transform == "low_rank":
            Q = torch.mm(left.t(), H0) if need_Q else None
            return Q, torch.mm(H0, self.right.t()) if need_P else None
        if not self.has_blocks:
            return self._reduce_unequal(rows, H0, need_Q, need_P)
        groups, sizes = self.blocks(rows)
        if need_Q:
            weighted = H0.view(sizes) * left.view(*sizes[:3], 1)
            Q = weighted.sum(1).view(sizes[0], self.columns)
        if need_P:
            right = take(self.right, groups).unsqueeze(1)
            weighted = H0.view(*sizes[:2], self.columns) * right
            P = weighted.view(-1, *sizes[2:]).sum(2)
        return Q, P

    def _reduce_unequal(
        self, rows: slice, H0: Tensor, need_Q: bool, need_P: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sums over groups that differ in size, as products with a matrix of zeros and ones."""
        p, q = self._groups(rows)
        r, Q, P = torch.arange(self.r, device=H0.device), None, None
        if need_Q:
            weighted = H0 * take(self.left, rows).index_select(1, q)
            Q = torch.mm((r[:, None] == p).to(H0.dtype), weighted)
        if need_P:
            weighted = H0 * self.right.index_select(0, p)
            P = torch.mm(weighted, (q[:, None] == r).to(H0.dtype))
        return Q, P

    def blocks(self, rows: slice) -> tuple[slice, tuple[int, int, int, int]]:
        """The groups p of some rows, and these rows' sizes `[groups, size, r, columns / r]`."""
        size, count = self.rows // self.r, rows.stop - rows.start
        first, groups = rows.start // size, max(1, count // size)
        sizes = groups, count // groups, self.r, self.columns // self.r
        return slice(first, first + groups), sizes

    def _groups(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The group p of each of some rows, and q of each column."""
        device = self.left.device
        return group_index(self.rows, self.r, device)[rows], group_index(
            self.columns, self.r, device
        )


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
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]
