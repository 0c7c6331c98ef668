"""Faults planted in the product's PTX at random are noticed; HUT_SEED draws others.

All kinds of fault, and many more places: `make mutants` (tests/ptx/faults.py).
"""

import functools
import random

import pytest
import torch

from . import faults

pytestmark = pytest.mark.ptx

STUDIES = [(arch, *call) for arch in (80, 90, 100) for call in faults.CALLS]
study = functools.cache(lambda number: faults.Study(*STUDIES[number]))


def some_plant(kind):
    """A kernel that has places for a kind of fault, and one of them."""
    draw = random.Random(torch.initial_seed())
    for number in draw.sample(range(len(STUDIES)), len(STUDIES)):
        if places := study(number).plants(kind):
            return study(number), draw.choice(places)
    raise AssertionError(f"no kernel has a place for {kind}")


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(
    "kind",
    [
        "a cp.async wait dropped",
        "a store's mask dropped",
        "a TMA wait dropped",
        "a wgmma wait dropped",
    ],
)
def test_a_fault_of_this_kind_is_noticed(kind, number):
    study, plant = some_plant(kind)
    verdict = study.plant(plant)
    assert verdict.outcome == "caught", (plant, verdict)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", ["a barrier dropped", "a proxy fence dropped"])
def test_a_barrier_or_fence_is_missed_where_it_is_needed(kind, number):
    """Needed: accesses that it must part are on its two sides, found by comparing them all."""
    study, plant = some_plant(kind)
    verdict = study.plant(plant)
    assert verdict.outcome == ("caught" if study.needs(plant) else "idle"), (plant, verdict)
