"""Kernels over stored weights, interpreted: W0 to the bit, W against float64, whole layers."""

import pytest
import torch
from torch import nn

from hut_kernels import formats
from hut_kernels.formats.four_bit import FourBit
from hut_kernels.formats.int8 import Int8Rows
from hut_kernels.layer import Layer
from hut_kernels.triton import stored_weight
from hut_kernels.triton.launch import LaunchConfig

from ..references import check, error, make_normal, run
from .launches import DTYPES, every_dtype, every_form

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


@pytest.mark.parametrize("precision", ["merged", "split"])
@every_form
@every_dtype
def test_a_layer_on_triton(form, dtype, precision):
    """As `hut_linear` runs it: staged, and the reduction over W0."""
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
