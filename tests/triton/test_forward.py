"""The fused forward against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels.triton import forward as forward_module
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
    update_of,
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
    forward,
)

LEFT = launch.LaunchConfig(BN=16, BO=32, BK=16, warps=4, stages=1, W_FIRST=True)

# Sizes (K, O, r) whose groups are whole tiles of 16, on either side or on none; with one group the
# remainder belongs to it too. P and Q: whether the kernel may load a vector for each tile.
UNIFORM = {
    "both": ((96, 64, 2), True, True),
    "rows": ((90, 64, 2), True, False),
    "columns": ((96, 60, 2), False, True),
    "neither": ((50, 45, 3), False, False),
    "one group": ((37, 35, 1), True, True),
}


@every_form
@every_dtype
@every_config
@pytest.mark.parametrize("vectors", ["", "bias", "gamma", "beta", "bias gamma beta"])
def test_every_variant(form, dtype, config, vectors):
    case = make_normal(19, 37, 35, 3, dtype=dtype, vectors=vectors, **form)
    check(case, forward(case, config))


@every_form
@every_shape
@pytest.mark.parametrize("config", [SQUARE, LEFT], ids=["x first", "W first"])
def test_every_shape(form, shape, config):
    case = make(*shape, min(3, *shape[1:]), vectors="bias gamma beta", **form)
    check(case, forward(case, config))


@every_transform
@every_rank
def test_every_rank(transform, r):
    case = make_normal(5, 133, 129, r, transform=transform)
    check(case, forward(case, launch.LaunchConfig(BN=16, BO=128, BK=64, warps=4, stages=1)))


@every_form
@every_dtype
@pytest.mark.parametrize("num_splits", [2, 3, 7])
def test_programs_that_share_K_add_up(form, dtype, num_splits):
    case = make_normal(18, 100, 37, 3, dtype=dtype, vectors="bias gamma beta", **form)
    y = forward(case, num_splits=num_splits)
    check(case, y)
    assert torch.equal(forward(case, num_splits=num_splits)["y"], y["y"])


def test_more_programs_than_tiles_over_K():
    case = make_normal(5, 20, 16, 3, vectors="bias")
    check(case, forward(case, num_splits=5))


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(form, layout):
    case = laid_out(make_normal(18, 35, 21, 3, vectors="bias gamma beta", **form), layout)
    check(case, forward(case))


@every_config
def test_an_expanded_input(config):
    case = make_normal(18, 35, 21, 3)
    case = case.replace(x=case.x[:1].expand(18, 35))
    check(case, forward(case, config))


@every_form
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@every_dtype
def test_any_mix_of_types(form, dtype, weight_dtype, factor_dtype):
    types = {"dtype": dtype, "weight_dtype": weight_dtype, "factor_dtype": factor_dtype}
    case = make_normal(9, 35, 21, 3, vectors="bias", **types, **form)
    check(case, forward(case))


@pytest.mark.parametrize("GROUP", [1, 2, 100])
def test_every_tile_of_any_order_is_written(GROUP):
    case = make_normal(70, 16, 90, 3)
    check(case, forward(case, launch.LaunchConfig(16, 16, 16, warps=4, stages=1, GROUP=GROUP)))


@pytest.mark.parametrize(("sizes", "P", "Q"), UNIFORM.values(), ids=UNIFORM)
def test_groups_within_tiles_and_across(sizes, P, Q, monkeypatch):
    case = make_normal(9, *sizes, transform="two_sided")
    options = launch.transform_options(case.layer, torch.float32, SQUARE)
    assert (options["UNIFORM_P"], options["UNIFORM_Q"]) == (P, Q)
    y = forward(case)
    check(case, y)
    monkeypatch.setattr(launch, "_is_uniform", lambda size, r, block: False)
    assert torch.equal(forward(case)["y"], y["y"])


@every_dtype
@every_transform
def test_the_update_arrives_where_the_base_cancels(dtype, transform):
    case = cancelling(make_normal(17, 80, 40, 4, dtype=dtype, transform=transform), 5e-2)
    found = error(forward(case)["y"], update_of(case))
    assert found <= update_limit(dtype, transform, "merged")


@every_form
@every_dtype
def test_loads_through_descriptors(form, dtype, monkeypatch):
    """Rows on 16-byte addresses, remainders in every dimension; and views, that take pointers."""
    used = []
    descriptors = launch.descriptors

    def watched(*args):
        used.append(descriptors(*args)[0])
        return descriptors(*args)

    monkeypatch.setattr(forward_module, "descriptors", watched)
    case = make_normal(19, 40, 56, 3, dtype=dtype, vectors="bias gamma beta", **form)
    check(case, forward(case, THROUGH_TMA))
    for layout in ("transposed", "sliced", "offset"):
        check(case, forward(laid_out(case, layout), THROUGH_TMA))
    assert used == [True, False, False, False]


@every_form
@every_dtype
@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("config", [SQUARE, LEFT], ids=["x first", "W first"])
def test_whole_tiles_need_no_masks(form, dtype, r, config):
    """Only the tokens leave a remainder."""
    case = make_normal(19, 64, 96, r, dtype=dtype, vectors="bias gamma beta", **form)
    check(case, forward(case, config))


@given(
    case=cases(DTYPES, sizes=st.integers(1, 40), leading=False, max_rank=20),
    config=st.sampled_from([SQUARE, WIDE, TALL, LEFT]),
)
@examples(40)
def test_any_layer(case, config):
    check(case, forward(case, config))
