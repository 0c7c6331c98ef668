"""hut_linear_group without the extension: what its layers compute, called by themselves."""

import pytest
import torch
from torch import nn

from hut_kernels import PAPER, HUTBackendError, HUTLinear, hut_linear_group


def layers_of(*options):
    layers = [HUTLinear(24, 16 + 8 * j, 3, **each) for j, each in enumerate(options)]
    for layer in layers:
        nn.init.normal_(layer.hut_B)
    return layers


@pytest.mark.parametrize(
    "options", [({}, {}, {}), ({}, PAPER), ({"dropout": 0.1}, {"bias": False})]
)
def test_the_outputs_and_gradients_are_the_layers(options):
    layers = layers_of(*options)
    x = torch.randn(2, 5, 24, requires_grad=True)
    found = {}
    for name in ("together", "apart"):
        torch.manual_seed(0)
        together = name == "together"
        outputs = hut_linear_group(x, layers) if together else [layer(x) for layer in layers]
        parameters = [factor for layer in layers for _, factor in layer.named_factors()]
        loss = sum(y.square().sum() for y in outputs)
        found[name] = [*outputs, *torch.autograd.grad(loss, [x, *parameters])]
    for together, apart in zip(found["together"], found["apart"], strict=True):
        assert torch.equal(together, apart)


def test_a_list_a_single_layer_and_none_are_groups_too():
    (layer,) = layers_of({})
    x = torch.randn(4, 24)
    assert hut_linear_group(x, []) == ()
    assert torch.equal(hut_linear_group(x, [layer])[0], layer(x))


def test_hooks_and_subclasses_keep_their_call():
    class Doubled(HUTLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = layers_of({}, {})
    layers[0].register_forward_hook(lambda layer, inputs, y: y + 1)
    doubled = Doubled(24, 16, 3)
    x = torch.randn(4, 24)
    for some in ([*layers, doubled], [doubled, doubled]):
        for y, layer in zip(hut_linear_group(x, some), some, strict=True):
            assert torch.equal(y, layer(x))


def test_layers_that_are_merged_are_called_by_themselves():
    merged = [layer.to_linear() for layer in layers_of({}, {})]
    x = torch.randn(4, 24)
    for some in (merged, [merged[0], merged[0]]):
        for y, layer in zip(hut_linear_group(x, some), some, strict=True):
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda layers: layers[1].weight.requires_grad_(), ValueError, "weight requires grad"),
        (lambda layers: layers[1].to("meta"), ValueError, "one device|meta"),
        (
            lambda layers: setattr(layers[1], "hut_A", nn.Parameter(torch.ones(3, 23))),
            ValueError,
            "hut_A's second dimension",
        ),
    ],
)
def test_a_layer_that_hut_linear_refuses_is_refused(spoil, error, message):
    layers = layers_of({}, {})
    spoil(layers)
    with pytest.raises((error, HUTBackendError), match=message):
        hut_linear_group(torch.randn(4, 24), layers)


def test_layers_of_other_widths_are_refused():
    layers = [HUTLinear(24, 8), HUTLinear(25, 8)]
    with pytest.raises(ValueError, match="in_features = 25; got 24"):
        hut_linear_group(torch.randn(4, 24), layers)
