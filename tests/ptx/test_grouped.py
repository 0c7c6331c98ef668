"""Stacks of experts, their kernels' PTX executed: one launch for the experts of a group."""

import math

import pytest
import torch

from hut_kernels import planner

from .. import references
from ..test_grouped import ALL, Stack, arguments
from . import cases
from .launch import executing

pytestmark = pytest.mark.ptx
COUNTS = (0, 1, 17, 0, 5)
FORMS = {
    "residual": {"scaling": 0.75},
    "vectors": {"vectors": ALL},
    "direct": {"offset": 0.0},
    "two_sided": {"transform": "two_sided", "vectors": "gamma"},
}
NAMES = ("x", "hut_A", "hut_B", "gamma", "beta")


def normal(count, seed, dtype, r=13, **form):
    """One expert, different from any other, its factors normally distributed too."""
    case = references.make_normal(count, 240, 112, r, dtype=cases.TYPES[dtype], seed=seed, **form)
    draw = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(f.shape, generator=draw).to(f.dtype) for f in (case.hut_A, case.hut_B))
    return case.replace(hut_A=A, hut_B=B / r**0.5)


def stack(dtype, layout, **form):
    """The experts in rows and stacks with NaN between them, which nobody may read."""
    experts = Stack([normal(count, seed, dtype, **form) for seed, count in enumerate(COUNTS)])
    for name in ("weight", "hut_A", "hut_B"):
        turned = layout == "transposed" and name == "weight"
        tensor = getattr(experts, name)
        tensor = tensor.mT if turned else tensor
        number, rows, columns = tensor.shape
        buffer = tensor.new_full((number, rows + 1, columns // 16 * 16 + 32), math.nan)
        padded = buffer[:, :rows, :columns].copy_(tensor)
        setattr(experts, name, padded.mT if turned else padded)
    return experts


def run(experts, arch, dtype, monkeypatch, **how):
    """`y` and the gradients that the operators give, and what was launched."""
    monkeypatch.setattr(planner, "group_size", lambda experts, arch: 2)
    with (
        references.poisoned(),
        cases.planning_for(arch, sms=4),
        cases.precision_of(dtype),
        executing(arch, **how) as log,
    ):
        given = arguments(experts, "grouped_forward")[:-1]
        y = torch.ops.hut.grouped_forward(*given, "triton")
        given = arguments(experts, "grouped_backward")[:-1]
        grads = torch.ops.hut.grouped_backward(*given, "triton")
    results = dict(zip(NAMES, grads, strict=True))
    results["WG"] = results.pop("gamma")
    return {"y": y, **results}, log


def parameter(arch, dtype, form, layout):
    quick = arch in (80, 90) and dtype == "bf16" and form == "residual"
    marks = () if quick else pytest.mark.slow
    name = f"sm_{arch}-{dtype}-{form}-{layout}"
    return pytest.param(arch, dtype, FORMS[form], layout, id=name, marks=marks)


ALL_CALLS = [
    parameter(arch, dtype, form, layout)
    for arch in cases.ARCHITECTURES
    for dtype, form, layout in (
        *(("bf16", form, "padded") for form in FORMS),
        ("bf16", "residual", "transposed"),
        ("fp16", "residual", "padded"),
        ("tf32", "residual", "padded"),
        ("fp32", "vectors", "transposed"),
    )
]


@pytest.mark.parametrize(("arch", "dtype", "form", "layout"), ALL_CALLS)
def test_every_expert_is_within_the_limits(arch, dtype, form, layout, monkeypatch):
    experts = stack(dtype, layout, **form)
    results, log = run(experts, arch, dtype, monkeypatch)
    rows = 0
    for expert, case in enumerate(experts.cases):
        here = slice(rows, rows + len(case.x))
        rows = here.stop
        found = {name: t[here if name in ("x", "y") else expert] for name, t in results.items()}
        call = cases.Call("staged", dtype, *case.x.shape, 112)
        for name, (error, limit) in cases.errors(call, case, found).items():
            assert error <= limit, f"{name}: error {error:.3e} is above {limit:.1e}"
    assert not any(results[name][rows:].any() for name in ("x", "y"))
    groups = 2 if dtype not in ("fp16",) else 3  # of G, float32, only one expert's is alive
    kernels = [launch.kernel for launch in log.launches]
    assert sum("weight" in kernel for kernel in kernels) == 2 + groups
    assert sum("reduce" in kernel for kernel in kernels) == groups
