"""Versions of PyTorch and Triton: one too old is refused, miscompiles of the other are listed."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_OLDEST_TORCH = "2.10.0"


def release(version: str) -> tuple[int, ...]:
    """`(3, 7, 1)` of `"3.7.1rc2+git0a1b"`, to be compared; three numbers always."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    return (*numbers, 0, 0, 0)[:3]


def _precedes(version: str, fixed: str) -> bool:
    """True where a version may lack what came with a release, as its pre-releases may."""
    unfinished = re.search(r"\d(a|b|rc)\d|\.dev|\+git", version)
    return release(version) < release(fixed) or (
        unfinished is not None and release(version) == release(fixed)
    )


@dataclass(frozen=True)
class Miscompile:
    """A pattern of the kernels that some versions of Triton compile wrongly.

    Attributes:
        since: The first version that is wrong.
        fixed: The first version that is right again; None where none is.
        archs: The architectures on which it is wrong.
        kernels: The kernels that have the pattern, by their names in the launch tables.
        reports: Where it is public.
        why: The pattern, and what becomes of it.
        dtypes: The compute types in which they have it; empty means every one.
    """

    since: str
    fixed: str | None
    archs: tuple[str, ...]
    kernels: tuple[str, ...]
    reports: str
    why: str
    dtypes: tuple[str, ...] = ()

    def concerns(self, dtype: str) -> bool:
        """True where it has a part in calls of a compute type, `"bfloat16"` and the like."""
        return not self.dtypes or dtype in self.dtypes

    def __str__(self) -> str:
        versions = (
            "No Triton so far is" if self.fixed is None else f"Triton before {self.fixed} is not"
        )
        types = f" in {' and '.join(self.dtypes)}" if self.dtypes else ""
        kernels = ", ".join(self.kernels)
        return f"{versions} trusted with {kernels}{types} here: {self.why} ({self.reports})"


_SM_100 = ("sm_100", "sm_101", "sm_103", "sm_110")  # sm_110: CUDA 13's name of sm_101
# What was seen, and why other known miscompiles are not here: docs/reliability.md.
MISCOMPILES = (
    Miscompile(
        since="3.6.0",
        fixed="3.8.0",
        archs=_SM_100,
        kernels=("forward", "grad_input", "grad_factors"),
        reports="triton-lang/triton#9871, #10590; pytorch/pytorch#181248",
        why="products in a pipelined loop race with the reads and writes of their operands",
    ),
    Miscompile(
        since="3.6.0",
        fixed="3.9.0",
        archs=_SM_100,
        kernels=("forward", "grad_input"),
        reports="triton-lang/triton#10537, #10552",
        why="copies by cp.async reach a product in the loop without a proxy fence",
    ),
    Miscompile(
        since="3.6.0",
        fixed=None,
        archs=_SM_100,
        kernels=("grad_factors",),
        reports="docs/reliability.md",
        why="a product in the loop is waited for after its operand is refilled",
        dtypes=("float32",),
    ),
)

# Kernels that `staged` and `chunked` run on: without these nothing of Triton is left.
FALLBACKS = ("weight", "grad_reduce")


def miscompiled(triton: str | None, arch: str) -> tuple[Miscompile, ...]:
    """Lists what a version of Triton (None: there is none) compiles wrongly on an architecture."""
    if triton is None:
        return ()
    return tuple(
        known
        for known in MISCOMPILES
        if arch in known.archs
        and release(known.since) <= release(triton)
        and (known.fixed is None or _precedes(triton, known.fixed))
    )


def lost_fallback(miscompiles: Sequence[Miscompile]) -> Miscompile | None:
    """A miscompile that leaves nothing of Triton, for the staged path needs kernels too."""
    return next((known for known in miscompiles if {*FALLBACKS} & {*known.kernels}), None)


def installed(package: str) -> str | None:
    """The version of a package that is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if release(torch.__version__) < release(_OLDEST_TORCH):
    raise ImportError(
        f"hut_kernels needs PyTorch {_OLDEST_TORCH} or newer; torch {torch.__version__} is "
        f"installed: pip install --upgrade torch"
    )
