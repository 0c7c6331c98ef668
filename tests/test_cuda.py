"""The compiled path on the CPU: the extension's operators and kernels, every thread emulated.

All of csrc/ but the launch itself runs here: the kernels' own source, compiled by the host compiler
and run thread by thread between barriers, under the extension's operators and the Python above.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given

from hut_kernels import devices, dispatch, hut_linear, hut_weight, ops, planner, rules

from . import csrc
from .references import (
    LAYOUTS,
    cancelling,
    check,
    error,
    gain,
    laid_out,
    limit,
    make,
    make_normal,
    operators,
    run,
    update_limit,
    update_of,
)
from .strategies import cases, examples

pytestmark = pytest.mark.timeout(900)  # the first test compiles: 10 s of one core
_MISSING = csrc.missing()
compiled = pytest.mark.skipif(_MISSING is not None, reason=f"csrc/ is not compiled: {_MISSING}")

FORMS = [{}, {"offset": 0.0, "scaling": 0.75}, {"transform": "two_sided"}]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Its L2 holds 128 rows of 80 columns, and its 8 multiprocessors want several splits.
SMALL = devices.Device("emulated", "sm_80", sms=8, shared_memory=0, l2=2 * 128 * 4 * 80)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The module `hut_kernels.cuda` with the emulated operators under it."""
    torch.ops.load_library(csrc.build_emulation(tmp_path_factory.mktemp("emulation")))
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("hut_kernels._C") is None:
            patch.setitem(sys.modules, "hut_kernels._C", types.ModuleType("_C"))
        from hut_kernels import cuda

        patch.setattr(cuda, "_operators", torch.ops.hut_emulated)
        patch.setattr(cuda, "gpu", lambda device: SMALL)
        patch.setattr(dispatch, "_extension_unusable", lambda device: None)
        # What only CUDA has, and the extension calls: a 16-bit product with a float32 result.
        product = lambda left, right, dtype: torch.mm(left.to(dtype), right.to(dtype))  # noqa: E731
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("mm.dtype", product, "CPU")
            # Memory that C++ asks for is NaN as well, until it is written.
            torch.use_deterministic_algorithms(True)
            yield cuda
            torch.use_deterministic_algorithms(False)


@compiled
def test_by_itself_an_operator_refuses_its_backward(emulation):
    """Its rule under the emulated operators' name; under its own the rule is registered."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
    case = make(3, 6, 5, 2)
    leaf = case.hut_A.detach().requires_grad_()
    args = case.x, case.weight, leaf, case.hut_B, None, None, None, False, 1.0, 1.0, False
    with torch.library._scoped_library("hut_emulated", "IMPL") as library:
        for name in ("forward", "backward", "weight"):
            assert f"hut_cuda::{name}" in registered
            library.impl(name, rules.undifferentiated(emulation._operator(name)), "Autograd")
        y = torch.ops.hut_emulated.forward(*args)
        with torch.no_grad():
            assert torch.equal(y, torch.ops.hut_emulated.forward(*args))
        with pytest.raises(RuntimeError, match=r"no gradients: .* fused=False"):
            torch.autograd.grad(y.sum() + leaf.sum(), leaf)


@compiled
def test_the_program_of_index_and_reduction_logic(tmp_path):
    done = subprocess.run([csrc.build_check(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Against float64


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("vectors", ["", "bias gamma beta"])
def test_a_layer_and_its_gradients(emulation, dtype, form, vectors):
    for size in ((33, 80, 72, 5), (2, 136, 200, 17)):
        case = make_normal(*size, dtype=dtype, vectors=vectors, **form)
        check(case, run(case, backend="cuda"))


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("vectors", ["", "gamma"])
def test_forward_multiplies_by_the_merged_weight_to_the_bit(emulation, form, vectors):
    case = make_normal(80, 80, 72, 5, vectors=vectors, **form)
    factors = case.weight, case.hut_A, case.hut_B
    y = hut_linear(torch.eye(80), *factors, **case.options, backend="cuda")
    spec = case.transform, case.offset, case.scaling
    assert torch.equal(y.t(), ops.weight(*factors, case.gamma, *spec, torch.float32, "cuda"))


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ranks_up_to_the_largest(emulation, form):
    for r in (1, 3, 16, 32, 33, 100, 128, 150):
        case = make(9, 160, 152, r, vectors="gamma", **form)
        check(case, run(case, backend="cuda"))


@compiled
@examples(60)
@given(case=cases(tuple(TYPES)))
def test_any_layer(emulation, case):
    check(case, operators(case, "cuda"))


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [None, "expanded", "constant"])
def test_strides_and_expanded_gradients(emulation, layout, grad):
    for form in FORMS:
        case = laid_out(make(20, 72, 88, 6, vectors="bias gamma beta", **form), layout, grad)
        check(case, run(case, backend="cuda"))


@compiled
@pytest.mark.parametrize("weight_dtype", TYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", TYPES, ids=str)
def test_any_mix_of_types(emulation, weight_dtype, factor_dtype):
    for dtype in TYPES:
        types = {"dtype": dtype, "weight_dtype": weight_dtype, "factor_dtype": factor_dtype}
        case = make(7, 72, 80, 4, vectors="bias gamma beta", **types)
        check(case, run(case, backend="cuda"))


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_several_blocks_of_rows_and_splits(emulation, form):
    """Sums of columns go on from one block of rows to the next; sums of rows do not."""
    for transposed in (False, True):
        case = make(12, 80, 300, 9, vectors="bias gamma beta", **form)
        if transposed:
            case = case.replace(weight=case.weight.T.contiguous().T)
        rows, columns = (80, 300) if transposed else (300, 80)
        chunk, row_splits, column_splits = planner.reduction_splits(rows, columns, 9, 4, SMALL)
        assert row_splits > 1
        assert column_splits > 1
        assert transposed or chunk < rows
        check(case, run(case, backend="cuda"))


@compiled
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_the_update_on_its_own(emulation, dtype, form, precision):
    form = {**form, "scaling": 1.0}
    case = make_normal(16, 512, 64, 8, dtype=dtype, precision=precision, **form)
    case = cancelling(case, 5e-2)
    y = run(case, backend="cuda")["y"]
    assert error(y, update_of(case)) <= update_limit(dtype, case.transform, precision)


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_split_keeps_an_update_that_merged_rounds_away(emulation, form):
    form = {**form, "scaling": 1.0}
    case = make_normal(16, 512, 64, 8, dtype=torch.bfloat16, precision="split", **form)
    case = cancelling(case, 1e-3)
    assert 0.98 <= gain(run(case, backend="cuda")["y"], update_of(case)) <= 1.02


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_split_has_the_gradients_of_merged(emulation, form):
    vectors = "bias gamma beta"
    case = make(18, 72, 80, 4, dtype=torch.float16, precision="split", vectors=vectors, **form)
    check(case, run(case, backend="cuda"))


@compiled
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_merged_weight_is_exact_and_keeps_its_strides(emulation, dtype, form):
    for layout in LAYOUTS:
        case = laid_out(make(1, 88, 72, 12, dtype=dtype, vectors="gamma", **form), layout)
        arguments = case.weight, case.hut_A, case.hut_B, case.gamma
        made = ops.weight(
            *arguments, case.transform, case.offset, case.scaling, torch.float32, "cuda"
        )
        # Rounded only once: in float32 not at all, whatever W0 is.
        assert error(made, case.merged_weight()) <= limit(torch.float32, 1)
        assert made.stride() == torch.empty_like(case.weight).stride()


# How it runs


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_thread_reads_before_another_has_written(emulation, dtype, form, monkeypatch):
    """Threads run upwards and downwards between barriers: a missing one would show in either."""
    case = make(10, 136, 200, 40, dtype=dtype, vectors="bias gamma beta", **form)
    upwards = run(case, backend="cuda")
    monkeypatch.setitem(os.environ, "HUT_EMULATION_ORDER", "descending")
    downwards = run(case, backend="cuda")
    for name, value in upwards.items():
        assert torch.equal(value, downwards[name]), name


@compiled
@pytest.mark.parametrize("index", range(16))
def test_unneeded_gradients_are_not_computed(emulation, index):
    needs = tuple(bool(index >> bit & 1) for bit in range(4))
    for form in FORMS:
        case = make(5, 72, 80, 3, vectors="gamma", **form)
        found = operators(case, "cuda", needs)
        assert list(found)[1:] == [
            name for name, need in zip(("x", "hut_A", "hut_B", "WG"), needs, strict=True) if need
        ]
        check(case, found)


@pytest.fixture
def calls(emulation, monkeypatch):
    """The extension's operators in the order of their calls; auto is the extension."""
    names = []

    class Counted:
        def __getattr__(self, name):
            def default(*arguments):
                names.append(name)
                return getattr(torch.ops.hut_emulated, name).default(*arguments)

            return types.SimpleNamespace(default=default)

    monkeypatch.setattr(emulation, "_operators", Counted())
    monkeypatch.setattr(dispatch, "choose", lambda name, tensors: "cuda")
    return names


@compiled
def test_one_call_for_each_direction(calls):
    run(make(5, 72, 80, 3, vectors="bias gamma beta"))
    assert calls == ["forward", "backward"]


@compiled
def test_leading_dimensions_and_no_tokens(emulation):
    for leading in ((2, 3, 4), (), (0,), (2, 0)):
        case = make(leading, 24, 40, 3, vectors="bias gamma beta")
        found = run(case, backend="cuda")
        check(case, found)
        assert found["y"].shape == (*leading, 40)


@compiled
def test_the_operators_pass_opcheck(emulation):
    case = make(5, 24, 40, 3, vectors="bias gamma beta")
    form = "low_rank", 1.0, 1.0, "merged"
    factors = case.weight, case.hut_A, case.hut_B
    torch.library.opcheck(
        ops.forward, (case.x, *factors, case.bias, case.gamma, case.beta, *form, "cuda")
    )
    torch.library.opcheck(
        ops.backward, (case.grad, case.x, *factors, case.gamma, *form, *[True] * 4, "cuda")
    )


# What it refuses


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, "must have 2 dimensions"),
        ({"weight": torch.ones(0, 6)}, "weight must not be empty"),
        ({"hut_A": torch.ones(2, 7)}, r"for a weight \[5, 6\]; got \[2, 7\] and \[5, 2\]"),
        ({"hut_B": torch.ones(5, 3)}, r"got \[2, 6\] and \[5, 3\]"),
        ({"hut_A": torch.ones(0, 6), "hut_B": torch.ones(5, 0)}, "r must be between 1 and"),
        ({"gamma": torch.ones(6)}, "gamma must have 5 elements"),
        ({"weight": torch.ones(5, 6).double()}, "take float32, float16 and bfloat16"),
        ({"hut_A": torch.ones(2, 6).int()}, "take float32, float16 and bfloat16"),
    ],
)
def test_the_extensions_own_checks(emulation, change, message):
    given = {"weight": torch.ones(5, 6), "hut_A": torch.ones(2, 6), "hut_B": torch.ones(5, 2)}
    arguments = {**given, "gamma": None, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hut_emulated.weight(*arguments.values(), False, 1.0, 1.0, torch.float32)


@compiled
def test_two_sided_has_no_constant(emulation):
    arguments = torch.ones(5, 6), torch.ones(2, 6), torch.ones(5, 2), None, True, 1.0, 1.0
    with pytest.raises(RuntimeError, match="two_sided has no constant; got 1"):
        torch.ops.hut_emulated.weight(*arguments, torch.float32)


@compiled
def test_a_failure_within_torch_is_told_in_its_words(emulation):
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    tells = hasattr(library, "torch_exception_get_what_without_backtrace")  # torch 2.10 does not
    words = ": .*shapes cannot be multiplied" if tells else "$"
    with pytest.raises(RuntimeError, match=rf"aten::linear failed{words}"):
        torch.ops.hut_emulated.forward(
            torch.ones(3, 7), torch.ones(5, 6), torch.ones(2, 6), torch.ones(5, 2),
            None, None, None, False, 1.0, 1.0, False,
        )  # fmt: skip


# The planner


def test_splits_fill_a_device_and_bound_the_partial_sums():
    for device in devices.DEVICES:
        for rows, columns, r in ((768, 768, 8), (4096, 4096, 16), (14336, 4096, 128), (64, 30, 1)):
            chunk, row_splits, column_splits = planner.reduction_splits(rows, columns, r, 2, device)
            assert chunk % 128 == 0
            assert 4 * chunk * columns <= max(device.l2 // 2, 4 * 128 * columns)
            assert 1 <= row_splits <= -(-columns // 64)
            assert 1 <= column_splits <= -(-min(chunk, rows) // 64)
            partials = 4 * r * ((row_splits - 1) * rows + (column_splits - 1) * columns)
            assert partials <= rows * columns * 2 // 4
    assert planner.reduction_splits(1024, 1024, 4, 2, devices.find_device("H100"))[1] > 4


@pytest.fixture
def went(emulation, monkeypatch):
    """The calls of `auto`, as `(backend, function)`; PyTorch stands for Triton's kernels."""
    pytest.importorskip("triton", reason="the other half of the choice is Triton")
    from hut_kernels import auto, torch_backend

    calls = []

    def noted(name, module):
        def note(function):
            def call(*arguments):
                calls.append((name, function))
                return getattr(module, function)(*arguments)

            return call

        return {function: note(function) for function in ("linear_forward", "linear_backward")}

    on_triton = {
        function: lambda plan, *arguments, call=call: call(*arguments)
        for function, call in noted("triton", torch_backend).items()
    }
    on_cuda = types.SimpleNamespace(**noted("cuda", emulation))
    monkeypatch.setattr(auto, "triton_backend", types.SimpleNamespace(**on_triton))
    monkeypatch.setattr(auto, "_module", {"cuda": on_cuda, "torch": torch_backend}.get)
    return calls


@compiled
def test_auto_does_not_plan_launch_bound_layers(went, monkeypatch):
    monkeypatch.setattr(planner, "plan", None)
    case = make((2, 3), 24, 40, 3, vectors="bias gamma beta")
    check(case, operators(case, "auto"))
    assert went == [("cuda", "linear_backward"), ("cuda", "linear_forward")]


@compiled
@pytest.mark.parametrize(
    ("size", "options", "winners"),
    [
        ((6, 32, 48, 3), {}, ["triton", "triton"]),
        ((6, 24, 40, 3), {}, ["cuda", "cuda"]),  # unaligned
        ((6, 32, 48, 3), {"precision": "split"}, ["cuda", "triton", "cuda"]),
        ((321, 32, 48, 3), {}, ["cuda", "triton", "cuda"]),  # beyond two of three break-evens
        ((6, 144, 160, 129), {}, ["cuda", "cuda"]),  # Triton has no kernel for the rank
    ],
)
def test_auto_goes_where_the_plan_says(went, size, options, winners, monkeypatch):
    monkeypatch.setattr(planner, "LAUNCH_BOUND", 0)
    monkeypatch.setattr(planner, "_plan", planner._plan.__wrapped__)  # it has seen the other
    case = make(*size, vectors="bias gamma beta", **options)
    check(case, operators(case, "auto"))
    assert [name for name, _ in went] == winners


@compiled
def test_the_public_functions_reach_it(emulation, monkeypatch):
    case = make(5, 72, 80, 3)
    arguments = case.x, case.weight, case.hut_A, case.hut_B
    assert error(hut_linear(*arguments, backend="cuda"), case.expected()["y"]) < 1e-6
    monkeypatch.setattr(dispatch, "choose", lambda name, tensors: "cuda")
    assert error(hut_weight(*arguments[1:]), case.merged_weight()) < 1e-6


# On a GPU


def test_the_gpu_commands_cases_are_the_extensions():
    from .gpu import lists

    found = lists.extension_cases(quick=False)
    assert len(found) > 50
    assert {case.backend for case in found} == {"cuda"}
    assert len({str(case) for case in found}) == len(found)
    assert {case.layout for case in found} == {
        "", "transposed", "expanded", "sliced", "shifted",
    }  # fmt: skip
    assert {case.dtype for case in found} == {"bfloat16", "float16", "float32"}


@compiled
@pytest.mark.parametrize(
    "change",
    [{}, {"transform": "two_sided"}, {"layout": "sliced"}, {"layout": "shifted"}],
    ids=str,
)
def test_the_gpu_commands_check_passes_and_fails(emulation, change, monkeypatch):
    from .gpu import cases as gpu_cases

    case = gpu_cases.Check(
        17, 72, 80, 4, "float32", strategies=gpu_cases.STAGED, backend="cuda",
        vectors=("bias", "gamma", "beta"), **change,
    )  # fmt: skip
    assert gpu_cases.check(case, torch.device("cpu"))["status"] == "passed"
    monkeypatch.setattr(emulation, "_multiplier", lambda layer: (False, 0.9, 1.0))
    assert gpu_cases.check(case, torch.device("cpu"))["status"] == "failed"


def test_targets_of_host_times():
    from benchmarks.gpu import extension, findings
    from benchmarks.report import targets

    def judged(**rows):
        like = {"suite": "launching", **extension.LAYER.as_dict(), "N": 512}
        rows = [{**like, "provider": name, **row} for name, row in rows.items()]
        on = {"device": "cuda", "device_name": "H200", "date": "today", "cpu_count": 1}
        found = list(findings.as_rows(rows, on, devices.DEVICES[0]))
        among = [one for one in targets.KERNELS if one.suite == "launching"]
        return [line[-1] for line in targets.table(found, among).rows]

    def taken(seconds):
        return {"seconds": {"p20": seconds, "median": seconds, "p80": seconds, "samples": 9}}

    assert judged(cuda=taken(1.0), triton=taken(2.5), peft_lora=taken(0.9)) == ["MISSED", "met"]
    missing = judged(cuda=taken(1.0), triton=taken(1.9), peft_lora={"error": "no PEFT"})
    assert missing == ["not measured", "MISSED"]


def test_host_times_by_provider(monkeypatch):
    from benchmarks.gpu import extension, suites

    monkeypatch.setattr(extension, "LAYER", suites.Subject(16, 16))
    monkeypatch.setattr(extension, "TOKENS", 4)
    bench = suites.Bench(torch.device("cpu"), devices.DEVICES[0], None, None, backend="torch")
    providers = "torch", *extension.PROVIDERS[2:]
    rows = list(extension.launching(bench, providers))
    assert [row["provider"] for row in rows] == [*providers]
    assert all(row["seconds"]["median"] > 0 for row in rows if "error" not in row)
    assert "peft_lora" in extension.launching_text(rows)
