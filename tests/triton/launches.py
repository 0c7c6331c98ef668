"""The launchers, each called for a case; and rows with tiles small enough to have many of them.

The interpreter's bfloat16 is broken (it computes with the raw 16-bit patterns, and truncates), so
these tests run in float32 and float16; bfloat16 is for tests/gpu.
"""

import pytest
import torch

from hut_kernels.definition import Needs
from hut_kernels.triton import forward as _forward
from hut_kernels.triton import grad_factors as _grad_factors
from hut_kernels.triton import grad_input as _grad_input
from hut_kernels.triton import grad_reduce as _grad_reduce
from hut_kernels.triton import weight as _weight
from hut_kernels.triton.launch import Row

ROW = Row(BN=16, BO=16, BK=16, warps=4, stages=1)
WIDE = Row(BN=16, BO=32, BK=64, warps=4, stages=1)
TALL = Row(BN=32, BO=64, BK=16, warps=4, stages=1, GROUP=2)
# Loads through descriptors, where a tensor's strides allow it: then TMA is all that is new.
THROUGH_TMA = Row(BN=16, BO=32, BK=32, warps=4, stages=1, TMA=True)

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0, "scaling": 1.25},
    "two_sided": {"transform": "two_sided"},
}
DTYPES = (torch.float32, torch.float16)
RANKS = (1, 3, 5, 16, 17, 33, 64, 128)

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_row = pytest.mark.parametrize("row", [ROW, WIDE, TALL], ids=["square", "wide", "tall"])
every_rank = pytest.mark.parametrize("r", RANKS)
every_transform = pytest.mark.parametrize("transform", ["low_rank", "two_sided"])

# Tokens, in_features, out_features: single elements, whole tiles, remainders, more tiles than one.
SHAPES = [(1, 1, 1), (1, 40, 3), (16, 32, 16), (17, 33, 31), (33, 5, 50), (3, 50, 5), (40, 16, 17)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def factors(case):
    return case.weight, case.hut_A, case.hut_B


def forward(case, row=ROW, **how):
    vectors = case.bias, case.gamma, case.beta
    y = _forward.forward(case.x, *factors(case), *vectors, case.spec, row=row, **how)
    return {"y": y}


def grad_input(case, row=ROW, **how):
    dx = _grad_input.grad_input(case.grad, *factors(case), case.gamma, case.spec, row=row, **how)
    return {"x": dx}


def weight(case, dtype, row=ROW, **how):
    return _weight.weight(*factors(case), case.gamma, case.spec, dtype, row=row, **how)


def grad_factors(case, row=ROW, spans=None, needs=(True, True, True)):
    """The fused kernel; by default each tile is a span of its own."""
    O, K = case.weight.shape
    spans = spans or (-(-O // row.BO), -(-K // row.BK))
    grads = _grad_factors.grad_factors(
        case.grad,
        case.x,
        *factors(case),
        case.gamma,
        case.spec,
        Needs(*needs),
        row=row,
        spans=spans,
    )
    return dict(zip(("hut_A", "hut_B", "WG"), grads, strict=True))


def grad_reduce(case, row=ROW, spans=None, chunk=None, needs=(True, True, True)):
    """The chunked kernel; by default G comes in chunks of two tiles, each tile a span."""
    O, K = case.weight.shape
    chunk = min(O, chunk or 2 * row.BO)
    spans = spans or (-(-chunk // row.BO), -(-K // row.BK))
    grads = _grad_reduce.grad_reduce(
        case.grad, case.x, *factors(case), case.gamma, case.spec, Needs(*needs),
        row=row, chunk=chunk, spans=spans,
    )  # fmt: skip
    return dict(zip(("hut_A", "hut_B", "WG"), grads, strict=True))
