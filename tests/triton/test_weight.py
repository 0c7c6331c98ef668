"""The weight kernel against float64: W, gamma W, and the update of split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels.triton import launch

from ..references import LAYOUTS, error, laid_out, make, make_normal, update_limit
from ..strategies import cases, examples
from .launches import (
    DTYPES,
    FORMS,
    SQUARE,
    TALL,
    WIDE,
    every_config,
    every_dtype,
    every_form,
    every_rank,
    every_shape,
    every_transform,
    weight,
)
from .test_forward import UNIFORM

# One rounding to the result's type, and float32's own.
ALLOWED = {torch.float32: 1e-6, torch.float16: 2**-11 + 1e-6}


def check(case, dtype, config=SQUARE):
    out = weight(case, dtype, config)
    assert out.dtype == dtype
    assert error(out, case.merged_weight()) <= ALLOWED[dtype]
    return out


@every_form
@every_dtype
@every_config
@pytest.mark.parametrize("vectors", ["", "gamma"])
def test_every_variant(form, dtype, config, vectors):
    case = make_normal(1, 37, 35, 3, dtype=dtype, vectors=vectors, **form)
    for result in DTYPES:
        check(case, result, config)


@every_form
@every_shape
def test_every_shape(form, shape):
    check(make(*shape, min(3, *shape[1:]), vectors="gamma", **form), torch.float32)


@every_transform
@every_rank
def test_every_rank(transform, r):
    case = make_normal(1, 133, 129, r, transform=transform)
    check(case, torch.float32, launch.LaunchConfig(BN=16, BO=64, BK=128, warps=4, stages=1))


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_and_the_results_strides(form, layout):
    case = laid_out(make_normal(1, 35, 21, 3, vectors="gamma", **form), layout)
    out = check(case, torch.float32)
    assert out.stride() == torch.empty_like(case.weight).stride()


@pytest.mark.parametrize(("sizes", "P", "Q"), UNIFORM.values(), ids=UNIFORM)
def test_groups_within_tiles_and_across(sizes, P, Q):
    check(make_normal(1, *sizes, transform="two_sided"), torch.float32)


@every_form
@every_dtype
@pytest.mark.parametrize("vectors", ["", "gamma"])
def test_a_separate_update_keeps_its_own_precision(form, dtype, vectors):
    """`subtract_identity` gives gamma W0 (T - 1): the second matrix of split."""
    case = make_normal(1, 37, 35, 3, dtype=dtype, vectors=vectors, **form)
    if case.transform == "low_rank":
        case = case.replace(hut_B=case.hut_B * 1e-3, offset=1.0)
    out = weight(case, dtype, subtract_identity=True)
    gamma = 1.0 if case.gamma is None else case.gamma.double().numpy()[:, None]
    exact = gamma * case.weight.double().numpy() * (case.multiplier() - 1.0)
    limit = update_limit(dtype, case.transform, "split")
    assert error(out, exact) <= (1e-6 if dtype == torch.float32 else limit)


@pytest.mark.parametrize("form", [FORMS["direct"], FORMS["two_sided"]], ids=["direct", "two_sided"])
def test_the_multiplier_is_not_rounded_first(form):
    """W is float16's nearest almost everywhere; from a rounded T it is not.

    (The residual form may round its increment, so there this holds less often.)
    """
    case = make(1, 100, 90, 3, dtype=torch.float16, **form)
    nearest = torch.from_numpy(case.merged_weight()).half()
    out = weight(case, torch.float16, WIDE)
    rounded = case.weight * torch.from_numpy(case.multiplier()).half()
    assert (out == nearest).double().mean() > 0.98
    assert (rounded == nearest).double().mean() < 0.9


@given(
    case=cases(DTYPES, sizes=st.integers(1, 40), leading=False, max_rank=20),
    config=st.sampled_from([SQUARE, WIDE, TALL]),
    dtype=st.sampled_from(DTYPES),
)
@examples(40)
def test_any_layer(case, config, dtype):
    check(case, dtype, config)
