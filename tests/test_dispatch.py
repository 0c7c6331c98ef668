"""The backend that runs a call, and the reasons of the others."""

import sys

import pytest
import torch

from hut_kernels import HUTBackendError, backends, dispatch, hut_linear

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
def test_triton_on_cpu_tensors_names_the_missing_part(tensors):
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
    monkeypatch.setattr(dispatch, "installed", lambda package: installed)
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
