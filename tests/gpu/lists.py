"""Lists of checks: every table row, every strategy, odd shapes, beyond 2^31 elements."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from .cases import FUSED, STAGED, Check

TOKENS = (1, 16, 64, 512, 2048)
RANKS = (16, 64, 1, 3, 17, 32, 128)
ALL_VECTORS = ("bias", "gamma", "beta")
_KINDS: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"dtype": "float32", "tf32": True},
)
MIXED = (FUSED[0], STAGED[1], STAGED[2]), (STAGED[0], FUSED[1], FUSED[2])


def device_cases(quick: bool) -> list[Check]:
    """For a GPU, the most telling first; each with other inputs."""
    if quick:
        lists = [_plans(), _updates(), _table((1, 16, 512), (16, 64, 3), _KINDS[::2])]
    else:
        lists = [
            _plans(),
            _updates(),
            _table(TOKENS[::2], RANKS[:2], _KINDS),
            _real(),
            _odd(),
            _table(TOKENS, RANKS, _KINDS),
        ]
    return _seeded(_distinct(itertools.chain(*lists)))


def large_cases(quick: bool) -> list[Check]:
    """Beyond 2^31 elements; one at a time, for they fill a device."""
    side = 46_352  # side * side > 2^31, a multiple of 16
    weight = Check(16, side, side, 16, scaling=1.0)
    tokens = Check((1 << 19) + 64, 4096, 4096, 16, scaling=1.0)
    cases = [weight, dataclasses.replace(tokens, strategies=STAGED)]
    if not quick:
        cases += [dataclasses.replace(weight, strategies=STAGED), tokens]
    return _seeded(cases)


def extension_cases(quick: bool) -> list[Check]:
    """Every shape, layout, type and transform of the staged cases, by the compiled extension."""
    chosen = itertools.chain(_odd(), _plans(), [] if quick else _real(), _updates())
    staged = (case for case in chosen if case.strategies == STAGED)
    return _seeded(dataclasses.replace(case, backend="cuda") for case in staged)


def tiny_cases(quick: bool) -> list[Check]:
    """For Triton's interpreter: float16 and float32 (its bfloat16 is not the device's)."""
    cases = []
    forms: list[dict[str, Any]] = [{}, {"transform": "two_sided"}, {"offset": 0.0}]
    for strategies, form in itertools.product((FUSED, STAGED), forms):
        cases.append(Check(20, 80, 48, 3, dtype="float16", strategies=strategies, **form))
        cases.append(
            Check(
                17, 48, 80, 5, dtype="float32", strategies=strategies, vectors=ALL_VECTORS, **form
            )
        )
    cases += [
        Check(20, 48, 64, 4, "float32", layout="transposed", strategies=FUSED),
        Check(20, 48, 64, 4, "float16", layout="expanded", strategies=None),
        Check(1, 37, 53, 1, "float32", layout="sliced", strategies=STAGED),
        Check(16, 64, 64, 4, "float32", update=5e-2, strategies=FUSED),
        Check(16, 64, 64, 4, "float16", update=5e-2, precision="split", strategies=STAGED),
    ]
    return _seeded(cases[::2] if quick else cases)


def candidate(
    kernel: str, N: int, K: int, O: int, r: int, row: dict[str, Any], **options: Any
) -> Check:
    """The check of one kernel with other tiles, and of nothing else."""
    strategies, wanted = {
        "forward": (FUSED, ()),
        "grad_input": ((STAGED[0], FUSED[1], STAGED[2]), ("x",)),
        "grad_factors": ((STAGED[0], STAGED[1], FUSED[2]), ("hut_A", "hut_B")),
        "weight": (STAGED, ()),
        "grad_reduce": (STAGED, ("hut_A", "hut_B")),
    }[kernel]
    return Check(
        N, K, O, r, strategies=strategies, wanted=wanted, kernel=kernel, row=row, **options
    )


def _table(
    tokens: tuple[int, ...], ranks: tuple[int, ...], kinds: tuple[dict[str, Any], ...]
) -> Iterator[Check]:
    """Every class of the launch tables; aligned shapes that no tile divides."""
    for r, N, kind in itertools.product(ranks, tokens, kinds):
        yield Check(N, 1168, 1040, r, **kind)
        if N in (16, 2048):  # the staged kernels see no tokens
            yield Check(N, 1168, 1040, r, strategies=STAGED, **kind)


def _plans() -> Iterator[Check]:
    """Every transform with every strategy, at the size of a real layer."""
    forms: list[dict[str, Any]] = [
        {},
        {"transform": "two_sided"},
        {"offset": 0.0},
        {"vectors": ALL_VECTORS},
        {"transform": "two_sided", "vectors": ALL_VECTORS},
    ]
    for form, strategies in itertools.product(forms, (FUSED, STAGED)):
        yield Check(512, 4096, 4096, 16, strategies=strategies, **form)
    for N in (1, 64, 4096):
        yield Check(N, 4096, 4096, 16, strategies=None)
    # What a plan's own rows must hold: groups that end within a tile, wide and transposed weights.
    for N in (1, 16, 64, 256):
        yield Check(N, 768, 768, 16, transform="two_sided", vectors=ALL_VECTORS, strategies=None)
        yield Check(N, 1024, 1024, 64, weight_dtype="float32", strategies=None)
        yield Check(N, 768, 2304, 16, layout="transposed", vectors=("gamma",), strategies=None)
    yield Check(16, 768, 768, 16, "float32", tf32=True, transform="two_sided", strategies=None)
    for strategies in MIXED:
        yield Check(128, 2048, 2048, 16, strategies=strategies)
    for strategies in (FUSED, STAGED):
        yield Check(96, 1024, 1024, 16, "float16", offset=0.0, strategies=strategies)
        yield Check(96, 1024, 1024, 16, "float32", vectors=("gamma",), strategies=strategies)
    yield Check(256, 2048, 1024, 16, precision="split", strategies=STAGED)


def _updates() -> Iterator[Check]:
    """The update on its own, under both precisions."""
    small: dict[str, Any] = {"N": 64, "K": 4096, "O": 2048, "r": 16, "scaling": 1.0}
    forms: list[dict[str, Any]] = [{}, {"transform": "two_sided"}, {"offset": 0.0}]
    for form in forms:
        for strategies in (FUSED, STAGED):
            yield Check(**small, update=5e-2, strategies=strategies, wanted=(), **form)
        split: dict[str, Any] = {"precision": "split", "strategies": STAGED, "wanted": ()}
        yield Check(**small, update=5e-2, **split, **form)
        yield Check(**small, update=1e-3, **split, **form)


def _real() -> Iterator[Check]:
    """The shapes of large models, and batches of their lengths."""
    shapes = [(4096, 14336), (14336, 4096), (14336, 14336), (1024, 4096), (768, 768), (4096, 1024)]
    for (K, O), strategies in itertools.product(shapes, (FUSED, STAGED)):
        yield Check(512, K, O, 16, strategies=strategies)
    for strategies in (FUSED, STAGED):
        yield Check(2048, 4096, 4096, 64, "float32", tf32=True, strategies=strategies)
        yield Check(1024, 4096, 4096, 32, "float32", strategies=strategies)
        yield Check(512, 14336, 4096, 16, transform="two_sided", strategies=strategies)
        yield Check(8192, 2048, 2048, 16, "float16", vectors=ALL_VECTORS, strategies=strategies)


def _odd() -> Iterator[Check]:
    """Odd sizes, addresses, strides and mixes of types."""
    for strategies in (FUSED, STAGED):
        with_strategies: dict[str, Any] = {"strategies": strategies}
        for layout in ("transposed", "expanded", "sliced", "shifted"):
            yield Check(200, 1024, 768, 16, layout=layout, **with_strategies)
            yield Check(33, 512, 640, 8, "float16", layout=layout, **with_strategies)
        for N, K, O, r in ((77, 1001, 515, 7), (1, 999, 1003, 3), (130, 1030, 2046, 100)):
            yield Check(N, K, O, r, **with_strategies)
            yield Check(N, K, O, r, "float32", vectors=ALL_VECTORS, **with_strategies)
            yield Check(N, K, O, r, transform="two_sided", **with_strategies)
        for r in (1, 3, 17, 48, 128):
            yield Check(64, 1152, 1024, r, transform="two_sided", **with_strategies)
        yield Check(64, 1024, 1024, 16, factor_dtype="bfloat16", **with_strategies)
        yield Check(
            64, 1024, 1024, 16, "float16", factor_dtype="float16", vectors=ALL_VECTORS,
            **with_strategies,
        )  # fmt: skip
        yield Check(64, 1024, 1024, 16, "float32", weight_dtype="bfloat16", **with_strategies)
        yield Check(64, 1024, 1024, 16, "bfloat16", weight_dtype="float32", **with_strategies)
        for name in ALL_VECTORS:
            yield Check(48, 512, 512, 16, vectors=(name,), **with_strategies)


def _distinct(cases: Any) -> Iterator[Check]:
    seen = set()
    for case in cases:
        if str(case) not in seen:
            seen.add(str(case))
            yield case


def _seeded(cases: Any) -> list[Check]:
    return [dataclasses.replace(case, seed=seed) for seed, case in enumerate(cases)]
