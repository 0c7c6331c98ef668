"""parameter_groups: each trained tensor once, at the rate that its form needs for LoRA's rate."""

import math

import pytest
import torch
from torch import nn

from hut_kernels import PAPER, HUTLinear, inject, parameter_groups
from hut_kernels.errors import HUTBackendError

SIZE = 0.02
LR = 1e-3


class Net(nn.Module):
    """Two adapted layers of known size and a head that is trained as a whole."""

    def __init__(self, **options):
        super().__init__()
        self.first = nn.Linear(64, 48)
        self.second = nn.Linear(48, 32)
        self.head = nn.Linear(32, 4)
        for layer in (self.first, self.second):
            layer.weight.data.mul_(SIZE / layer.weight.data.square().mean().sqrt())
        inject(self, ["first", "second"], r=4, **options)
        self.head.requires_grad_(True)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def rates(model, **options):
    """The rate and weight decay of each trained parameter, by name; each is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, LR, **options):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained
    return found


def test_the_residual_form_takes_loras_rate_over_the_weights_size():
    found = rates(Net(), weight_decay=0.1)
    assert found["first.hut_B"] == pytest.approx((LR / SIZE, 0.1), rel=1e-5)
    assert found["second.hut_B"] == pytest.approx((LR / SIZE, 0.1), rel=1e-5)
    assert {found[name] for name in found if not name.endswith("hut_B")} == {(LR, 0.1)}


def test_with_scale_by_rms_everything_takes_loras_rate():
    found = rates(Net(scale_by_rms=True), weight_decay=0.1)
    assert {*found.values()} == {(LR, 0.1)}


def test_the_groups_and_scale_by_rms_train_the_same_weights():
    """Adam's steps do not feel a factor of a gradient: what is shown of one holds of the other."""
    updates = []
    for options in ({}, {"scale_by_rms": True}):
        torch.manual_seed(0)
        model = Net(**options).double()
        optimizer = torch.optim.Adam(parameter_groups(model, 1e-2), eps=1e-30)
        before = model.first.merged_weight()
        for _ in range(6):
            model(torch.randn(16, 64, dtype=torch.double)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        updates.append(model.first.merged_weight() - before)
    assert updates[0].norm() > 0.1 * SIZE * before.numel() ** 0.5
    torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-4 * SIZE)


@pytest.mark.parametrize("options", [{"offset": 0}, {"transform": "two_sided"}, PAPER], ids=str)
def test_forms_around_one_are_never_decayed(options):
    found = rates(Net(**options), weight_decay=0.1)
    around_one = ("hut_A", "hut_B", "gamma")
    each = [math.sqrt(4 / (6 * n)) / SIZE for n in (64, 48)]
    expected = LR * math.sqrt(each[0] * each[1])
    for name, given in found.items():
        usual = (LR, 0.1) if not name.endswith(around_one) else (expected, 0.0)
        assert given == pytest.approx(usual, rel=1e-5)


def moved(model, x, target, groups):
    """Root mean square of one Adam step's change of each layer's effective weight."""
    layers = [m for m in model.modules() if isinstance(m, HUTLinear)]
    before = [layer.merged_weight().double() for layer in layers]
    optimizer = torch.optim.Adam(groups)
    for _ in range(2):  # with hut_B = 0 the first step moves hut_B only
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    after = [layer.merged_weight().double() for layer in layers]
    return [float((a - b).square().mean().sqrt()) for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_by_rms": True}, {"offset": 0}, {"transform": "two_sided"}],
    ids=str,
)
def test_a_step_moves_a_weight_as_far_as_loras(options):
    torch.manual_seed(0)
    model = Net(**options)
    x, target = torch.randn(64, 64), torch.randint(4, (64,))
    found = moved(model, x, target, parameter_groups(model, LR))
    # LoRA's: steps of LR on B, over A uniform in +-1 / sqrt(in).
    for distance, n in zip(found, (64, 48), strict=True):
        lora = 2 * LR * math.sqrt(4 / (3 * n))
        assert 0.3 < distance / lora < 3


def test_frozen_factors_and_groups_without_members_are_left_out():
    model = Net()
    for parameter in (model.first.hut_A, model.first.hut_B, *model.head.parameters()):
        parameter.requires_grad_(False)
    assert rates(model).keys() == {"second.hut_A", "second.hut_B"}


def test_parameter_groups_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="trains no HUT factor: call inject"):
        parameter_groups(nn.Linear(2, 2), LR)
    with pytest.raises(ValueError, match=r"lr must be at least 0 and finite; got -1"):
        parameter_groups(Net(), -1)
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0 and finite; got inf"):
        parameter_groups(Net(), LR, weight_decay=math.inf)
    with pytest.raises(TypeError, match="lr must be a real number"):
        parameter_groups(Net(), "1e-3")
    with pytest.raises(HUTBackendError, match="meta device"):
        parameter_groups(Net().to("meta"), LR)
