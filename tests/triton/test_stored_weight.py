"""Kernels over stored weights, interpreted: W0 to the bit, W and gradients against float64."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from hut_kernels import formats
from hut_kernels.auto import plan_call
from hut_kernels.formats.four_bit import FourBit
from hut_kernels.formats.int8 import Int8Rows
from hut_kernels.layer import Layer, Needs
from hut_kernels.triton import backend, stored_weight
from hut_kernels.triton.launch import LaunchConfig

from ..references import Recorder, check, error, make_normal, run
from .launches import DTYPES, every_dtype, every_form, forward, grad_reduce

CONFIGS = (
    LaunchConfig(BN=16, BO=16, BK=32, warps=4, stages=1),
    LaunchConfig(BN=16, BO=32, BK=128, warps=4, stages=1),
)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["narrow", "wide"])


def four_bit(O, K, name="nf4", block=64, nested=0, dtype=torch.float32):
    """Random codes and scales: what a weight was quantized from does not matter here."""
    blocks = -(-O * K // block)
    codes = torch.randint(256, (-(-O * K // 2),), dtype=torch.uint8)
    if nested:
        scales = (
            torch.randint(256, (blocks,), dtype=torch.uint8),
            torch.linspace(-1, 1, 256),
            torch.rand(-(-blocks // nested)),
            torch.tensor([1.5]),
        )
    else:
        scales = (torch.rand(blocks) + 0.5,)
    form = formats.Layout(name, (O, K, block, nested), dtype)
    return FourBit(codes, scales, form)


def int8(O, K, over_127=1, zero_points=False):
    codes = torch.randint(-128, 128, (O * K,), dtype=torch.int8)
    scales = (torch.rand(O) + 0.5,)
    if zero_points:
        scales += (torch.randint(-9, 9, (O,), dtype=torch.int8),)
    return Int8Rows(codes, scales, formats.Layout("int8", (O, K, over_127), torch.float32))


WEIGHTS = {
    "blocks within rows": lambda: four_bit(37, 192),
    "nested": lambda: four_bit(37, 192, nested=16),
    "small blocks": lambda: four_bit(37, 96, "fp4", 32),
    "large blocks": lambda: four_bit(18, 256, block=128, nested=4),
    "blocks across rows": lambda: four_bit(37, 80, nested=16),
    "blocks of several rows": lambda: four_bit(70, 24, "fp4", 128),
    "odd": lambda: four_bit(33, 37, nested=8),
    "int8 of bitsandbytes": lambda: int8(37, 70),
    "int8 with zero points": lambda: int8(37, 70, 0, True),
}
every_weight = pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)


@every_weight
@every_dtype
@every_config
def test_dequantized_to_the_bit(make, dtype, config):
    weight = make()
    assert torch.equal(stored_weight.launch_dequantize(weight, dtype, config), weight.dense(dtype))


@every_weight
@every_form
@pytest.mark.parametrize("vectors", ["", "gamma"])
@pytest.mark.parametrize("exact", [False, True])
def test_W_against_float64(make, form, vectors, exact):
    weight = make()
    for dtype in DTYPES:
        case = make_normal(1, *weight.shape[::-1], 3, dtype=dtype, vectors=vectors, **form)
        case = case.replace(weight=weight.dense(dtype))
        layer = case.layer._replace(weight=weight)
        out = stored_weight.launch_stored_weight(layer, dtype, CONFIGS[1], exact=exact)
        assert out.dtype == dtype
        assert error(out, case.merged_weight()) < {torch.float32: 1e-6}.get(dtype, 2**-11 + 1e-6)


@every_dtype
def test_T_of_one_leaves_W0_as_it_is(dtype):
    weight = four_bit(37, 192)
    factors = torch.randn(3, 192), torch.zeros(37, 3)
    W = stored_weight.launch_stored_weight(Layer(weight, *factors), dtype, CONFIGS[0])
    assert torch.equal(W, weight.dense(dtype))


# Rows of G at a time: a tile's, each a split; and no whole tiles, by one program.
@every_weight
@every_form
def test_factor_gradients_against_float64(make, form):
    weight = make()
    for dtype in DTYPES:
        case = make_normal(9, *weight.shape[::-1], 3, dtype=dtype, vectors="gamma", **form)
        exact = case.replace(weight=weight.dense(dtype))
        case = case.replace(weight=weight)
        check(exact, grad_reduce(case, CONFIGS[0], chunk=16))
        check(exact, grad_reduce(case, CONFIGS[1], splits=(1, 1), chunk=20))


UNMASKED = {
    "blocks within rows": lambda: four_bit(64, 128),
    "nested": lambda: four_bit(64, 128, "fp4", 128, nested=4),
    "blocks of several rows": lambda: four_bit(64, 128, block=256),
    "int8": lambda: int8(64, 128, 0, True),
}


@pytest.mark.parametrize("make", UNMASKED.values(), ids=UNMASKED)
def test_factor_gradients_of_whole_tiles_and_in_pieces_of_r(make):
    weight = make()
    case = make_normal(9, 128, 64, 33, dtype=torch.float16)
    exact = case.replace(weight=weight.dense(torch.float16))
    check(exact, grad_reduce(case.replace(weight=weight), CONFIGS[1]))


@every_weight
@every_form
def test_fused_forward_against_float64(make, form):
    """In either order of operands, and with K shared by two programs."""
    weight = make()
    for dtype in DTYPES:
        case = make_normal(
            5, *weight.shape[::-1], 3, dtype=dtype, vectors="bias gamma beta", **form
        )
        exact = case.replace(weight=weight.dense(dtype))
        case = case.replace(weight=weight)
        check(exact, forward(case, CONFIGS[0]))
        check(exact, forward(case, dataclasses.replace(CONFIGS[0], W_FIRST=True), num_splits=2))


def test_few_tokens_over_four_bits_are_planned_fused():
    """So no W is made: of 16 tokens, of 17 it is."""
    weight = four_bit(64, 128)
    for N, fused in ((16, True), (17, False)):
        case = make_normal(N, 128, 64, 3, dtype=torch.float16, vectors="gamma")
        exact = case.replace(weight=weight.dense(torch.float16))
        case = case.replace(weight=weight)
        plan = plan_call("triton", case.layer, case.x)
        assert (plan.forward == "fused") == fused
        with Recorder() as recorder:
            check(exact, {"y": backend.linear_forward(plan, case.x, case.layer)})
        made = [args[0] for name, args in recorder.calls if name.startswith("aten::empty")]
        assert ([64, 128] not in [list(shape) for shape in made]) == fused


def test_codes_that_share_no_absmax_are_planned_staged():
    for weight in (four_bit(64, 128, nested=4), four_bit(64, 96), int8(64, 128)):
        case = make_normal(4, weight.shape[1], 64, 3, dtype=torch.float16).replace(weight=weight)
        assert plan_call("triton", case.layer, case.x).forward == "staged"


def test_no_dense_W0_in_the_backward():
    """Beside partial sums a block of G is made, of as many bytes as the plan says."""
    weight = four_bit(512, 64)
    case = make_normal(9, 64, 512, 3, dtype=torch.float16).replace(weight=weight)
    plan = plan_call("triton", case.layer, case.grad, case.x)
    with Recorder() as recorder:
        backend.grad_factors(plan, case.grad, case.x, case.layer, Needs(True, True, False))
    made = [math.prod(args[0]) for name, args in recorder.calls if name.startswith("aten::empty")]
    assert max(made) == plan.chunk * 64 < 512 * 64
    assert 4 * sum(made) <= plan.workspace["grad_factors"]


@pytest.mark.parametrize("precision", ["merged", "split"])
@every_form
@every_dtype
def test_a_layer_on_triton(form, dtype, precision):
    """As `hut_linear` runs it: staged, and the reduction over the codes."""
    bnb = pytest.importorskip("bitsandbytes")
    case = make_normal((3, 5), 48, 70, 5, dtype=dtype, vectors="bias gamma beta", **form)
    case = case.replace(precision=precision)
    four = bnb.nn.Params4bit(case.weight.float(), requires_grad=False, quant_type="nf4")
    eight = bnb.nn.Linear8bitLt(48, 70, bias=False, has_fp16_weights=False)
    eight.weight.data = case.weight.float()
    for weight in (four.to("cpu"), eight.to("cpu").weight):
        exact = case.replace(weight=formats.stored(weight).dense(dtype))
        check(exact, run(case.replace(weight=weight), backend="triton"))


def test_the_frozen_product_on_triton():
    """The memory of a dropout, next to the layer's own."""
    from hut_kernels.autograd import StoredLinearFunction

    weight = four_bit(37, 64)
    x = torch.randn(5, 64, requires_grad=True)
    bias = nn.Parameter(torch.randn(37))
    stored = weight.scales, weight.form.text
    y = StoredLinearFunction.apply(x, weight.data, bias, "triton", stored)
    W0 = weight.dense(torch.float32)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W0, bias))
    dx, d_bias = torch.autograd.grad(y.sum(), (x, bias))
    torch.testing.assert_close(dx, W0.sum(0).expand_as(x))
    torch.testing.assert_close(d_bias, torch.full((37,), 5.0))
