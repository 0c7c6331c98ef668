"""The kernels on a CUDA device, at real sizes and in every type, by every strategy."""

import pytest
import torch

from hut_kernels import backends, hut_linear, planner

from ..references import (
    LAYOUTS,
    cancelling,
    check,
    error,
    gain,
    laid_out,
    make_normal,
    operators,
    run,
    update_limit,
    update_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
    ),
]

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0, "scaling": 1.25},
    "two_sided": {"transform": "two_sided"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str
)
every_strategy = pytest.mark.parametrize(
    "strategies",
    [
        {},
        {"forward": "fused", "grad_input": "fused", "grad_factors": "fused"},
        {"forward": "staged", "grad_input": "staged", "grad_factors": "chunked"},
    ],
    ids=["planned", "fused", "staged"],
)
ALL = "bias gamma beta"


def case_on_device(*args, **kwargs):
    return make_normal(*args, device="cuda", **kwargs)


def test_triton_is_available_and_auto_takes_it_or_the_extension():
    assert backends()["triton"]["available"], backends()["triton"]["reason"]
    case = case_on_device(16, 256, 256, 8)
    factors = case.weight, case.hut_A, case.hut_B
    winner = "cuda" if backends()["cuda"]["available"] else "triton"  # it gets layers so small
    assert torch.equal(hut_linear(case.x, *factors), hut_linear(case.x, *factors, backend=winner))


@every_form
@every_dtype
@every_strategy
@pytest.mark.parametrize("N", [1, 16, 77, 1024])
def test_a_layer(form, dtype, strategies, N):
    case = case_on_device(N, 1024, 768, 16, dtype=dtype, vectors=ALL, **form)
    with planner.force(**strategies):
        check(case, run(case))


@every_dtype
@every_strategy
@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
@pytest.mark.parametrize("r", [1, 3, 17, 64, 128])
def test_any_rank(dtype, strategies, transform, r):
    case = case_on_device(70, 384, 272, r, dtype=dtype, vectors="gamma", transform=transform)
    with planner.force(**strategies):
        check(case, run(case))


@every_form
@every_dtype
@every_strategy
@pytest.mark.parametrize(
    "shape", [(33, 333, 201), (1, 1, 1), (5, 1000, 3), (129, 17, 515)], ids=str
)
def test_remainders(form, dtype, strategies, shape):
    case = case_on_device(*shape, 1, dtype=dtype, vectors=ALL, **form)
    # A single element may cancel, and no limit on its relative error can hold then.
    case = case.replace(x=case.x.abs(), weight=case.weight.abs(), grad=case.grad.abs())
    vectors = {name: getattr(case, name).abs() for name in ("bias", "gamma", "beta")}
    case = case.replace(**vectors)
    with planner.force(**strategies):
        check(case, run(case))


@every_form
@every_dtype
@every_strategy
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("grad", [None, "expanded"])
def test_views(form, dtype, strategies, layout, grad):
    case = laid_out(case_on_device(40, 192, 144, 4, dtype=dtype, vectors="gamma", **form), layout)
    case = laid_out(case, layout, grad)
    with planner.force(**strategies):
        check(case, operators(case, "triton"))


@every_form
@every_dtype
@every_strategy
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_the_update_arrives_where_the_base_cancels(form, dtype, strategies, precision):
    form = {**form, "scaling": 1.0, "precision": precision}
    case = cancelling(case_on_device(64, 1024, 512, 4, dtype=dtype, **form), 5e-2)
    with planner.force(**strategies):
        y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, **case.options)
    assert error(y, update_of(case)) <= update_limit(dtype, case.transform, precision)


@every_dtype
def test_split_keeps_an_update_of_a_thousandth(dtype):
    case = cancelling(case_on_device(64, 1024, 512, 4, dtype=dtype, precision="split"), 1e-3)
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, **case.options)
    assert 0.98 <= gain(y, update_of(case)) <= 1.02


@every_strategy
def test_two_runs_are_equal_to_the_bit(strategies):
    case = case_on_device(256, 1024, 768, 8, dtype=torch.bfloat16, vectors=ALL)
    with planner.force(**strategies):
        one, two = run(case), run(case)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
def test_a_fused_step_at_few_tokens_allocates_no_weight(transform):
    case = case_on_device(16, 2048, 2048, 8, dtype=torch.bfloat16, transform=transform)
    fused = {"forward": "fused", "grad_input": "fused", "grad_factors": "fused"}
    with planner.force(**fused):
        run(case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < case.weight.numel() * case.weight.element_size()
