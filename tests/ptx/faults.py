"""Faults planted in the PTX of the product's kernels, one at a time: is each of them noticed?

`python -m tests.ptx.faults [--arch 80 ...] [--kind TEXT] [--most 8] [--seed 0]` plants them and
prints a table. A fault is *caught* if the run faults, or a result is wrong by the limits of
docs/definition.md. It is *idle* if every result is the same to the bit, the same global memory is
read and written, and all that is asynchronous ends where it did. A barrier is idle if no address is
accessed by different threads on its two sides; a proxy fence, if nothing that threads wrote meets
an asynchronous access behind it before the next fence. Both are found by comparing all accesses,
with none of the executor's bookkeeping. A fault of `HARMLESS` was looked into. All else *survives*,
and the exit status is 1.

A kernel is run in two shapes, since a mask may matter in one of them only.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import Fault, Unsupported, cases
from .cases import Call
from .machine import Access, Array
from .memory import EVERYBODY

Edit = Callable[[str], str]


def drop(pattern: str) -> Edit:
    return lambda line: "" if re.search(pattern, line) else line


def swap(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Edit:
    return lambda line: re.sub(pattern, replacement, line, count=1)


def _one_more(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[2]) + 1}"


def _transpose(line: str) -> str:
    if "ldmatrix" not in line:
        return line
    return (
        line.replace(".trans", "") if ".trans" in line else line.replace(".shared", ".trans.shared")
    )


_MMA = r"(mma\.sync\S+ \{[^}]*\}, \{ )(\S+), (\S+), (\S+), (\S+)( \}, \{ )(\S+), (\S+)( \})"
KINDS: dict[str, Edit] = {
    "a barrier dropped": drop(r"^\s*bar\.sync"),
    "a cp.async wait dropped": drop(r"cp\.async\.wait_group"),
    "a cp.async wait one group short": swap(r"(cp\.async\.wait_group\s+)(\d+)", _one_more),
    "a cp.async commit dropped": drop(r"cp\.async\.commit_group"),
    "a copy's mask dropped": swap(r"(cp\.async\.c\S+ .*, )%r\d+;", r"\g<1>16;"),
    "a load's mask dropped": swap(r"@!?%p\d+ (ld\.global)", r"\1"),
    "a store's mask dropped": swap(r"@!?%p\d+ (st\.global)", r"\1"),
    "a bound one too far (lt to le)": swap(r"setp\.lt\.([su])", r"setp.le.\1"),
    "an address 16 bytes off": swap(r"(ld\.shared\S*\s+.*\[)(%r\d+)(\];)", r"\1\2+16\3"),
    "a tile transposed": _transpose,
    "halves of a pair swapped": swap(
        r"(cvt\.rn\.\w+x2\.f32\s+%r\d+), (%\w+), (%\w+);", r"\1, \3, \2;"
    ),
    "mma: rows of the left operand swapped": swap(_MMA, r"\1\3, \2, \4, \5\6\7, \8\9"),
    "mma: the left operand's depth swapped": swap(_MMA, r"\1\4, \5, \2, \3\6\7, \8\9"),
    "mma: the right operand's depth swapped": swap(_MMA, r"\1\2, \3, \4, \5\6\8, \7\9"),
    "a proxy fence dropped": drop(r"fence\.proxy\.async"),
    "a TMA wait dropped": swap(r"mbarrier\.try_wait\S+ complete.*;", "mov.pred complete, -1;"),
    "half of a box's bytes announced": swap(
        r"(expect_tx.*, )(\d+);", lambda match: f"{match[1]}{int(match[2]) // 2};"
    ),
    "a wgmma fence dropped": drop(r"wgmma\.fence"),
    "a wgmma wait dropped": drop(r"wgmma\.wait_group"),
    "a wgmma wait one group short": swap(r"(wgmma\.wait_group\S+\s+)(\d+)", _one_more),
    "wgmma: a transposition flipped": swap(
        r"(wgmma\.mma.*k16.*, )([01]);", lambda match: f"{match[1]}{1 - int(match[2])};"
    ),
    "a tcgen05 wait dropped": drop(r"tcgen05\.wait"),
    "a tcgen05 commit dropped": drop(r"tcgen05\.commit"),
}
# What is neither caught nor idle, by kind and kernel, and why that is right.
HARMLESS: dict[tuple[str, str], str] = {
    ("a tcgen05 wait dropped", "hut_forward_kernel"): "another wait::st stands before the barrier "
    "behind which the accumulator, here set to zero, is used",
    ("a wgmma fence dropped", "hut_grad_input_kernel"): "no register of the product was accessed "
    "since the fence before, but by products of the same shape",
    ("a load's mask dropped", "hut_grad_reduce_kernel"): "G is the call's own, with no gap between "
    "its rows; what is read past a row's end meets a zero of W0's",
}
# Each call, and sizes N, K, O at which nearly every thread of a last tile is masked off; the
# compiled kernel is the same.
CALLS: tuple[tuple[Call, tuple[int, int, int]], ...] = (
    (Call("forward", "bf16", 45, 400, 112), (17, 16, 16)),
    (Call("forward", "bf16", 150, 400, 112, 13), (130, 16, 16)),
    (Call("grad_input", "bf16", 45, 240, 368), (17, 16, 16)),
    (Call("grad_factors", "bf16", 300, 240, 240), (3, 144, 144)),
    (
        Call("grad_factors", "bf16", 300, 240, 112, 13, options={"vectors": "gamma"}),
        (3, 144, 16),
    ),
    (Call("grad_reduce", "bf16", 45, 240, 240, 13), (3, 208, 144)),
    (Call("weight", "bf16", 1, 240, 112, 13), (1, 16, 16)),
)


@dataclass(frozen=True)
class Plant:
    """A line of a kernel's PTX, counted from 0, and what it becomes."""

    kind: str
    kernel: str
    line: int
    old: str
    new: str


@dataclass
class Verdict:
    """`caught`, `idle`, `harmless` or `survived`, and why; whether any access has changed."""

    outcome: str
    why: str
    accesses: bool


class Trace:
    """Watches which global memory is accessed, and where what is asynchronous ends."""

    def __init__(self) -> None:
        self.accesses, self.ends = collections.Counter[int](), collections.Counter[int]()

    def __call__(self, access: Access) -> None:
        counters = {"global": self.accesses, "landing": self.ends}
        if access.space in counters:
            threads = np.asarray(access.threads)
            key = access.line, access.address.tobytes(), threads.tobytes()
            counters[access.space][hash(key)] += 1


@dataclass
class _Run:
    """The result of a run without a fault, compared with that of a run with one."""

    call: Call
    case: Any
    results: dict[str, torch.Tensor]
    trace: Trace


class Study:
    """The kernels of a call, in two shapes, ready to have faults planted."""

    def __init__(self, arch: int, call: Call, sizes: tuple[int, int, int]) -> None:
        self.arch = arch
        N, K, O = sizes
        self.ptx: dict[str, str] = {}
        self.executed: dict[str, set[int]] = collections.defaultdict(set)
        self.runs = []
        for one in (call, dataclasses.replace(call, N=N, K=K, O=O)):
            case, trace = one.make(), Trace()
            results, log = cases.run(one, arch, case, watch=trace)
            for launch in log.launches:
                if self.ptx.setdefault(launch.kernel, launch.ptx) != launch.ptx:
                    raise ValueError(f"{one.name} is compiled otherwise than {call.name}")
                self.executed[launch.kernel] |= launch.executed
            self.runs.append(_Run(one, case, results, trace))

    def plants(self, kind: str) -> list[Plant]:
        """All places that a kind of fault can be planted at, of lines that run."""
        found = []
        for kernel, ptx in self.ptx.items():
            for number, line in enumerate(ptx.split("\n")):
                new = KINDS[kind](line)
                if new != line and number + 1 in self.executed[kernel]:
                    found.append(Plant(kind, kernel, number, line.strip(), new))
        return found

    def plant(self, plant: Plant) -> Verdict:
        """Runs the kernels with a fault."""
        original = self.ptx[plant.kernel]
        lines = original.split("\n")
        lines[plant.line] = plant.new
        edited = "\n".join(lines)
        changed = False
        for run in self.runs:
            trace = Trace()
            try:
                results, _ = cases.run(
                    run.call,
                    self.arch,
                    run.case,
                    edit=lambda ptx: edited if ptx == original else ptx,
                    watch=trace,
                )
            except (Fault, Unsupported) as fault:
                return Verdict("caught", re.sub(r" \[.*", "", str(fault)), True)
            changed |= trace.accesses != run.trace.accesses
            if "commit" in plant.kind:
                changed |= trace.ends != run.trace.ends
            for name, (error, limit) in cases.errors(run.call, run.case, results).items():
                if not error <= limit:
                    return Verdict("caught", f"{name} is wrong", changed)
            if not all(torch.equal(results[name], run.results[name]) for name in results):
                return Verdict("survived", "results differ, within their limits", changed)
        if plant.kind in ("a barrier dropped", "a proxy fence dropped"):
            idle = not self.needs(plant)
        else:
            idle = not changed and not re.search("wait|fence", plant.kind)
        if idle:
            return Verdict("idle", "", changed)
        why = HARMLESS.get((plant.kind, plant.kernel))
        return Verdict("harmless" if why else "survived", why or "", changed)

    def needs(self, plant: Plant) -> bool:
        """True where a barrier or proxy fence separates accesses that need it."""
        watched = _Fences if "fence" in plant.kind else _Sides
        for run in self.runs:
            watch = watched(plant.line + 1)
            cases.run(run.call, self.arch, run.case, watch=watch)
            if watch.needed:
                return True
        return False


class _Sides:
    """Watches the accesses between barriers, and compares those on the two sides of one of them."""

    def __init__(self, line: int) -> None:
        self.line, self.needed = line, False
        self.before: list[Access] = []
        self.after: list[Access] = []
        self.at_barrier = False

    def __call__(self, access: Access) -> None:
        if access.space == "barrier":
            if self.at_barrier:
                self.needed |= _conflict(self.before, self.after)
            # Without it, all between its neighbors is one side.
            self.before, self.after = (self.before if self.at_barrier else []) + self.after, []
            self.at_barrier = access.line == self.line
        elif access.space == "landing":  # what arrives is from now on its thread's write
            if np.all(access.threads != EVERYBODY):
                self.after.append(access._replace(space="shared"))
        elif access.space != "fence":
            self.after.append(access)


class _Fences:
    """Watches what threads write and no proxy fence follows, one of the fences left out."""

    def __init__(self, line: int) -> None:
        self.line, self.needed = line, False
        self.written: set[int] = set()

    def __call__(self, access: Access) -> None:
        begins = access.space == "barrier" and access.line == 0  # another block
        if begins or (access.space == "fence" and access.line != self.line):
            self.written.clear()
        if access.space not in ("shared", "landing"):
            return
        places = set((access.address[:, None] + np.arange(0, access.size, 2)).ravel().tolist())
        if np.all(np.asarray(access.threads) >= 0):
            if access.write:
                self.written |= places
        elif access.space == "shared":
            self.needed |= not self.written.isdisjoint(places)


def _conflict(before: list[Access], after: list[Access]) -> bool:
    """True where accesses of the two lists conflict: one address, two threads, one a write."""
    for space in ("shared", "tensor", "global"):
        sides = [_table([one for one in side if one.space == space]) for side in (before, after)]
        for first, second in (sides, sides[::-1]):
            written, thread = first[0][first[2]], first[1][first[2]]
            at = np.searchsorted(second[0], written)
            for i in np.flatnonzero(np.isin(written, second[0])):
                theirs = second[1][at[i] : np.searchsorted(second[0], written[i], "right")]
                if (theirs != thread[i]).any():
                    return True
    return False


def _table(accesses: list[Access]) -> tuple[Array, Array, Array]:
    """Address (in steps of two bytes), thread, whether it writes; sorted by address."""
    places, threads, writes = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0, bool)]
    for one in accesses:
        place = one.address[:, None] + np.arange(0, one.size, 2)
        places.append(place.ravel())
        owner = np.broadcast_to(one.threads, one.address.shape)
        threads.append(np.repeat(owner, place.shape[1]))
        writes.append(np.full(place.size, one.write))
    found = [np.concatenate(column) for column in (places, threads, writes)]
    order = np.argsort(found[0], kind="stable")
    return found[0][order], found[1][order], found[2][order]


def studies(archs: list[int], kernels: str) -> Iterator[tuple[str, Study]]:
    for arch in archs:
        for call, sizes in CALLS:
            if kernels in call.what:
                yield f"sm_{arch} {call.name}", Study(arch, call, sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--kernel", default="", help="kernels whose name holds this")
    parser.add_argument("--kind", default="", help="kinds whose name holds this")
    parser.add_argument("--most", type=int, default=8, help="faults of a kind for each call")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, study in studies(arguments.arch, arguments.kernel):
        for kind in KINDS:
            places = study.plants(kind) if arguments.kind in kind else []
            for plant in draw.sample(places, min(arguments.most, len(places))):
                verdict = study.plant(plant)
                outcomes[kind][verdict.outcome] += 1
                if verdict.outcome == "survived":
                    where = f"{name}, {plant.kernel} line {plant.line + 1}: {plant.old[:90]}"
                    print(f"SURVIVED  {kind}: {where} ({verdict.why})", flush=True)
    names = ("caught", "idle", "harmless", "survived")
    print(f"{'':42}{'planted':>9}" + "".join(f"{name:>9}" for name in names))
    for kind, counts in outcomes.items():
        print(f"{kind:42}{counts.total():9}" + "".join(f"{counts[name]:9}" for name in names))
    return int(any(counts["survived"] for counts in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
