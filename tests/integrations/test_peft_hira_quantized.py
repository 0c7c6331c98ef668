"""accelerate_hira over quantized bases: PEFT's HiRA where it is right, float64 where it is not."""

import pytest
import torch
from peft import HiraConfig, get_peft_model
from torch import nn

from hut_kernels import formats
from hut_kernels.integrations.peft import accelerate_hira, restore_hira

from ..formats.weights import linear4bit, linear8bit, repacked
from ..references import error


class Model(nn.Module):
    def __init__(self, layer, flag=True):
        super().__init__()
        self.layer = layer
        kind = type(layer).__name__
        if flag:  # what a quantizer of transformers sets
            self.is_loaded_in_4bit = kind == "Linear4bit"
            self.is_loaded_in_8bit = kind == "Linear8bitLt"

    def forward(self, x):
        return self.layer(x)


def hira_model(layer, flag=True, **options):
    config = HiraConfig(target_modules=["layer"], r=4, **options)
    model = get_peft_model(Model(layer, flag), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    return model


def exact(model, x):
    """The layer in float64."""
    layer = model.base_model.model.layer
    W0 = formats.dense(formats.base_weight(layer.base_layer), torch.float64)
    A, B = layer.hira_A["default"].double(), layer.hira_B["default"].double()
    y = x.double() @ (W0 * (1 + B @ A)).T
    return y + layer.base_layer.bias.double()


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_as_peft_where_it_is_right(make):
    model = hira_model(make())
    x = torch.randn(5, 64, requires_grad=True)
    peft = model(x)
    d_peft = torch.autograd.grad(peft.sum(), x)[0]
    report = accelerate_hira(model)
    assert report.fused == ("base_model.model.layer",)
    assert report.mended == {}
    y = model(x)
    assert error(y, peft.detach().double()) < 1e-5
    assert error(torch.autograd.grad(y.sum(), x)[0], d_peft.double()) < 1e-5
    for state in (model.eval(), model.train()):
        assert error(state(x), exact(model, x).detach()) < 1e-5
    with model.disable_adapter():
        base = model(x)
        assert error(base, model.base_model.model.layer.base_layer.train()(x).detach()) < 1e-5
    assert restore_hira(model) == ["base_model.model.layer"]
    assert torch.equal(model.train()(x), peft)


def test_several_adapters_and_dropout():
    model = hira_model(linear4bit())
    model.add_adapter("other", HiraConfig(target_modules=["layer"], r=2))
    layer, x = model.base_model.model.layer, torch.randn(5, 64)
    with torch.no_grad():
        layer.hira_B["other"].normal_()
    model.base_model.set_adapter(["default", "other"])
    peft = model(x)
    accelerate_hira(model)
    assert error(model(x), peft.detach().double()) < 1e-5
    dropping = hira_model(linear4bit(), hira_dropout=0.5)
    torch.manual_seed(3)
    peft = dropping(x)
    accelerate_hira(dropping)
    torch.manual_seed(3)
    assert error(dropping(x), peft.detach().double()) < 1e-5


def test_int8_in_a_model_that_does_not_say_so():
    """PEFT then takes the codes for the weight."""
    model = hira_model(linear8bit(), flag=False)
    x = torch.randn(5, 64)
    assert error(model(x), exact(model, x).detach()) > 0.1
    report = accelerate_hira(model)
    assert "multiplies the stored codes" in report.mended["base_model.model.layer"]
    assert "1 computed rightly now" in str(report)
    assert error(model(x), exact(model, x).detach()) < 1e-5


def test_rows_that_are_no_multiple_of_a_block():
    layer = linear4bit(in_features=80, nested=False)
    spread = torch.logspace(-2, 2, 96).repeat_interleave(80)
    layer.weight.quant_state.absmax *= spread.view(-1, 64)[:, 0]
    model = hira_model(layer)
    x = torch.randn(5, 80)
    report = accelerate_hira(model)
    assert "no multiple of a block" in report.mended["base_model.model.layer"]
    assert error(model(x), exact(model, x).detach()) < 1e-5


def test_a_repacked_base():
    model = hira_model(repacked(linear4bit(nested=False)))
    x = torch.randn(5, 64, requires_grad=True)
    report = accelerate_hira(model)
    assert "repacked its base" in report.mended["base_model.model.layer"]
    for state in (model.eval(), model.train()):
        y = state(x)
        assert error(y, exact(model, x).detach()) < 1e-5
        assert torch.autograd.grad(y.sum(), x)[0].abs().max() > 0
