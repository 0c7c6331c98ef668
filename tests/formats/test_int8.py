"""Int8 rows and tensors that dequantize themselves: bit for bit what their libraries say."""

import pytest
import torch
from torch import nn

from hut_kernels import formats
from hut_kernels.errors import HUTBackendError

from .weights import bnb, linear8bit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
def test_int8_params(dtype):
    weight = linear8bit(97, 130).weight
    expected = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    stored = formats.stored(weight)
    assert torch.equal(stored.dense(dtype), expected.to(dtype))
    assert stored.dtype == torch.float32
    assert stored.nbytes == 97 * 130 + 97 * 4
    again = formats.restore(stored.data, stored.scales, stored.form.text)
    assert torch.equal(again.read(slice(3, 50), torch.empty(47, 130)), expected[3:50])


@every_dtype
def test_scales_of_zero_subnormal_infinite_and_nan(dtype):
    weight = linear8bit(9, 130).weight
    special = [0.0, 1e-40, 3e-8, 6e-5, 6e4, 3e38, float("inf"), float("nan"), 1.0]
    weight.SCB = torch.tensor(special)
    expected = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)
    torch.testing.assert_close(
        formats.stored(weight).dense(dtype), expected, rtol=0, atol=0, equal_nan=True
    )


@every_dtype
def test_int8_params_at_any_width(dtype):
    for in_features in (*range(2, 400, 3), 4304):
        weight = linear8bit(5, in_features).weight
        expected = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)
        assert torch.equal(formats.stored(weight).dense(dtype), expected), in_features


def test_scales_that_a_forward_has_moved_away():
    layer = linear8bit()
    layer(torch.randn(2, 64))
    with pytest.raises(HUTBackendError, match=r"layer\.weight\.SCB = layer\.state\.SCB"):
        formats.stored(layer.weight)


def test_int8_params_that_are_not_quantized():
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    with pytest.raises(HUTBackendError, match=r"Int8Params of torch\.float32.*not quantized yet"):
        formats.stored(layer.weight)


# torchao


def torchao(config, dtype, in_features=128):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(in_features, 72, dtype=dtype))
    quantization.quantize_(model, config(quantization))
    return model[0].weight


INT8 = {
    "symmetric": lambda ao: ao.Int8WeightOnlyConfig(),
    "per tensor": lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
}


@every_dtype
@pytest.mark.parametrize("config", INT8.values(), ids=INT8)
def test_int8_tensor(config, dtype):
    weight = torchao(config, dtype)
    stored = formats.stored(weight)
    expected = weight.dequantize()
    if isinstance(stored, formats.Stored):
        assert torch.equal(stored.dense(dtype), expected)
    else:
        assert torch.equal(formats.dense(stored), expected)


def test_int8_tensor_is_read_by_rows_where_each_has_a_scale():
    by_name = {name: formats.stored(torchao(c, torch.float32)) for name, c in INT8.items()}
    assert isinstance(by_name["symmetric"], formats.Stored)
    assert not isinstance(by_name["per tensor"], formats.Stored)


@every_dtype
def test_int8_tensor_with_zero_points(dtype):
    weight = torchao(INT8["symmetric"], dtype)
    weight.zero_point = torch.randint(-128, 128, weight.zero_point.shape, dtype=torch.int8)
    assert torch.equal(formats.stored(weight).dense(dtype), weight.dequantize())


def test_int8_tensor_that_scales_its_inputs():
    weight = torchao(INT8["symmetric"], torch.float32)
    weight.act_pre_scale = torch.ones(128)
    with pytest.raises(HUTBackendError, match="act_pre_scale"):
        formats.stored(weight)


SELF_DEQUANTIZING = {
    "float8": lambda ao: ao.Float8WeightOnlyConfig(),
    "intx": lambda ao: ao.IntxWeightOnlyConfig(),
}


@every_dtype
@pytest.mark.parametrize("config", SELF_DEQUANTIZING.values(), ids=SELF_DEQUANTIZING)
def test_a_self_dequantizing_tensor_is_dense_for_one_pass(config, dtype):
    weight = torchao(config, dtype)
    assert formats.stored(weight) is weight
    dense = formats.dense(weight)
    assert type(dense) is torch.Tensor
    assert dense.dtype == dtype
    assert torch.equal(dense, weight.dequantize())


def test_a_plain_tensor_is_itself():
    for weight in (torch.randn(3, 4), nn.Parameter(torch.randn(3, 4))):
        assert formats.stored(weight) is weight
        assert formats.dense(weight) is weight


def test_an_opaque_packing_is_refused_by_name():
    kind = type("Int4PackedTensor", (torch.Tensor,), {"__module__": "torchao.somewhere"})
    weight = torch.randn(3, 4).as_subclass(kind)
    with pytest.raises(HUTBackendError, match=r"Int4PackedTensor, which has no dequantize\(\)"):
        formats.stored(weight)
