"""Stacks of experts by the kernels: a launch for a group, equal to float64 per expert."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from hut_kernels import devices, planner
from hut_kernels.triton import grad_reduce, weight
from tests.test_grouped import ALL, FORMS, stack

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def launched(monkeypatch):
    """The programs of each launch, by kernel; groups of two experts."""
    monkeypatch.setattr(planner, "group_size", lambda experts, arch: 2)
    programs = {"weight": [], "reduce": []}

    def watched(kernel, name):
        class Watched:
            def __getitem__(self, grid):
                programs[name].append(grid[0])
                return kernel[grid]

        return Watched()

    for module, kernel, name in (
        (weight, "hut_weight_kernel", "weight"),
        (grad_reduce, "hut_grad_reduce_kernel", "reduce"),
    ):
        monkeypatch.setattr(module, kernel, watched(getattr(module, kernel), name))
    return programs


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vectors", ["", ALL])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_equals_float64(launched, form, dtype, vectors, transposed):
    experts = stack(37, 29, 3, (0, 1, 17, 0, 5), dtype=dtype, vectors=vectors, **form)
    experts.check(experts.run(backend="triton", transposed=transposed))
    groups = 2 if dtype == torch.float32 else 3  # there G is wider than W, so for one expert
    assert len(launched["reduce"]) == groups
    assert len(launched["weight"]) == 2 + groups  # in forward, and for dx


@every_form
def test_groups_through_the_grouped_gemm(launched, form):
    """Widths of 16 bytes, so that the product is one call as well."""
    experts = stack(32, 16, 2, (1, 0, 17, 5, 2), vectors=ALL, **form)
    experts.check(experts.run(backend="triton"))


def test_a_launch_is_for_the_experts_of_a_group_that_have_rows(launched):
    experts = stack(24, 16, 2, (0, 4, 0, 0, 3, 0, 2))
    experts.check(experts.run(backend="triton"))
    two, one = launched["weight"][:2]
    assert two == 2 * one  # the third expert with rows is by itself
    assert launched["weight"] == [two, one] * 2
    assert len(launched["reduce"]) == 2


@pytest.mark.parametrize("name", ["x", "hut_A", "hut_B", "gamma", "beta", "bias"])
def test_only_the_gradient_asked_for(launched, name):
    experts = stack(24, 16, 2, vectors=ALL)
    leaves = {key: value.requires_grad_(key == name) for key, value in experts.leaves().items()}
    y = experts.call(leaves, backend="triton")
    (grad,) = torch.autograd.grad(y, leaves[name], experts.grad)
    whole = experts.run(backend="triton")[name]
    assert torch.equal(grad, whole)


def test_a_rank_without_kernels_goes_to_pytorch(launched):
    experts = stack(160, 144, planner.MAX_RANK + 1, (0, 3))
    experts.check(experts.run(backend="triton"))
    assert not launched["weight"]
    assert not launched["reduce"]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "shifted"])
def test_any_strides(launched, layout):
    from tests.references import lay
    from tests.test_grouped import STACKS

    experts = stack(24, 16, 2, vectors=ALL)
    for name in ("x", "grad", *STACKS):
        setattr(experts, name, lay(getattr(experts, name), layout))
    experts.check(experts.run(backend="triton"))


@pytest.mark.parametrize("name", ["launch_weight", "ExpertsReduction.add"])
def test_a_launch_that_does_not_fit_leaves_the_experts_to_pytorch(launched, monkeypatch, name):
    def too_large(*args, **kwargs):
        raise OutOfResources(300_000, 101_376, "shared memory")

    where = weight if name == "launch_weight" else grad_reduce.ExpertsReduction
    monkeypatch.setattr(devices, "_misfits", {})
    monkeypatch.setattr(where, name.split(".")[-1], too_large)
    experts = stack(24, 16, 2, vectors=ALL)
    with pytest.warns(UserWarning, match="does not fit"):
        experts.check(experts.run(backend="triton"))
    launched["weight"].clear()
    experts.check(experts.run(backend="triton"))
    assert not launched["weight"]
