"""The operators on Triton: every strategy, whatever the plan would have been."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import OutOfResources

from hut_kernels import auto, backends, devices, hut_linear, hut_weight, ops, planner
from hut_kernels.layer import Needs
from hut_kernels.triton import backend, launch
from hut_kernels.versions import Miscompile

from ..references import (
    LAYOUTS,
    Recorder,
    cancelling,
    check,
    error,
    gain,
    laid_out,
    make,
    make_normal,
    operators,
    run,
    update_limit,
    update_of,
)
from ..strategies import cases, examples
from .launches import DTYPES, every_dtype, every_form

STRATEGIES = [
    {"forward": "fused", "grad_input": "fused", "grad_factors": "fused"},
    {"forward": "staged", "grad_input": "staged", "grad_factors": "chunked"},
]
every_strategy = pytest.mark.parametrize("strategies", STRATEGIES, ids=["fused", "staged"])
LAUNCHERS = {
    "forward": backend.fused_forward,
    "grad_input": backend.fused_grad_input,
    "grad_factors": backend.fused_grad_factors,
    "grad_reduce": backend.chunked_grad_factors,
    "weight": backend.weight_kernel,
}


@contextlib.contextmanager
def launches():
    """The names of the kernels that are launched in the block."""
    names = []

    def counted(name, launcher):
        def call(*args, **kwargs):
            names.append(name)
            return launcher(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, module in LAUNCHERS.items():
            launcher = f"launch_{name}"
            patch.setattr(module, launcher, counted(name, getattr(module, launcher)))
        yield names


# Right


@every_form
@every_dtype
@every_strategy
def test_a_layer_on_triton_matches_the_reference(form, dtype, strategies):
    case = make_normal((3, 7), 80, 66, 5, dtype=dtype, vectors="bias gamma beta", **form)
    with planner.force(**strategies), launches() as launched:
        check(case, run(case, backend="triton"))
    fused, staged = ["forward", "grad_input", "grad_factors"], ["weight", "weight", "grad_reduce"]
    assert launched == (fused if strategies["forward"] == "fused" else staged)


@pytest.mark.parametrize("denied", ["forward", "grad_input", "grad_factors"])
def test_the_planner_avoids_a_miscompiled_kernel(denied, monkeypatch):
    known = Miscompile("3.6.0", "3.7.0", ("sm_80",), (denied,), "example.org/1", "wrong")
    device = dataclasses.replace(auto._INTERPRETER, miscompiles=(known,))
    case = make_normal(16, 64, 32, 16, dtype=torch.float32, vectors="bias gamma")
    fused = ["forward", "grad_input", "grad_factors"]
    instead = {"grad_factors": "grad_reduce"}.get(denied, "weight")
    with launches() as launched:
        check(case, run(case, backend="triton"))
    assert launched == fused
    monkeypatch.setattr(auto, "_INTERPRETER", device)
    with launches() as launched:
        check(case, run(case, backend="triton"))
    assert launched == [instead if kernel == denied else kernel for kernel in fused]


@pytest.fixture
def too_large(monkeypatch):
    """Launches of the kernels that are put into the set are too large; nothing is known yet."""
    kernels = set()

    def guarded(name, launcher):
        def call(*args, **kwargs):
            if name in kernels:
                raise OutOfResources(300_000, 101_376, "shared memory")
            return launcher(*args, **kwargs)

        return call

    monkeypatch.setattr(devices, "_misfits", {})
    for name, module in LAUNCHERS.items():
        launcher = f"launch_{name}"
        monkeypatch.setattr(module, launcher, guarded(name, getattr(module, launcher)))
    return kernels


@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_a_launch_that_does_not_fit_is_passed_by(kernel, too_large):
    """By the staged path, and where that does not fit either, by PyTorch; said once a row."""
    case = make_normal(16, 64, 32, 16, dtype=torch.float32, vectors="bias gamma")
    expected = ["forward", "grad_input", "grad_factors"]
    if kernel in ("weight", "grad_reduce"):  # for what the fused ones leave
        too_large |= {"forward", "grad_input", "grad_factors"}
        expected = []
    too_large.add(kernel)
    with pytest.warns(UserWarning, match="does not fit") as said:
        check(case, run(case, backend="triton"))
    ours = [str(one.message) for one in said if one.category is UserWarning]  # numpy has others
    names = [message.split(" does not fit")[0] for message in ours]
    assert f"on interpreter {kernel}" in names
    assert len(names) == len({*names})
    with warnings.catch_warnings(), launches() as launched:
        warnings.simplefilter("error", UserWarning)
        check(case, run(case, backend="triton"))
        with planner.force(**STRATEGIES[0]):  # nor is it launched where it is forced
            check(case, run(case, backend="triton"))
    instead = {"grad_factors": "grad_reduce"}.get(kernel, "weight")
    assert launched == 2 * [instead if name == kernel else name for name in expected]
    plan = auto.plan_call("triton", case.layer, case.x)
    assert f"{kernel} does not fit this device, and is passed by: shared memory" in str(plan)
    assert "300000, at most 101376" in str(plan)


def test_a_launch_that_does_not_fit_is_passed_by_in_its_row_only(too_large):
    too_large.add("forward")
    row = {"dtype": torch.float32, "r": 16}
    with pytest.warns(UserWarning, match="does not fit"):
        run(make_normal(16, 64, 32, **row), backend="triton")
    with warnings.catch_warnings(), launches() as launched:
        warnings.simplefilter("error", UserWarning)
        run(make_normal(3, 96, 48, **row), backend="triton")  # the same
    assert launched[0] == "weight"
    for N, other in ((17, row), (16, {**row, "r": 32}), (16, {**row, "dtype": torch.float16})):
        with pytest.warns(UserWarning, match="does not fit"):
            run(make_normal(N, 64, 32, **other), backend="triton")


def test_a_weight_that_cannot_be_written_is_merged_by_pytorch(too_large):
    too_large.add("weight")
    case = make_normal(1, 48, 36, 3)
    spec = case.transform, case.offset, case.scaling
    with pytest.warns(UserWarning, match="weight does not fit"):
        out = ops.weight(case.weight, case.hut_A, case.hut_B, None, *spec, torch.float32, "triton")
    assert error(out, case.merged_weight()) < 1e-6


@every_form
@every_strategy
def test_forward_multiplies_by_the_merged_weight_to_the_bit(form, strategies):
    """But for gamma, by which a fused product multiplies its result, not W."""
    case = make_normal(80, 80, 72, 5, vectors="gamma", **form)
    for gamma in (None, case.gamma) if strategies["forward"] == "staged" else (None,):
        factors, options = (case.weight, case.hut_A, case.hut_B), {**case.options, "gamma": gamma}
        options |= {"beta": None}
        with planner.force(**strategies):
            y = hut_linear(torch.eye(80), *factors, **options, backend="triton")
        spec = case.transform, case.offset, case.scaling
        assert torch.equal(y.t(), ops.weight(*factors, gamma, *spec, torch.float32, "triton"))


@every_form
@every_dtype
@pytest.mark.parametrize("sizes", [(16, 64, 48), (17, 48, 64)])
def test_a_transposed_weight_goes_to_the_kernel_of_the_other_direction(form, dtype, sizes):
    """As it lies it is the weight of W^T, with the loads of a plain one."""
    case = make_normal(*sizes, 16, dtype=dtype, vectors="bias gamma beta", **form)
    case = case.replace(weight=case.weight.t().contiguous().t())
    with planner.force(**STRATEGIES[0]), launches() as launched:
        check(case, run(case, backend="triton"))
    assert launched == ["grad_input", "forward", "grad_factors"]


@every_form
@every_dtype
def test_split_is_two_products_with_the_staged_update(form, dtype):
    case = make_normal(9, 48, 36, 3, dtype=dtype, vectors="gamma", precision="split", **form)
    with planner.force(**STRATEGIES[0]), launches() as launched:
        check(case, run(case, backend="triton"))
    assert launched == ["weight", "weight", "grad_factors"]


@given(
    case=cases(DTYPES, sizes=st.integers(1, 40), max_rank=20),
    strategies=st.sampled_from([{}, *STRATEGIES]),
)
@examples(30)
def test_any_layer_with_any_strategy(case, strategies):
    with planner.force(**strategies):
        check(case, run(case, backend="triton"))


@pytest.mark.parametrize("sizes", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("leading", [1, 2])
def test_dimensions_of_0_and_1(sizes, leading):
    N, K, O = sizes
    case = make((N,) * leading, K, O, 2, vectors="bias gamma beta")
    check(case, run(case, backend="triton"))


@every_strategy
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("grad", [None, "expanded", "constant"])
def test_views(strategies, layout, grad):
    case = laid_out(make_normal((2, 9), 32, 48, 3, vectors="bias gamma"), layout, grad)
    with planner.force(**strategies):
        check(case, operators(case, "triton"))


@pytest.mark.parametrize("r", [1, 128, 129])
@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
def test_ranks_at_the_limit_and_beyond(r, transform):
    case = make_normal(3, 144, 130, r, transform=transform)
    with launches() as launched:
        check(case, run(case, backend="triton"))
    assert bool(launched) == (r <= planner.MAX_RANK)


@every_form
@every_dtype
@pytest.mark.parametrize("vectors", ["", "gamma"])
def test_hut_weight(form, dtype, vectors):
    """hut_weight itself is "auto", which is torch on a CPU: the operator is asked for Triton."""
    case = make_normal(1, 48, 36, 3, dtype=dtype, vectors=vectors, **form)
    spec = case.transform, case.offset, case.scaling
    factors = case.weight, case.hut_A, case.hut_B
    with launches() as launched:
        out = ops.weight(*factors, case.gamma, *spec, dtype, "triton")
    assert launched == ["weight"]
    assert error(out, case.merged_weight()) < (1e-6 if dtype == torch.float32 else 2**-11 + 1e-6)
    options = {name: case.options[name] for name in ("transform", "offset", "scaling", "gamma")}
    same = hut_weight(*factors, **options)
    assert error(same, out.double().numpy()) < (1e-6 if dtype == torch.float32 else 1e-3)


@every_form
@every_dtype
@every_strategy
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_the_update_arrives_where_the_base_cancels(form, dtype, strategies, precision):
    form = {**form, "scaling": 1.0}
    case = cancelling(make_normal(16, 128, 64, 4, dtype=dtype, **form), 5e-2)
    case = case.replace(precision=precision)
    with planner.force(**strategies):
        y = hut_linear(
            case.x, case.weight, case.hut_A, case.hut_B, **case.options, backend="triton"
        )
    assert error(y, update_of(case)) <= update_limit(dtype, case.transform, precision)


@every_form
@every_dtype
def test_split_keeps_an_update_of_a_thousandth(form, dtype):
    form = {**form, "scaling": 1.0, "precision": "split"}
    case = cancelling(make_normal(16, 128, 64, 4, dtype=dtype, **form), 1e-3)
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, **case.options, backend="triton")
    assert 0.98 <= gain(y, update_of(case)) <= 1.02


# Memory


def test_the_fused_path_has_no_temporary_of_the_weights_size():
    """Nor partials above a quarter of it."""
    case = make_normal(8, 256, 192, 4, vectors="bias gamma beta")
    with planner.force(**STRATEGIES[0]), Recorder() as recorder, launches() as launched:
        plan = auto.plan_call("triton", case.layer, case.grad, case.x)
        backend.linear_forward(plan, case.x, case.layer)
        backend.linear_backward(plan, case.grad, case.x, case.layer, True, Needs(True, True, True))
    assert launched == ["forward", "grad_input", "grad_factors"]
    made = [
        torch.Size(args[0]).numel()
        for name, args in recorder.calls
        if name.startswith("aten::empty.") or name == "aten::empty"
    ]
    assert made
    assert max(made) <= case.weight.numel() // 4


def test_each_direction_is_planned_once(monkeypatch):
    planned, plan = [], planner.plan
    monkeypatch.setattr(planner, "plan", lambda *args: planned.append(args) or plan(*args))
    case = make_normal(8, 64, 48, 4, vectors="bias gamma beta")
    run(case, backend="triton")
    assert len(planned) == 2


def test_two_runs_are_equal_to_the_bit():
    case = make_normal(20, 144, 112, 3, dtype=torch.float16, vectors="bias gamma beta")
    for strategies in STRATEGIES:
        with planner.force(**strategies):
            one, two = run(case, backend="triton"), run(case, backend="triton")
        assert all(torch.equal(one[name], two[name]) for name in one)


# The plan of a call


def test_alignment():
    """Rows of a multiple of 16 elements, either way round, from a 16-byte address."""
    wide = torch.zeros(8, 64)
    assert auto._is_aligned(wide)
    assert auto._is_aligned(wide.t())
    assert auto._is_aligned(torch.zeros(8, 3))  # hut_B at a small rank
    assert not auto._is_aligned(torch.zeros(8, 63))
    assert not auto._is_aligned(wide[:, 1:])
    assert not auto._is_aligned(wide[:, ::2])
    assert auto._is_aligned(wide[:, 16:])


def test_unaligned_shapes_are_staged():
    with launches() as launched:
        run(make_normal(4, 63, 48, 3), backend="triton")
    assert launched == ["weight", "weight", "grad_reduce"]
    with launches() as launched:
        run(make_normal(4, 64, 48, 3), backend="triton")
    assert launched == ["forward", "grad_input", "grad_factors"]


def test_many_tokens_are_staged():
    with launches() as launched:
        run(make_normal(1024, 16, 16, 2), backend="triton")
    assert launched == ["weight", "weight", "grad_reduce"]


@pytest.mark.parametrize(
    ("heavy", "changes"),
    [
        (False, {}),
        (True, {"weight": lambda w: w.float()}),
        (False, {"transform": "two_sided", "size": 512, "r": 1}),
        (False, {"transform": "two_sided", "size": 512, "r": 2}),
        (True, {"transform": "two_sided", "size": 768, "r": 16}),
    ],
    ids=["plain", "wide", "one group", "whole tiles", "ragged"],
)
def test_variants_that_need_more_memory_take_low_smem_configs(heavy, changes, monkeypatch):
    """Configs of the tables are as large as a plain call can hold: others would not be launched."""
    size, r = changes.get("size", 256), changes.get("r", 4)
    case = make_normal(16, size, size, r, dtype=torch.float16)
    weight = changes.get("weight", lambda w: w)(case.weight)
    looked_up, original = {}, backend.launch_config

    def noted(kernel, arch, N, r, dtype, low_smem=False, gathers=False):
        looked_up[kernel] = low_smem
        return original(kernel, arch, N, r, dtype, low_smem, gathers)

    monkeypatch.setattr(backend, "launch_config", noted)
    with launches() as launched:
        run(case.replace(weight=weight), backend="triton", **{
            key: value for key, value in changes.items() if key == "transform"
        })  # fmt: skip
    assert launched == ["forward", "grad_input", "grad_factors"]
    assert looked_up == dict.fromkeys(launched, heavy)


# Errors and the interpreter


def test_the_interpreter_is_named():
    assert backends()["triton"]["available"]
    assert "interpreter" in backends()["triton"]["reason"]


@pytest.mark.parametrize("name", ["x", "weight", "hut_A", "hut_B"])
def test_float64_is_refused(name):
    case = make(3, 16, 16, 2)
    case = case.replace(**{name: getattr(case, name).double()})
    with pytest.raises(TypeError, match=r'"triton" has no float64.*"torch"'):
        run(case, backend="triton")


@pytest.mark.parametrize("name", ["forward", "backward", "weight"])
@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
def test_the_fake_has_the_real_shapes_types_and_strides(name, transform):
    for layout in LAYOUTS:
        case = make((2, 3), 20, 18, 2, dtype=torch.float16, vectors="bias gamma beta")
        case = laid_out(case.replace(transform=transform), layout)
        factors = case.weight, case.hut_A, case.hut_B
        spec = case.transform, 1.0, 1.0
        arguments = {
            "forward": (case.x, *factors, case.bias, case.gamma, case.beta, *spec, "merged"),
            "backward": (case.grad, case.x, *factors, case.gamma, *spec, "merged", *[True] * 4),
            "weight": (*factors, case.gamma, *spec, torch.float32),
        }[name]
        op = getattr(torch.ops.hut, name).default
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op, (*arguments, "triton"), test_utils=tests)


# Launch options


def test_tf32_follows_pytorchs_switches():
    def products():
        return launch.product_precision(torch.float32), launch.thin_precision(torch.float32)

    before = torch.get_float32_matmul_precision()
    assert products() == ("ieee", "ieee")
    try:
        torch.set_float32_matmul_precision("high")
        assert products() == ("tf32", "tf32")
        assert launch.product_precision(torch.bfloat16) == "ieee"
        torch.set_float32_matmul_precision("highest")
        assert products() == ("ieee", "ieee")
        torch.backends.cuda.matmul.allow_tf32 = True
        assert products() == ("tf32", "tf32")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("r", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32), (33, 64), (65, 128), (128, 128)]
)
def test_ranks_are_padded_to_a_dots_minimum(r, padded):
    assert launch.padded_rank(r) == padded


def test_only_the_residual_increment_of_bfloat16_is_rounded():
    """The constexprs that decide the number format: the interpreter cannot run bfloat16."""
    tl = launch.tl
    case = make(1, 32, 32, 2)
    config = launch.LaunchConfig(16, 16, 16, warps=4, stages=1)

    def options(dtype, residual=True, **form):
        layer = case.replace(**form).layer
        made = launch.multiplier_options(layer, dtype, config, residual)
        return made["RESIDUAL"], made["FACTOR"]

    assert options(torch.bfloat16) == (True, tl.bfloat16)
    assert options(torch.float16) == (True, tl.float32)
    assert options(torch.float32) == (True, tl.float32)
    assert options(torch.bfloat16, residual=False) == (False, tl.float32)
    assert options(torch.bfloat16, offset=0.0) == (False, tl.float32)
    assert options(torch.bfloat16, transform="two_sided") == (False, tl.float32)
