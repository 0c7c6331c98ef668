"""Stacks of experts by the kernels: each expert staged and reduced by them, equal to float64."""

import pytest
import torch

from tests.test_grouped import FORMS, stack

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_equals_float64(form, dtype, transposed):
    experts = stack(37, 29, 3, (0, 1, 17), dtype=dtype, vectors="bias gamma beta", **form)
    experts.check(experts.run(backend="triton", transposed=transposed))


def test_the_kernels_run(monkeypatch):
    """And not PyTorch in their name."""
    from hut_kernels import auto

    ran = []
    for name in ("merged_weight", "linear_backward"):
        own = getattr(auto.Planned, name)
        monkeypatch.setattr(
            auto.Planned, name, lambda *args, f=own: ran.append(f.__name__) or f(*args)
        )
    experts = stack(24, 16, 2, (0, 4, 3))
    experts.check(experts.run(backend="triton"))
    assert ran.count("merged_weight") == 4  # two experts, in forward and for dx
    assert ran.count("linear_backward") == 2
