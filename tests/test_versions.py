"""A PyTorch that is too old, and a Triton that miscompiles: refused, or passed by."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hut_kernels import backends, devices, dispatch, explain, planner, versions
from hut_kernels.planner import CHUNKED, FUSED, STAGED, force
from hut_kernels.versions import Miscompile, miscompiled, release

A100 = devices.find_device("A100")
PARTS = ("forward", "grad_input", "grad_factors")


def planted(*kernels, since="3.6.0", fixed="3.7.0", archs=("sm_80",), dtypes=()):
    return Miscompile(since, fixed, archs, kernels, "example.org/1", "wrong as can be", dtypes)


@pytest.fixture
def plant(monkeypatch):
    """Plants an entry, and a version of Triton that it is about."""

    def enter(*kernels, triton="3.6.0", **about):
        entry = planted(*kernels, **about)
        monkeypatch.setattr(versions, "MISCOMPILES", (entry,))
        monkeypatch.setattr("importlib.metadata.version", lambda package: triton)
        return entry

    return enter


def problem(**changes):
    sizes = {
        "N": 16,
        "K": 1024,
        "O": 1024,
        "r": 16,
        "dtype": "bfloat16",
        "weight_dtype": "bfloat16",
    }
    return planner.Problem(**{**sizes, **changes})


def strategies(plan):
    return tuple(getattr(plan, part) for part in PARTS)


# PyTorch


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.10.0", (2, 10, 0)),
        ("2.13.0+cpu", (2, 13, 0)),
        ("3.7", (3, 7, 0)),
        ("3.9.1rc2+git0a1b2", (3, 9, 1)),
        ("2.11.0a0+git12", (2, 11, 0)),
        ("?", (0, 0, 0)),
    ],
)
def test_a_version_is_three_numbers(text, numbers):
    assert release(text) == numbers


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1", "2.9.1+cu128"])
def test_a_pytorch_that_is_too_old_is_refused_at_import(version):
    code = f"import torch; torch.__version__ = {version!r}; import hut_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: hut_kernels needs PyTorch 2.10.0 or newer")
    assert version in error


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git7f", "2.100.0", "3.0.0"])
def test_a_new_enough_pytorch_is_accepted(version):
    code = f"import torch; torch.__version__ = {version!r}; import hut_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


# Triton


@pytest.mark.parametrize(
    ("triton", "arch", "found"),
    [
        ("3.6.0", "sm_80", True),
        ("3.6.1+git0", "sm_80", True),
        ("3.5.9", "sm_80", False),
        ("3.7.0", "sm_80", False),
        ("3.10.0", "sm_80", False),
        ("3.6.0", "sm_90", False),
        (None, "sm_80", False),
        ("3.7.0rc1", "sm_80", True),
        ("3.7.0.dev20260801", "sm_80", True),
        ("3.7.0a1", "sm_80", True),
        ("3.7.0+git0a1b2c3d", "sm_80", True),
        ("3.7.0.post1", "sm_80", False),
        ("3.7.0+cu130", "sm_80", False),
        ("3.7.1rc1", "sm_80", False),
    ],
)
def test_an_entry_is_about_its_versions_and_architectures(plant, triton, arch, found):
    entry = plant("forward")
    assert miscompiled(triton, arch) == ((entry,) if found else ())


def test_both_names_of_an_architecture_are_listed():
    """CUDA 13 calls sm_110 what was sm_101."""
    assert all(("sm_101" in e.archs) == ("sm_110" in e.archs) for e in versions.MISCOMPILES)


@pytest.mark.parametrize("entry", versions.MISCOMPILES, ids=lambda entry: entry.why)
def test_entries_are_well_formed(entry):
    assert entry.fixed is None or release(entry.since) < release(entry.fixed)
    assert set(entry.dtypes) <= {"float16", "bfloat16", "float32"}
    assert entry.reports
    assert entry.why
    assert set(entry.kernels) <= {*PARTS, *versions.FALLBACKS}
    assert all(arch.startswith("sm_") for arch in entry.archs)


@pytest.mark.parametrize("part", PARTS)
def test_a_denied_kernel_is_never_planned(part):
    device = dataclasses.replace(A100, miscompiles=(planted(part),))
    whole, denied = planner.plan(problem(), A100), planner.plan(problem(), device)
    assert strategies(whole) == (FUSED, FUSED, FUSED)
    expected = dict.fromkeys(PARTS, FUSED) | {part: CHUNKED if part == PARTS[2] else STAGED}
    assert strategies(denied) == tuple(expected.values())
    assert "wrong as can be (example.org/1)" in str(denied)
    assert "wrong" not in str(whole)


def test_an_entry_may_name_only_some_types():
    entry = planted("forward", dtypes=("float16", "float32"))
    device = dataclasses.replace(A100, miscompiles=(entry,))
    for dtype, forward in (("float16", STAGED), ("float32", STAGED), ("bfloat16", FUSED)):
        plan = planner.plan(problem(dtype=dtype, weight_dtype="bfloat16"), device)
        assert plan.forward == forward
        assert ("is not trusted with forward in float16 and float32" in str(plan)) == (
            forward == STAGED
        )


@pytest.mark.parametrize("triton", ["3.6.0", "3.10.0"])
def test_an_entry_may_hold_for_every_triton_so_far(plant, triton):
    entry = plant("grad_factors", fixed=None)
    assert miscompiled(triton, "sm_80") == (entry,)
    assert str(entry).startswith("No Triton so far is trusted with grad_factors here")


B200 = {
    ("3.6.0", "bfloat16"): (STAGED, STAGED, CHUNKED),
    ("3.7.1", "bfloat16"): (STAGED, STAGED, CHUNKED),
    ("3.8.0", "bfloat16"): (STAGED, STAGED, FUSED),
    ("3.9.0", "bfloat16"): (FUSED, FUSED, FUSED),
    ("3.8.0", "float16"): (STAGED, STAGED, FUSED),
    ("3.9.0", "float16"): (FUSED, FUSED, FUSED),
    ("3.8.0", "float32"): (STAGED, STAGED, CHUNKED),
    ("3.9.0", "float32"): (FUSED, FUSED, CHUNKED),
}


@pytest.mark.parametrize(("triton", "dtype"), B200, ids=str)
@pytest.mark.parametrize("arch", ["sm_100", "sm_103", "sm_110"])
def test_races_of_sm_100_are_avoided_type_by_type(triton, dtype, arch):
    """As reading the PTX of each version has shown, which `make gate` repeats."""
    device = dataclasses.replace(A100, arch=arch, miscompiles=miscompiled(triton, arch))
    plan = planner.plan(problem(dtype=dtype, weight_dtype=dtype), device)
    assert strategies(plan) == B200[triton, dtype]


def test_a_denied_kernel_can_be_forced_to_see_whether_it_is_still_wrong():
    device = dataclasses.replace(A100, miscompiles=(planted(*PARTS),))
    with force(forward=FUSED):
        assert strategies(planner.plan(problem(), device)) == (FUSED, STAGED, CHUNKED)


def test_the_extension_takes_over_staged_parts():
    device = dataclasses.replace(A100, miscompiles=(planted("forward"),))
    large = problem()._replace(K=1 << 12, O=1 << 12)  # not bound by launching
    assert planner.plan(large, A100, "auto").compiled == ()
    assert planner.plan(large, device, "auto").compiled == ("forward",)


def test_explain_tells_of_the_triton_that_is_installed(plant):
    plant(*PARTS)
    plan = explain(16, 1024, 1024, 16, dtype=torch.bfloat16, device_name="A100")
    assert strategies(plan) == (STAGED, STAGED, CHUNKED)
    assert "Triton before 3.7.0 is not trusted with forward, grad_input, grad_factors" in str(plan)
    plant(*PARTS, triton="3.7.0")
    plan = explain(16, 1024, 1024, 16, dtype=torch.bfloat16, device_name="A100")
    assert strategies(plan) == (FUSED, FUSED, FUSED)
    assert "trusted" not in str(plan)


def test_a_device_knows_what_is_miscompiled_for_it(plant, monkeypatch):
    entry = plant("forward", archs=("sm_90",))
    found = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=1,
        shared_memory_per_block=1, shared_memory_per_block_optin=1,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert devices.gpu.__wrapped__(torch.device("cuda", 0)).miscompiles == (entry,)


@pytest.mark.parametrize("kernel", versions.FALLBACKS)
def test_where_even_the_fallback_is_wrong_triton_cannot_run(plant, monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    plant("forward")
    assert dispatch._device_missing.__wrapped__(0) is None
    entry = plant(kernel)
    other = dataclasses.replace(entry, kernels=("forward",), reports="example.org/2")
    monkeypatch.setattr(versions, "MISCOMPILES", (other, entry))
    assert "example.org/1" in dispatch._device_missing.__wrapped__(0)
    plan = explain(16, 1024, 1024, 16, dtype=torch.bfloat16, device_name="A100")
    assert plan.backend == "torch"
    assert "example.org/1" in str(plan)


def test_backends_lists_avoided_kernels(monkeypatch):
    device = dataclasses.replace(A100, miscompiles=(planted("forward"),))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: None)
    monkeypatch.setattr(dispatch, "_no_device", lambda: None)
    monkeypatch.setattr(dispatch, "own_device", lambda: device)
    found = backends()["triton"]
    assert found["available"]
    assert "CUDA device; Triton before 3.7.0 is not trusted with forward" in found["reason"]
