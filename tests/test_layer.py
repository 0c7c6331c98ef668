"""The functions that all backends share: the effective bias, and the end of the reductions."""

import pytest
import torch

from hut_kernels.layer import Needs, Spec, effective_bias, finish_factor_grads

from .references import error, make, make_normal
from .test_definition import every_form


@pytest.mark.parametrize("vectors", ["", "bias", "beta", "gamma", "bias gamma", "bias gamma beta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_effective_bias(vectors, dtype):
    case = make(1, 4, 9, 2, dtype=torch.float64, factor_dtype=torch.float64, vectors=vectors)
    out = effective_bias(case.bias, case.gamma, case.beta, dtype)
    if case.bias is None and case.beta is None:
        assert out is None
        return
    assert out.dtype == dtype
    assert error(out, case.replace(x=torch.zeros_like(case.x)).expected()["y"][0]) < 4e-3
    if dtype == torch.float64:
        assert error(out, case.replace(x=torch.zeros_like(case.x)).expected()["y"][0]) < 1e-15


def test_constant_is_the_part_of_T_that_no_factor_touches():
    assert Spec(offset=0.0).constant == 0.0
    assert Spec(offset=1.0).constant == 1.0
    assert Spec("two_sided").constant == 0.0


@every_form
def test_finish_factor_grads_from_exact_reductions(form):
    double = {"dtype": torch.float64, "factor_dtype": torch.float64}
    case = make_normal(6, 9, 7, 3, vectors="gamma", **double, **form)
    H0 = case.grad.t() @ case.x * case.weight
    plain = case.replace(gamma=None, scaling=1.0, x=case.x, grad=case.grad)
    P = torch.from_numpy(plain.expected()["hut_B"])
    Q = torch.from_numpy(case.expected()["hut_A"]) / case.scaling
    arguments = Q, P, H0.sum(1), case.layer
    d_A, d_B, WG = finish_factor_grads(*arguments, Needs(True, True, True))
    expected = case.expected()
    assert error(d_A, expected["hut_A"]) < 1e-13
    assert error(d_B, expected["hut_B"]) < 1e-13
    assert error(WG, expected["WG"]) < 1e-13
    nothing = finish_factor_grads(*arguments, Needs(False, False, False))
    assert nothing == (None, None, None)
