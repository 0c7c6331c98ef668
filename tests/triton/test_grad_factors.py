"""The fused factor gradients against float64: any way to share the tiles among programs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels.triton import grad_factors as grad_factors_module
from hut_kernels.triton import launch

from ..references import LAYOUTS, check, laid_out, make, make_normal
from ..strategies import cases, examples
from .launches import (
    DTYPES,
    SQUARE,
    TALL,
    THROUGH_TMA,
    WIDE,
    every_config,
    every_dtype,
    every_form,
    every_rank,
    every_shape,
    every_transform,
    grad_factors,
)
from .test_forward import UNIFORM


@every_form
@every_dtype
@every_config
@pytest.mark.parametrize("vectors", ["", "gamma"])
def test_every_variant(form, dtype, config, vectors):
    case = make_normal(19, 37, 35, 3, dtype=dtype, vectors=vectors, **form)
    check(case, grad_factors(case, config))


@every_form
@every_shape
def test_every_shape(form, shape):
    case = make(*shape, min(3, *shape[1:]), vectors="gamma", **form)
    check(case, grad_factors(case))


@every_transform
@every_rank
def test_every_rank(transform, r):
    case = make_normal(5, 133, 129, r, vectors="gamma", transform=transform)
    config = launch.LaunchConfig(BN=16, BO=64, BK=128, warps=4, stages=1)
    check(case, grad_factors(case, config))
    check(case, grad_factors(case, config, splits=(1, 1)))


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [None, "expanded", "constant"])
def test_views_and_expanded_gradients(form, layout, grad):
    case = laid_out(make_normal(18, 35, 21, 3, vectors="gamma", **form), layout, grad)
    check(case, grad_factors(case))


# 70 x 70 is 5 x 5 tiles: one program, one for each tile, and programs with one tile less.
@every_form
@pytest.mark.parametrize("splits", [(1, 1), (1, 5), (5, 1), (2, 3), (3, 2), (5, 5)], ids=str)
def test_any_splits(form, splits):
    case = make_normal(9, 70, 70, 3, vectors="gamma", **form)
    check(case, grad_factors(case, splits=splits))


@every_form
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_only_needed_gradients_are_computed(form, needs):
    case = make_normal(9, 35, 37, 3, vectors="gamma", **form)
    grads = grad_factors(case, needs=tuple(map(bool, needs)))
    assert [value is not None for value in grads.values()] == list(map(bool, needs))
    check(case, {name: value for name, value in grads.items() if value is not None})


@every_form
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@every_dtype
def test_any_mix_of_types(form, dtype, weight_dtype, factor_dtype):
    types = {"dtype": dtype, "weight_dtype": weight_dtype, "factor_dtype": factor_dtype}
    case = make_normal(9, 35, 21, 3, vectors="gamma", **types, **form)
    check(case, grad_factors(case))


def test_G_does_not_overflow_in_float16():
    case = make(40, 20, 18, 2, dtype=torch.float16)
    case = case.replace(grad=case.grad * 2e4, x=case.x * 100)
    check(case, grad_factors(case))


def test_two_runs_are_equal_to_the_bit():
    case = make_normal(19, 70, 70, 3, vectors="gamma")
    one, two = (grad_factors(case, splits=(2, 3)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_form
@every_dtype
def test_loads_through_descriptors(form, dtype, monkeypatch):
    """Rows on 16-byte addresses, remainders in every dimension; and views, that take pointers."""
    used = []
    descriptors = launch.descriptors

    def watched(*args):
        used.append(descriptors(*args)[0])
        return descriptors(*args)

    monkeypatch.setattr(grad_factors_module, "descriptors", watched)
    case = make_normal(19, 40, 56, 3, dtype=dtype, vectors="gamma", **form)
    check(case, grad_factors(case, THROUGH_TMA))
    for layout in ("transposed", "sliced", "offset"):
        check(case, grad_factors(laid_out(case, layout), THROUGH_TMA))
    assert used == [True, False, False, False]


@pytest.mark.parametrize(("sizes", "P", "Q"), UNIFORM.values(), ids=UNIFORM)
def test_groups_within_tiles_and_across(sizes, P, Q, monkeypatch):
    case = make_normal(9, *sizes, transform="two_sided", vectors="gamma")
    grads = grad_factors(case)
    check(case, grads)
    monkeypatch.setattr(launch, "_is_uniform", lambda size, r, block: False)
    check(case, grad_factors(case))


@given(
    case=cases(DTYPES, sizes=st.integers(1, 40), leading=False, max_rank=20),
    config=st.sampled_from([SQUARE, WIDE, TALL]),
    one_span=st.booleans(),
)
@examples(40)
def test_any_layer(case, config, one_span):
    check(case, grad_factors(case, config, splits=(1, 1) if one_span else None))
