"""Which backend runs a call, the reasons of the others, and explain."""

import sys

import pytest
import torch

from hut_kernels import HUTBackendError, backends, dispatch, explain, hut_linear, planner

from .references import Recorder, make

INTERPRETING = dispatch.interpreting()
on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available() or INTERPRETING,
    reason="says what a machine without a CUDA device says",
)


@pytest.fixture
def tensors():
    case = make(3, 6, 5, 2)
    return case.x, case.weight, case.hut_A, case.hut_B


def double(tensors):
    return tuple(tensor.double() for tensor in tensors)


# Choosing


def test_auto_is_torch_on_a_cpu_whatever_the_interpreter_could_do(tensors, monkeypatch):
    assert dispatch.choose("auto", tensors) == "torch"
    assert dispatch.choose("auto", double(tensors)) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("auto", tensors) == "torch"


def test_torch_takes_everything(tensors):
    assert dispatch.choose("torch", tensors) == "torch"
    assert dispatch.choose("torch", double(tensors)) == "torch"


@pytest.mark.parametrize("name", ["", "TORCH", "metal", None])
def test_an_unknown_backend_lists_the_known(tensors, name):
    with pytest.raises(ValueError, match=rf"auto, torch, triton, cuda; got {name!r}"):
        dispatch.choose(name, tensors)


@on_a_cpu
def test_triton_on_cpu_tensors_says_what_is_missing(tensors):
    with pytest.raises(HUTBackendError, match=r'"triton" cannot run here.*cpu.*TRITON_INTERPRET=1'):
        dispatch.choose("triton", tensors)


def test_triton_that_is_not_installed_is_named(tensors, monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: "triton is not installed")
    with pytest.raises(HUTBackendError, match=r'"triton" cannot run here: triton is not installed'):
        dispatch.choose("triton", tensors)
    assert backends()["triton"]["available"] is False
    assert backends()["triton"]["reason"] == "triton is not installed"


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        (None, "triton is not installed"),
        ("3.5.1", "triton 3.5.1 is too old: 3.6 or newer is needed"),
        ("2.9", "too old"),
        ("3.6.0", None),
        ("3.10.0", None),
        ("4.0.0+git1", None),
    ],
)
def test_versions_of_triton(installed, missing, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: installed)
    monkeypatch.setattr(dispatch, "_version", lambda package: installed)
    found = dispatch._triton_missing.__wrapped__()
    assert (found is None) if missing is None else (missing in found)


@pytest.mark.parametrize("name", ["cuda"])
def test_the_extension_that_is_not_built_is_named(tensors, name):
    with pytest.raises(HUTBackendError, match=r'backend="cuda" cannot run here.*extension'):
        dispatch.choose(name, tensors)


def test_float64_is_a_type_error_on_an_explicit_kernel_backend(tensors, monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_unusable", lambda device: None)
    monkeypatch.setattr(dispatch, "_extension_unusable", lambda device: None)
    for name in ("triton", "cuda"):
        assert dispatch.choose(name, tensors) == name
        for index in range(4):
            mixed = [t.double() if i == index else t for i, t in enumerate(tensors)]
            with pytest.raises(TypeError, match=rf'"{name}" has no float64.*"torch"'):
                dispatch.choose(name, mixed)


@on_a_cpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_hut_linear_refuses_a_backend_before_anything_runs(tensors, name):
    with Recorder() as recorder, pytest.raises(HUTBackendError, match=name) as caught:
        hut_linear(*tensors, backend=name)
    assert isinstance(caught.value, RuntimeError)
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("capability", "hip", "missing"),
    [((7, 5), None, "7.5 is below 8.0"), ((8, 0), None, None), ((9, 0), "6.4", "ROCm")],
)
def test_devices_that_are_too_old(capability, hip, missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = dispatch._device_missing.__wrapped__(0)
    assert (found is None) if missing is None else (missing in found)


# backends()


def test_backends_says_of_each_whether_and_why():
    found = backends()
    assert tuple(found) == ("torch", "triton", "cuda")
    for state in found.values():
        assert set(state) == {"available", "reason", "version"}
        assert isinstance(state["available"], bool)
        assert state["reason"]
    assert found["torch"]["available"]
    assert found["torch"]["version"] == torch.__version__
    assert "compiled extension" in found["cuda"]["reason"] or found["cuda"]["available"]


@on_a_cpu
def test_backends_names_the_interpreter_as_the_way_out(monkeypatch):
    assert not backends()["triton"]["available"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if dispatch._triton_missing() is None:
        assert backends()["triton"]["available"]
        assert "interpreter" in backends()["triton"]["reason"]


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_interpreters_switch(value, on, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert dispatch.interpreting() is on


def test_asking_does_not_import_triton():
    """Import hygiene: what is available is found without importing it."""
    import subprocess

    code = (
        "import sys, torch, hut_kernels; hut_kernels.backends(); "
        "hut_kernels.explain(64, 256, 256, 8, dtype=torch.bfloat16, device_name='A100'); "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# explain

CALL = {
    "N": 8, "in_features": 64, "out_features": 64, "r": 4,
    "dtype": torch.float32, "device_name": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", *(device.name for device in planner.DEVICES)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_explain_of_every_known_device(name, dtype):
    plan = explain(64, 1024, 512, 8, dtype=dtype, device_name=name)
    assert plan.device.name == name
    assert plan.backend == ("torch" if name == "cpu" else "triton")
    assert (plan.problem.N, plan.problem.K, plan.problem.O) == (64, 1024, 512)
    assert plan.problem.weight_dtype == plan.problem.dtype == str(dtype).removeprefix("torch.")
    assert name in str(plan)
    assert "1024 -> 512" in str(plan)


def test_explain_takes_the_options_of_a_layer():
    plan = explain(
        64, 1024, 512, 8,
        dtype=torch.bfloat16, device_name="h100", weight_dtype=torch.float32,
        transform="two_sided", precision="split",
    )  # fmt: skip
    assert plan.problem.weight_dtype == "float32"
    assert (plan.problem.transform, plan.problem.precision) == ("two_sided", "split")
    assert plan.forward == "staged"


def test_explain_knows_unaligned_shapes_and_float64():
    aligned = explain(8, 64, 64, 8, dtype=torch.bfloat16, device_name="A100")
    assert aligned.problem.aligned
    for K, O in ((63, 64), (64, 63)):
        assert not explain(8, K, O, 8, dtype=torch.bfloat16, device_name="A100").problem.aligned
    assert explain(8, 64, 64, 8, dtype=torch.float64, device_name="A100").backend == "torch"


@on_a_cpu
def test_explain_of_this_machine():
    assert explain(8, 64, 64, 8, dtype=torch.float32).device == planner.CPU


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N": -1}, "N must not be negative; got -1"),
        ({"in_features": -2}, "in_features must not be negative; got -2"),
        ({"out_features": -3}, "out_features must not be negative; got -3"),
        ({"r": 0}, "r must be at least 1; got 0"),
        ({"transform": "lora"}, "low_rank, two_sided.*'lora'"),
        ({"precision": "half"}, "merged, split.*'half'"),
        ({"device_name": "abacus"}, "'abacus'; known: cpu, NVIDIA A100"),
        ({"device_name": ""}, "''; known: cpu, NVIDIA A100"),
        (
            {"transform": "two_sided", "r": 65},
            r"r <= min\(in_features, out_features\) = 64; got r = 65",
        ),
    ],
)
def test_what_explain_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        explain(**{**CALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.int8}, "dtype must be one of float16, .*; got torch.int8"),
        ({"dtype": torch.complex64}, "got torch.complex64"),
        ({"dtype": "float16"}, "got float16"),
        ({"weight_dtype": torch.int8}, "weight_dtype must be one of float16, .*; got torch.int8"),
        ({"r": 4.0}, "r must be an integer; got float"),
        ({"N": "8"}, "N must be an integer; got str"),
        ({"in_features": None}, "in_features must be an integer; got NoneType"),
    ],
)
def test_types_that_explain_refuses(changes, message):
    with pytest.raises(TypeError, match=message):
        explain(**{**CALL, **changes})


@pytest.mark.parametrize(
    ("triton", "extension", "backend"),
    [
        (None, None, "cuda"),
        (None, "old", "triton"),
        ("none", None, "cuda"),
        ("none", "old", "torch"),
    ],
)
def test_explain_of_this_machine_knows_of_its_extension(triton, extension, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "gpu", lambda device: planner.find_device("H100"))
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: triton)
    monkeypatch.setattr(dispatch, "_device_missing", lambda index: None)
    monkeypatch.setattr(dispatch, "_extension_unusable", lambda device: extension)
    call = {**CALL, "device_name": None, "dtype": torch.bfloat16}
    assert explain(**call).backend == backend
    assert explain(**{**call, "dtype": torch.float64}).backend == "torch"
    assert explain(**{**call, "device_name": "H100"}).backend == "triton"
    if backend == "cuda" and triton is None:
        large = explain(**{**call, "N": 410, "in_features": 4096, "out_features": 4096})
        assert (large.backend, large.compiled) == ("triton", ("forward", "grad_input"))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_float64_is_named_before_what_is_missing(backend):
    x = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="has no float64"):
        dispatch.choose(backend, (x,))


def test_the_interpreter_takes_no_bfloat16(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    tensors = [torch.zeros(2, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert dispatch.choose("triton", tensors[:1]) == "triton"
    with pytest.raises(HUTBackendError, match="interpreter computes wrongly in bfloat16"):
        dispatch.choose("triton", tensors)


@pytest.mark.parametrize(
    ("given", "known"),
    [("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("NVIDIA A100-SXM4-80GB", "NVIDIA A100")],
)
def test_a_device_is_known_by_its_drivers_name(given, known):
    assert planner.find_device(given).name == known
