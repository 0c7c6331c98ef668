"""Kernels over NF4 and FP4, their PTX executed: W0 to the bit, by the look-up in PTX; gradients."""

import pytest
import torch

from hut_kernels import auto, formats, hut_weight
from hut_kernels.formats.four_bit import FourBit
from hut_kernels.formats.int8 import Int8Rows
from hut_kernels.layer import Layer, Needs, Spec
from hut_kernels.triton import stored_weight
from hut_kernels.triton.launch import LaunchConfig
from hut_kernels.triton.launch import kind as kind_of
from hut_kernels.triton.tables import launch_config

from ..references import check, error, make_normal, poisoned
from . import cases
from .launch import executing

pytestmark = pytest.mark.ptx
CONFIG = LaunchConfig(BN=16, BO=32, BK=128, warps=4, stages=1)


def random(O, K, name, block, nested, dtype):
    blocks = O * K // block
    scales = (torch.rand(blocks) + 0.5,)
    if nested:
        codes = torch.randint(256, (blocks,), dtype=torch.uint8)
        absmax = torch.rand(-(-blocks // nested))
        scales = codes, torch.linspace(-1, 1, 256), absmax, torch.tensor([1.5])
    data = torch.randint(256, (O * K // 2,), dtype=torch.uint8)
    return FourBit(data, scales, formats.Layout(name, (O, K, block, nested), dtype))


SHAPES = {
    "ragged": (40, 192, "nf4", 64),
    "whole": (32, 128, "fp4", 32),
    "across rows": (20, 80, "nf4", 64),
}


@pytest.mark.parametrize("arch", cases.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nested", [0, 16])
def test_weights_looked_up_in_ptx(arch, dtype, shape, nested):
    if arch not in (80, 90) and nested == 0:
        pytest.skip("the other architectures run the longer variant only")
    O, K, name, block = shape
    weight = random(O, K, name, block, nested, dtype)
    A, B = torch.randn(5, K) / 8, torch.randn(O, 5)
    with executing(arch) as log:
        plain = stored_weight.launch_dequantize(weight, dtype, CONFIG)
        one = stored_weight.launch_stored_weight(Layer(weight, A, 0 * B), dtype, CONFIG)
        layer = Layer(weight, A, B, spec=Spec(scaling=0.75))
        W = stored_weight.launch_stored_weight(layer, dtype, CONFIG)
    assert log.launches
    W0 = weight.dense(dtype)
    assert torch.equal(plain, W0)
    assert torch.equal(one, W0)
    exact = W0.double() * (1 + 0.75 * B.double() @ A.double())
    assert error(W, exact) <= {torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]


def test_codes_that_do_not_begin_at_16_bytes():
    """A thread then loads fewer at once, of several blocks."""
    weight = random(32, 128, "nf4", 32, 0, torch.bfloat16)
    shifted = torch.cat([weight.data[:1], weight.data])[1:]
    assert shifted.data_ptr() % 16
    moved = FourBit(shifted, weight.scales, weight.form)
    with executing(80):
        W0 = stored_weight.launch_dequantize(moved, torch.bfloat16, CONFIG)
    assert torch.equal(W0, weight.dense(torch.bfloat16))


OTHERS = {
    "direct": (Spec(offset=0.0), False),
    "gamma": (Spec(), True),
    "two_sided": (Spec("two_sided"), True),
}


@pytest.mark.parametrize("arch", cases.ARCHITECTURES)
@pytest.mark.parametrize(("spec", "scaled"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_whose_T_is_applied_in_float32(arch, spec, scaled, dtype):
    """The look-up is then in one layout, and the product's T in another."""
    weight = random(40, 192, "nf4", 64, 0, dtype)
    A, B = torch.randn(5, 192), torch.randn(40, 5)
    gamma = torch.randn(40) if scaled else None
    layer = Layer(weight, A, B, gamma=gamma, spec=spec)
    config = launch_config("stored", f"sm_{arch}", 1, 5, kind_of(dtype))
    with executing(arch):
        W = stored_weight.launch_stored_weight(layer, dtype, config)
    exact = hut_weight(
        weight.dense(dtype).double(), A.double(), B.double(), gamma=gamma,
        transform=spec.transform, offset=spec.offset, dtype=torch.float64,
    )  # fmt: skip
    assert error(W, exact) <= {torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]


def int8(O, K):
    form = formats.Layout("int8", (O, K, 0), torch.float32)
    scales = torch.rand(O) + 0.5, torch.randint(-9, 9, (O,), dtype=torch.int8)
    return Int8Rows(torch.randint(-128, 128, (O * K,), dtype=torch.int8), scales, form)


REDUCED = {
    "ragged": (lambda dtype: random(72, 192, "nf4", 64, 0, dtype), {}),
    "nested": (lambda dtype: random(72, 192, "nf4", 64, 16, dtype), {"vectors": "gamma"}),
    "whole": (lambda dtype: random(128, 128, "fp4", 32, 0, dtype), {"vectors": "gamma"}),
    "two_sided": (lambda dtype: random(72, 192, "nf4", 32, 0, dtype), {"transform": "two_sided"}),
    "across rows": (lambda dtype: random(20, 80, "fp4", 64, 16, dtype), {}),
    "int8": (lambda dtype: int8(72, 80), {}),
}
DECODED = {
    "ragged": (13, 72, 192, 64, 1, {"vectors": "bias gamma beta"}),
    "shared by programs": (5, 64, 1088, 64, 8, {}),
    "whole": (16, 128, 256, 32, 1, {"offset": 0.0}),
    "two_sided": (1, 72, 192, 64, 1, {"transform": "two_sided"}),
}


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def spread(architectures, types, calls, plain):
    """All calls in all types on sm_80 and sm_90; on the others the plain ones, in bfloat16."""
    return [
        pytest.param(arch, TYPES[dtype], call, id=f"{arch}-{dtype}-{name}")
        for arch in architectures
        for dtype in types
        for name, call in calls.items()
        if arch in (80, 90) or (dtype == "bf16" and name in plain)
    ]


# On sm_100 this Triton is not trusted with the kernel.
@pytest.mark.parametrize(
    ("arch", "dtype", "call"), spread((80, 89, 90, 120), ("bf16", "fp16"), DECODED, ("ragged",))
)
def test_few_tokens_over_codes_in_ptx(arch, dtype, call):
    """Without W in memory, as the operators launch it."""
    N, O, K, block, sms, options = call
    weight = random(O, K, "nf4", block, 0, dtype)
    case = make_normal(N, K, O, 5, dtype=dtype, **options)
    layer = case.replace(weight=weight).layer
    with poisoned(), cases.planning_for(arch, sms), executing(arch) as log:
        y = auto.PLANNED["triton"].linear_forward(case.x, layer)
    kernels = ["hut_forward_kernel"] + ["hut_split_k_kernel"] * (sms > 1)
    assert [launch.kernel for launch in log.launches] == kernels
    check(case.replace(weight=weight.dense(dtype)), {"y": y})


@pytest.mark.parametrize(
    ("arch", "dtype", "call"),
    spread(cases.ARCHITECTURES, TYPES, REDUCED, ("ragged", "across rows", "int8")),
)
def test_factor_gradients_over_codes_in_ptx(arch, dtype, call):
    """By the tables' tiles, as the operators launch them."""
    make, options = call
    weight = make(dtype)
    case = make_normal(9, *weight.shape[::-1], 5, dtype=dtype, **options)
    layer = case.replace(weight=weight).layer
    needs = Needs(True, True, layer.gamma is not None)
    with poisoned(), cases.planning_for(arch, 1), executing(arch) as log:
        grads = auto.PLANNED["triton"].linear_backward(case.grad, case.x, layer, False, needs)
    assert [launch.kernel for launch in log.launches] == ["hut_grad_reduce_kernel"]
    results = dict(zip(("hut_A", "hut_B", "WG"), grads, strict=False))
    check(case.replace(weight=weight.dense(dtype)), results)
