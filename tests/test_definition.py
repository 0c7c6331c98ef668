"""The definition against loops over single elements, and what a reference has to be exact about."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels import definition

from .references import TRAINABLE, check, error, groups, limit, make, make_normal, run
from .strategies import cases, examples

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0, "scaling": 1.25},
    "other offset": {"offset": -2.0, "scaling": -1.5},
    "two_sided": {"transform": "two_sided"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def loops(case):
    """`y` by the formula of one element, in Python's own floats."""
    A, B, W0 = case.hut_A.tolist(), case.hut_B.tolist(), case.weight.tolist()
    O, K, r = len(B), len(A[0]), len(A)

    def T(o, i):
        if case.transform == "two_sided":
            return B[o][i * r // K] * A[o * r // O][i]
        return case.offset + case.scaling * math.fsum(B[o][k] * A[k][i] for k in range(r))

    def y(row, o):
        product = math.fsum(row[i] * W0[o][i] * T(o, i) for i in range(K))
        bias = 0.0 if case.bias is None else case.bias[o].item()
        gamma = 1.0 if case.gamma is None else case.gamma[o].item()
        beta = 0.0 if case.beta is None else case.beta[o].item()
        return gamma * (product + bias) + beta

    multiplier = [[T(o, i) for i in range(K)] for o in range(O)]
    return multiplier, [[y(row, o) for o in range(O)] for row in case.x.tolist()]


@every_form
@pytest.mark.parametrize("vectors", ["", "bias", "gamma beta", "bias gamma beta"])
def test_multiplier_and_output_are_those_of_the_loops(form, vectors):
    double = {"dtype": torch.float64, "factor_dtype": torch.float64}
    case = make_normal(4, 11, 7, 3, vectors=vectors, **double, **form)
    multiplier, y = loops(case)
    assert error(definition.multiplier(case.hut_A, case.hut_B, case.spec), multiplier) < 1e-14
    assert error(definition.linear(case.x, case.layer), y) < 1e-14
    # The reference of every other test is a third hand at the same formulas.
    assert np.allclose(case.multiplier(), multiplier, rtol=1e-13)
    assert np.allclose(case.expected()["y"], y, rtol=1e-12)


@every_form
def test_the_reference_gradients_are_the_slopes_of_the_loops(form):
    """Central differences of the loops, for one entry of each parameter."""
    double = {"dtype": torch.float64, "factor_dtype": torch.float64}
    case = make_normal(3, 5, 4, 2, vectors="bias gamma beta", **double, **form)
    upstream = case.grad.numpy()
    step = 1e-6
    for name in TRAINABLE:
        value = getattr(case, name)
        where = (1,) * value.dim()
        slopes = []
        for sign in (1, -1):
            moved = value.clone()
            moved[where] += sign * step
            y = np.array(loops(case.replace(**{name: moved}))[1])
            slopes.append((y * upstream).sum())
        slope = (slopes[0] - slopes[1]) / (2 * step)
        assert case.expected()[name][where] == pytest.approx(slope, rel=1e-6), name


def test_an_error_is_infinite_for_nan_for_inf_and_for_another_shape():
    ref = np.ones((2, 2))
    assert error(torch.ones(2, 2), ref) == 0.0
    assert error(torch.tensor([[1.0, 1.0], [1.0, math.nan]]), ref) == math.inf
    assert error(torch.tensor([[1.0, 1.0], [1.0, math.inf]]), ref) == math.inf
    assert error(torch.ones(2), ref) == math.inf
    assert error(torch.full((2, 2), 1e-30), np.zeros((2, 2))) == math.inf
    assert error(torch.zeros(2, 2), np.zeros((2, 2))) == 0.0


def test_limits_are_those_of_the_definition():
    assert limit(torch.float64, 1 << 20) == 1e-12
    assert limit(torch.float32, 10) == limit(torch.float32, 4096) == 2e-6
    assert limit(torch.float32, 4 * 4096) == 4e-6
    assert limit(torch.float16, 1 << 20) == 2e-3
    assert limit(torch.bfloat16, 1 << 20) == 8e-3
    assert limit(torch.float32, 10, torch.bfloat16) == 2e-6 + 2**-8


# Groups


@given(size=st.integers(1, 300), data=st.data())
@examples(60)
def test_groups_are_contiguous_balanced_and_not_empty(size, data):
    r = data.draw(st.integers(1, size))
    index = definition.group_index(size, r).tolist()
    assert index == groups(size, r)
    assert index == sorted(index)
    sizes = [index.count(k) for k in range(r)]
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


# Types and options


@given(case=cases((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
@examples(60)
def test_the_definition_matches_the_reference(case):
    check(case, run(case, fused=False))


@every_form
def test_increment_is_the_multiplier_less_1(form):
    case = make(1, 9, 8, 3, factor_dtype=torch.float64, **form)
    increment = definition.increment(case.hut_A, case.hut_B, case.spec)
    assert error(increment, case.multiplier() - 1.0) < 1e-14


def test_the_increment_of_a_residual_form_does_not_cancel():
    case = make(1, 9, 8, 2)
    tiny = case.replace(hut_B=case.hut_B * 1e-12)
    increment = definition.increment(tiny.hut_A, tiny.hut_B, tiny.spec)
    product = tiny.hut_B.double().numpy() @ tiny.hut_A.double().numpy()
    assert error(increment, product) < 1e-6  # 1 + 1e-12 would be 1 in float32
