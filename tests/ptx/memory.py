"""Memory that knows who wrote what, and when: bounds, alignment, initialization, races.

Two accesses of one address conflict if different threads make them, one of them writes, and no
barrier of the block lies between, nor one of the warp if both threads are of one. So the verdict
does not depend on the order in which the threads were run. Time is an epoch: barriers of the block,
counted from bit `WITHIN` on, and barriers of the warps since the last of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NOBODY, SEVERAL = -1, -2  # instead of a thread; below: several threads of warp -3 - n
EVERYBODY = -2  # of accesses that every thread has waited for
WARP = 32
WITHIN = 12


class Fault(Exception):
    """An access that the code must not make."""


def since_barrier(epoch: Any, now: int) -> Any:
    """True where no barrier of the block lies between an epoch and now."""
    return epoch >> WITHIN == now >> WITHIN


def conflict(who: Array, when: Array, thread: Array, now: int) -> Array:
    """True where an access by `who` at `when` is unordered with one by `thread` now."""
    found = (who != thread) & since_barrier(when, now)
    if now & ((1 << WITHIN) - 1) and found.any():
        found &= (_warp(who) != thread // WARP) | (when == now)
    return found


def _warp(who: Array) -> Array:
    return np.where(who >= 0, who // WARP, np.where(who < SEVERAL, -3 - who, -1))


class Region:
    """A range of addresses, in granules of the smallest element that is accessed there.

    Attributes:
        name: For the faults.
        base: The first address.
        words: The contents.
        valid: What has been written.
        pending: The targets of asynchronous copies under way.
        writer, written: The last thread that wrote, and its epoch.
        reader, read: Those that read last (`NOBODY`, `SEVERAL`, one warp), and their epoch.
        generic: Written by threads, and not yet fenced for the asynchronous proxy.
        busy: How many products under way read it.
        owner, visitor: The blocks that wrote and that first read it (global memory).
    """

    def __init__(self, name: str, base: int, words: Array, valid: bool) -> None:
        self.name, self.base, self.words = name, base, words
        self.granule = words.itemsize
        n = len(words)
        self.valid = np.full(n, valid)
        self.pending = np.zeros(n, bool)
        self.writer, self.reader = np.full(n, NOBODY), np.full(n, NOBODY)
        self.written, self.read = np.full(n, -1), np.full(n, -1)
        self.generic = np.zeros(n, bool)
        self.busy = np.zeros(n, np.int32)
        self.owner, self.visitor = np.full(n, NOBODY), np.full(n, NOBODY)

    def fault(self, text: str) -> Fault:
        return Fault(f"{self.name}: {text}")

    def index(self, address: Array, size: int) -> Array:
        """The granules `[accesses, size / granule]`."""
        if (address % size).any():
            raise self.fault(f"{size} bytes at an address that is not a multiple of {size}")
        offset = address - self.base
        outside = (offset < 0) | (offset + size > self.words.nbytes)
        if outside.any():
            raise self.fault(
                f"out of bounds: byte {offset[outside][0]} of {self.words.nbytes}"
                f" ({outside.sum()} threads)"
            )
        return offset[:, None] // self.granule + np.arange(size // self.granule)

    def load(self, address: Array, size: int, threads: Array, epoch: int) -> Array:
        """The bytes `[accesses, size]`."""
        index = self.index(address, size)
        t = threads[:, None]
        if self.pending[index].any():
            raise self.fault("read while an asynchronous copy to it is under way")
        if not self.valid[index].all():
            raise self.fault("read of what was never written")
        if conflict(self.writer[index], self.written[index], t, epoch).any():
            raise self.fault("read of another thread's write, no barrier between")
        self._note_readers(index, t, epoch)
        return np.ascontiguousarray(self.words[index]).view(np.uint8)

    def _note_readers(self, index: Array, t: Array, epoch: int) -> None:
        before, when = self.reader[index], self.read[index]
        others = (before != t) & since_barrier(when, epoch)
        self.reader[index], self.read[index] = t, epoch
        last = self.reader[index]  # of the threads that read it now
        together = last != t
        if not others.any() and not together.any():
            return
        foreign = others & (_warp(before) != t // WARP)
        others &= foreign | (when == epoch)
        foreign |= last // WARP != t // WARP
        others |= together
        self.reader[index[others]] = np.broadcast_to(-3 - t // WARP, index.shape)[others]
        self.reader[index[foreign]] = SEVERAL

    def check_write(self, index: Array, threads: Array, epoch: int, kind: str) -> None:
        """Faults if a write by these threads is not ordered behind what uses the memory."""
        if self.pending[index].any():
            raise self.fault(f"{kind} where an asynchronous copy is under way")
        if self.busy[index].any():
            raise self.fault(f"{kind} where a product under way still reads")
        if conflict(self.reader[index], self.read[index], threads[:, None], epoch).any():
            raise self.fault(f"{kind} over what another thread reads, no barrier between")

    def store(self, address: Array, values: Array, threads: Array, epoch: int) -> None:
        """Writes bytes `[accesses, size]`; several threads may write one address the same."""
        index = self.index(address, values.shape[1])
        values = np.ascontiguousarray(values).view(self.words.dtype)
        self.check_write(index, threads, epoch, "write")
        t = threads[:, None]
        other = conflict(self.writer[index], self.written[index], t, epoch)
        if (other & (self.words[index] != values)).any():
            raise self.fault("two threads write one address, no barrier between")
        self.words[index] = values
        if (self.words[index] != values).any():
            raise self.fault("one store writes an address twice, with different values")
        self._mark(index, t, epoch)

    def _mark(self, index: Array, writer: Array | int, epoch: int) -> None:
        self.valid[index] = True
        self.writer[index], self.written[index] = writer, epoch
        self.generic[index] = True

    def begin_copy(self, address: Array, size: int, threads: Array, epoch: int) -> Array:
        """The granules of an asynchronous copy's target; what is there is lost from now on."""
        index = self.index(address, size)
        self.check_write(index, threads, epoch, "asynchronous copy")
        if conflict(self.writer[index], self.written[index], threads[:, None], epoch).any():
            raise self.fault("asynchronous copy over another thread's write, no barrier between")
        self.pending[index] = True
        return index

    def end_copy(self, index: Array, values: Array, writer: Array | int, epoch: int) -> None:
        """The bytes `[accesses, size]` arrive."""
        self.pending[index] = False
        self.words[index] = np.ascontiguousarray(values).view(self.words.dtype)
        self._mark(index, writer, epoch)


class Space:
    """All regions of global memory, 8 GiB apart, so that no address can stray into another."""

    STEP = 1 << 33

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self.maps: dict[int, Any] = {}  # tensor maps by the address that stands for each

    def add(self, name: str, words: Array, offset: int) -> Region:
        """A region of words not yet written, `offset` bytes from an aligned address."""
        number = len(self.regions) + 1
        region = self.regions[number] = Region(name, number * self.STEP + offset, words, False)
        return region

    def at(self, base: int) -> Region:
        return self.regions[base // self.STEP]

    def of(self, address: Array) -> list[tuple[Region, Array]]:
        """The regions that the addresses lie in (by the nearest base), and which do."""
        numbers = (address + self.STEP // 2) // self.STEP
        found = []
        same = (numbers == numbers[:1]).all()  # nearly always
        for number in numbers[:1] if same else np.unique(numbers):
            if int(number) not in self.regions:
                raise Fault(f"address {int(address[numbers == number][0]):#x} is in no tensor")
            found.append((self.regions[int(number)], numbers == number))
        return found

    def load(self, address: Array, size: int, threads: Array, epoch: int, block: int) -> Array:
        values = np.empty((len(threads), size), np.uint8)
        for region, here in self.of(address):
            values[here] = region.load(address[here], size, threads[here], _of(block, epoch))
            index = region.index(address[here], size)
            owner, visitor = region.owner[index], region.visitor[index]
            if ((owner != NOBODY) & (owner != block)).any():
                raise region.fault("read of what another block writes")
            region.visitor[index] = np.where(visitor == NOBODY, block, visitor)
        return values

    def store(self, address: Array, values: Array, threads: Array, epoch: int, block: int) -> None:
        for region, here in self.of(address):
            index = region.index(address[here], values.shape[1])
            for other, what in ((region.owner, "written"), (region.visitor, "read")):
                if ((other[index] != NOBODY) & (other[index] != block)).any():
                    raise region.fault(f"a write to what another block has {what}")
            region.store(address[here], values[here], threads[here], _of(block, epoch))
            region.owner[index] = block


def _of(block: int, epoch: int) -> int:
    """The epoch in global memory, where every block has its own; blocks are looked at apart."""
    return block << 40 | epoch
