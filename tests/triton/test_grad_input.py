"""The fused input gradient against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels.triton import grad_input as grad_input_module
from hut_kernels.triton import launch

from ..references import (
    LAYOUTS,
    cancelling,
    check,
    error,
    laid_out,
    make,
    make_normal,
    update_limit,
)
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
    grad_input,
    transposed_forward,
    transposed_grad_input,
)
from .test_forward import UNIFORM

LEFT = launch.LaunchConfig(BN=16, BO=16, BK=32, warps=4, stages=1, W_FIRST=True)


@every_form
@every_dtype
@every_config
@pytest.mark.parametrize("vectors", ["", "gamma"])
def test_every_variant(form, dtype, config, vectors):
    case = make_normal(19, 37, 35, 3, dtype=dtype, vectors=vectors, **form)
    check(case, grad_input(case, config))


@every_form
@every_shape
@pytest.mark.parametrize("config", [SQUARE, LEFT], ids=["grad first", "W first"])
def test_every_shape(form, shape, config):
    case = make(*shape, min(3, *shape[1:]), vectors="gamma", **form)
    check(case, grad_input(case, config))


@every_form
@pytest.mark.parametrize("config", [SQUARE, LEFT, THROUGH_TMA], ids=["g first", "W first", "TMA"])
@pytest.mark.parametrize("product", [transposed_forward, transposed_grad_input])
def test_a_transposed_weight_is_the_weight_of_the_other_product(form, config, product):
    case = make_normal(19, 56, 40, 4, dtype=torch.float16, vectors="bias gamma beta", **form)
    case = case.replace(weight=case.weight.t().contiguous().t())
    for num_splits in (1, 2):
        check(case, product(case, config, num_splits=num_splits))


@every_form
@every_dtype
@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("config", [SQUARE, LEFT], ids=["grad first", "W first"])
def test_whole_tiles_need_no_masks(form, dtype, r, config):
    """Only the tokens leave a remainder."""
    case = make_normal(19, 64, 96, r, dtype=dtype, **form)
    check(case, grad_input(case, config))


@every_transform
@every_rank
def test_every_rank(transform, r):
    case = make_normal(5, 133, 129, r, transform=transform)
    check(case, grad_input(case, launch.LaunchConfig(BN=16, BO=64, BK=128, warps=4, stages=1)))


@every_form
@pytest.mark.parametrize("num_splits", [2, 3, 7])
def test_programs_that_share_O_add_up(form, num_splits):
    case = make_normal(18, 37, 100, 3, vectors="gamma", **form)
    dx = grad_input(case, num_splits=num_splits)
    check(case, dx)
    assert torch.equal(grad_input(case, num_splits=num_splits)["x"], dx["x"])


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [None, "expanded", "constant"])
def test_views_and_expanded_gradients(form, layout, grad):
    case = laid_out(make_normal(18, 35, 21, 3, vectors="gamma", **form), layout, grad)
    check(case, grad_input(case))


@every_form
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@every_dtype
def test_any_mix_of_types(form, dtype, weight_dtype, factor_dtype):
    types = {"dtype": dtype, "weight_dtype": weight_dtype, "factor_dtype": factor_dtype}
    case = make_normal(9, 35, 21, 3, vectors="gamma", **types, **form)
    check(case, grad_input(case))


@pytest.mark.parametrize("GROUP", [1, 2, 100])
def test_every_tile_of_any_order_is_written(GROUP):
    case = make_normal(70, 90, 16, 3)
    check(case, grad_input(case, launch.LaunchConfig(16, 16, 16, warps=4, stages=1, GROUP=GROUP)))


@pytest.mark.parametrize(("sizes", "P", "Q"), UNIFORM.values(), ids=UNIFORM)
def test_groups_within_tiles_and_across(sizes, P, Q, monkeypatch):
    case = make_normal(9, *sizes, transform="two_sided")
    dx = grad_input(case)
    check(case, dx)
    monkeypatch.setattr(launch, "_is_uniform", lambda size, r, block: False)
    assert torch.equal(grad_input(case)["x"], dx["x"])


@every_dtype
def test_the_update_arrives_where_the_base_cancels(dtype):
    """The base cancels over the outputs, as it does over the inputs in the forward's test."""
    case = cancelling(make_normal(17, 40, 80, 4, dtype=dtype), 5e-2)
    weight, grad = case.weight.clone(), case.grad.clone()
    weight[1::2], grad[:, 1::2] = -weight[::2], grad[:, ::2]
    case = case.replace(weight=weight, grad=grad)
    update = case.grad.double().numpy() @ (weight.double().numpy() * (case.multiplier() - 1.0))
    assert error(grad_input(case)["x"], update) <= update_limit(dtype, "low_rank", "merged")


@every_form
@every_dtype
def test_loads_through_descriptors(form, dtype, monkeypatch):
    """Rows on 16-byte addresses, remainders in every dimension; and views, that take pointers."""
    used = []
    descriptors = launch.descriptors

    def watched(*args):
        used.append(descriptors(*args)[0])
        return descriptors(*args)

    monkeypatch.setattr(grad_input_module, "descriptors", watched)
    case = make_normal(19, 40, 56, 3, dtype=dtype, vectors="gamma", **form)
    check(case, grad_input(case, THROUGH_TMA))
    for layout in ("transposed", "sliced", "offset"):
        check(case, grad_input(laid_out(case, layout), THROUGH_TMA))
    assert used == [True, False, False, False]


@given(
    case=cases(DTYPES, sizes=st.integers(1, 40), leading=False, max_rank=20),
    config=st.sampled_from([SQUARE, WIDE, TALL, LEFT]),
)
@examples(40)
def test_any_layer(case, config):
    check(case, grad_input(case, config))
