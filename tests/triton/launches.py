"""The launchers, each called for a case; and configs with tiles small enough to have many of them.

The interpreter's bfloat16 is broken (it computes with the raw 16-bit patterns, and truncates), so
these tests run in float32 and float16; bfloat16 is for tests/gpu.
"""

import pytest
import torch

from hut_kernels.layer import Needs
from hut_kernels.triton.forward import launch_forward
from hut_kernels.triton.grad_factors import launch_grad_factors
from hut_kernels.triton.grad_input import join_gamma, launch_grad_input
from hut_kernels.triton.grad_reduce import launch_grad_reduce
from hut_kernels.triton.launch import LaunchConfig
from hut_kernels.triton.weight import launch_weight

SQUARE = LaunchConfig(BN=16, BO=16, BK=16, warps=4, stages=1)
WIDE = LaunchConfig(BN=16, BO=32, BK=64, warps=4, stages=1)
TALL = LaunchConfig(BN=32, BO=64, BK=16, warps=4, stages=1, GROUP=2)
# Loads through descriptors, where a tensor's strides allow it: then TMA is all that is new.
THROUGH_TMA = LaunchConfig(BN=16, BO=32, BK=32, warps=4, stages=1, TMA=True)

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0, "scaling": 1.25},
    "two_sided": {"transform": "two_sided"},
}
DTYPES = (torch.float32, torch.float16)
RANKS = (1, 3, 5, 16, 17, 33, 64, 128)

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_config = pytest.mark.parametrize(
    "config", [SQUARE, WIDE, TALL], ids=["square", "wide", "tall"]
)
every_rank = pytest.mark.parametrize("r", RANKS)
every_transform = pytest.mark.parametrize("transform", ["low_rank", "two_sided"])

# Tokens, in_features, out_features: single elements, whole tiles, remainders, more tiles than one.
SHAPES = [(1, 1, 1), (1, 40, 3), (16, 32, 16), (17, 33, 31), (33, 5, 50), (3, 50, 5), (40, 16, 17)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def forward(case, config=SQUARE, **how):
    return {"y": launch_forward(case.x, case.layer, config, **how)}


def grad_input(case, config=SQUARE, **how):
    return {"x": launch_grad_input(*join_gamma(case.grad, case.layer), config, **how)}


def transposed_forward(case, config=SQUARE, **how):
    """Y of a W0 stored [in, out], by the kernel of dx."""
    return {"y": launch_grad_input(case.x, case.layer.transposed, config, **how)}


def transposed_grad_input(case, config=SQUARE, **how):
    """Dx of a W0 stored [in, out], by the kernel of y."""
    grad, bare = join_gamma(case.grad, case.layer)
    return {"x": launch_forward(grad, bare.transposed, config, **how)}


def weight(case, dtype, config=SQUARE, **how):
    return launch_weight(case.layer, dtype, config, **how)


def grad_factors(case, config=SQUARE, splits=None, needs=(True, True, True)):
    """The fused kernel; by default each tile is a split of its own."""
    O, K = case.weight.shape
    splits = splits or (-(-O // config.BO), -(-K // config.BK))
    grads = launch_grad_factors(case.grad, case.x, case.layer, Needs(*needs), config, splits)
    return dict(zip(("hut_A", "hut_B", "WG"), grads, strict=True))


def grad_reduce(case, config=SQUARE, splits=None, chunk=None, needs=(True, True, True)):
    """The chunked kernel; by default G comes in chunks of two tiles, each tile a split."""
    O, K = case.weight.shape
    chunk = min(O, chunk or 2 * config.BO)
    splits = splits or (-(-chunk // config.BO), -(-K // config.BK))
    grads = launch_grad_reduce(case.grad, case.x, case.layer, Needs(*needs), config, splits, chunk)
    return dict(zip(("hut_A", "hut_B", "WG"), grads, strict=True))
