"""`explain`: a plan for any known device, and for this machine."""

import importlib

import pytest
import torch

from hut_kernels import devices, dispatch, explain

from .test_dispatch import on_a_cpu

explaining = importlib.import_module("hut_kernels.explain")  # which the function's name hides
CALL = {
    "N": 8, "in_features": 64, "out_features": 64, "r": 4,
    "dtype": torch.float32, "device_name": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", *(device.name for device in devices.DEVICES)])
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


def test_explain_tells_what_does_not_fit_this_device(monkeypatch):
    H200 = devices.find_device("H200")
    monkeypatch.setattr(devices, "_misfits", {})
    monkeypatch.setattr(explaining, "own_device", lambda: devices.as_seen(H200))
    monkeypatch.setattr(explaining, "auto_backend", lambda device: "triton")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    call = {**CALL, "device_name": None}
    before = explain(**call)
    assert before.forward == "fused"
    with pytest.warns(UserWarning, match="on NVIDIA H200 forward does not fit"):
        devices.note_misfit(H200, devices.Misfit("forward", before.problem.row, "threads of 1"))
    assert (explain(**call).forward, explain(**call).grad_input) == ("staged", "fused")
    assert "forward does not fit this device" in str(explain(**call))
    other = explain(**{**call, "r": 17})
    assert other.forward == "fused"
    assert "does not fit" not in str(other)


@on_a_cpu
def test_explain_of_this_machine():
    assert explain(8, 64, 64, 8, dtype=torch.float32).device == devices.CPU


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
def test_refusals_of_explain(changes, message):
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
    monkeypatch.setattr(dispatch, "gpu", lambda device: devices.find_device("H100"))
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
