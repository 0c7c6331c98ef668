"""Every kernel of the product, compiled for every architecture, its PTX executed: `make ptx`."""

import re
import subprocess
import sys

import pytest
import torch
import triton

from hut_kernels import versions

from .. import references
from . import Fault, cases

pytestmark = pytest.mark.ptx


def parameter(arch, call):
    marks = () if call.quick and arch in (80, 90, 100) else pytest.mark.slow
    return pytest.param(arch, call, id=f"sm_{arch}-{call.name}", marks=marks)


ALL = [parameter(arch, call) for arch in cases.ARCHITECTURES for call in cases.calls()]


@pytest.mark.parametrize(("arch", "call"), ALL)
def test_a_kernel_runs_without_fault_and_within_the_limits(arch, call):
    case = call.make()
    given = {name: value.clone() for name, value in vars(case).items() if torch.is_tensor(value)}
    try:
        results, log = cases.run(call, arch, case)
    except Fault as fault:
        if denied(arch, kernel_of(fault), call):  # `planner.force` runs it all the same
            pytest.xfail(f"the planner avoids it here: {fault}")
        raise
    assert log.launches
    for name, (error, limit) in cases.errors(call, case, results).items():
        assert error <= limit, f"{name}: error {error:.3e} is above {limit:.1e}"
    for name, before in given.items():
        assert torch.equal(getattr(case, name).nan_to_num(), before.nan_to_num()), name


def kernel_of(fault):
    return re.search(r"hut_(\w+)_kernel", str(fault))[1]


def denied(arch, kernel, call):
    """True where the planner avoids the kernel with this Triton."""
    dtype = str(cases.TYPES[call.dtype]).removeprefix("torch.")
    known = versions.miscompiled(triton.__version__, f"sm_{arch}")
    return any(kernel in one.kernels and one.concerns(dtype) for one in known)


@pytest.mark.parametrize(("N", "K", "O"), [(0, 48, 32), (3, 0, 32), (3, 48, 0)])
@pytest.mark.parametrize("what", ["fused", "staged"])
def test_an_empty_layer_launches_nothing(what, N, K, O):
    call = cases.Call(what, "bf16", N, K, O, 3, layout="contiguous")
    case = call.make()
    results, log = cases.run(call, 80, case)
    assert not log.launches
    assert all(error <= limit for error, limit in cases.errors(call, case, results).values())


@pytest.mark.parametrize("arch", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_update_arrives_where_the_base_cancels(arch, transform, dtype):
    call = cases.Call("forward", dtype, 45, 400, 112, 4, options={"transform": transform})
    case = cases.pad(references.cancelling(call.make(), 5e-2))
    results, _ = cases.run(call, arch, case)
    found = references.error(results["y"], references.update_of(case))
    assert found <= references.update_limit(case.x.dtype, transform, "merged")


def test_a_compiled_kernel_is_not_compiled_again(tmp_path, monkeypatch):
    """The cache is by source and options, and outlives the process."""
    monkeypatch.setenv("HUT_PTX_CACHE", str(tmp_path))
    script = (
        "from tests.ptx import cases; call = cases.Call('weight', 'bf16', 1, 48, 32); "
        "print(*(cases.run(call, arch)[1].compiled for arch in (80, 80, 89)))"
    )
    for expected in ("1 0 1", "0 0 0"):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected.split()
