"""accelerate_hira: PEFT's HiRA layers through the fused layer, and the report on the others."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import HiraConfig, PeftModel, get_peft_model
from peft.tuners import hira

from hut_kernels import autograd
from hut_kernels.integrations.peft import accelerate_hira, restore_hira
from hut_kernels.integrations.peft.hira import FusedHiraLinear

from ..references import error, limit
from .peft_models import LAYERS, Net, bert, gpt2

ROOT = "base_model.model."


def hira_model(dtype=torch.float32, **options):
    options = {"r": 4, "target_modules": LAYERS, "init_weights": False} | options
    model = get_peft_model(Net().to(dtype), HiraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.mul_(0.3)
    return model.eval()


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the calls of the fused function."""
    calls = []
    plain = autograd.HUTLinearFunction.apply

    def counted(*args):
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(autograd.HUTLinearFunction, "apply", counted)
    return calls


def gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **named}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_pefts(dtype, fused_calls):
    model, x = hira_model(dtype), torch.randn(3, 5, 24).to(dtype)
    y, grads = gradients(model, x)
    assert not fused_calls
    report = accelerate_hira(model)
    assert report.fused == tuple(ROOT + name for name in LAYERS)
    assert not report.conditional
    assert not report.kept
    y_fused, grads_fused = gradients(model, x)
    assert len(fused_calls) == 3
    assert y_fused.dtype == y.dtype
    # Three layers in a row, and PEFT's own path rounds as often.
    allowed = 6 * limit(dtype, 40)
    assert error(y_fused, y.double()) < allowed
    assert grads_fused.keys() == grads.keys()
    assert sum("hira_" in name for name in grads) == 6
    for name, grad in grads.items():
        assert error(grads_fused[name], grad.double()) < 2 * allowed, name


def test_split_is_bit_equal_in_float32():
    model, x = hira_model(), torch.randn(5, 24)
    y = model(x)
    accelerate_hira(model, precision="split")
    assert torch.equal(model(x), y)


def test_split_keeps_updates_below_the_weights_type():
    model, x = hira_model(torch.bfloat16), torch.randn(64, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_B" in name:
                parameter.mul_(1e-2)
    wide = copy.deepcopy(model).double()
    with wide.disable_adapter():
        base = wide(x.double())
    update = wide(x.double()) - base

    def gain(y):
        return ((y.double() - base) * update).sum() / update.square().sum()

    accelerate_hira(model, precision="split")
    assert 0.5 < gain(model(x)) < 1.5


def test_restore_undoes_it():
    model, x = hira_model(), torch.randn(5, 24)
    y = model(x)
    accelerate_hira(model)
    accelerate_hira(model)
    assert restore_hira(model) == [ROOT + name for name in LAYERS]
    assert {type(m) for m in model.modules() if isinstance(m, hira.HiraLayer)} == {hira.Linear}
    assert torch.equal(model(x), y)
    assert restore_hira(model) == []
    assert not hasattr(model.base_model.model.first, "hut_precision")


def test_dropout_keeps_pefts_path_in_training_only(fused_calls):
    model, x = hira_model(hira_dropout=0.4), torch.randn(5, 24)
    reference = copy.deepcopy(model)
    report = accelerate_hira(model)
    assert report.fused == ()
    assert set(report.conditional.values()) == {"dropout 0.4 while training"}
    assert "3 fused at times: dropout 0.4 while training" in str(report)
    for module in (model, reference):
        module.train()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    assert torch.equal(y, reference(x))
    assert not fused_calls
    model.eval()
    model(x)
    assert len(fused_calls) == 3


def test_dropout_counts_in_its_own_mode(fused_calls):
    model, x = hira_model(hira_dropout=0.4), torch.randn(5, 24)
    reference = copy.deepcopy(model)
    accelerate_hira(model)
    for module in (*model.modules(), *reference.modules()):
        if isinstance(module, nn.Dropout):
            module.train()  # while the layers are in eval
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    assert torch.equal(y, reference(x))
    assert not fused_calls
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model(x)
    assert len(fused_calls) == 3


def test_dropout_switched_off_leaves_the_other_reasons(fused_calls):
    model, x = hira_model(hira_dropout=0.4).train(), torch.randn(5, 24)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    report = accelerate_hira(model)
    assert len(report.fused) == 3
    first, middle = (model.base_model.model.get_submodule(name) for name in LAYERS[:2])
    first.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    middle.base_layer.weight.requires_grad_(True)
    y = model(x)
    assert len(fused_calls) == 1
    y.sum().backward()
    assert middle.base_layer.weight.grad is not None
    restore_hira(model)
    assert error(y, model(x).detach().double()) < 2e-6


def test_a_model_spread_over_devices_is_fused(fused_calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = hira_model(), torch.randn(5, 24)
    y = model(x)
    first, middle, _ = bases = [
        model.base_model.model.get_submodule(name).base_layer for name in LAYERS
    ]
    for base in bases:  # what accelerate's dispatch_model puts on every layer
        hooks.add_hook_to_module(base, hooks.AlignDevicesHook(torch.device("cpu")))
    assert len(accelerate_hira(model).fused) == 3
    assert error(model(x), y.detach().double()) < 2e-6
    assert len(fused_calls) == 3
    hooks.add_hook_to_module(first, hooks.AlignDevicesHook("cpu", io_same_device=True))
    hooks.add_hook_to_module(middle, hooks.ModelHook())
    report = accelerate_hira(model)
    assert set(report.conditional.values()) == {"its base layer carries hooks"}
    assert len(report.conditional) == 2


def test_the_report_tells_of_16_bit_weights():
    text = 'precision="split" keeps updates below about 2^-9'
    assert text in str(accelerate_hira(hira_model(torch.bfloat16)))
    assert text not in str(accelerate_hira(hira_model(torch.bfloat16), precision="split"))
    assert text not in str(accelerate_hira(hira_model()))


def test_several_active_adapters_keep_pefts_path(fused_calls):
    model, x = hira_model(), torch.randn(5, 24)
    second = HiraConfig(r=2, target_modules=["first"], init_weights=False)
    model.add_adapter("second", second)
    accelerate_hira(model)
    model.base_model.set_adapter(["default", "second"])
    report = accelerate_hira(model)
    assert report.conditional == {ROOT + "first": "2 active adapters"}
    y = model(x)
    assert len(fused_calls) == 2
    restore_hira(model)
    assert error(y, model(x).detach().double()) < 2e-6
    model.set_adapter("second")
    y = model(x)
    accelerate_hira(model)
    assert error(model(x), y.detach().double()) < 2e-6


def test_layers_that_cannot_be_fused_are_named():
    model = hira_model(target_modules=[*LAYERS, "emb", "conv"])
    report = accelerate_hira(model)
    assert report.kept == {
        ROOT + "emb": "Embedding: not a linear layer",
        ROOT + "conv": "Conv2d: not a linear layer",
    }
    assert len(report.fused) == 3
    assert "3 HiRA layers fused" in str(report)
    assert "Embedding: not a linear layer (base_model.model.emb)" in str(report)


def test_a_layer_of_another_class_is_named():
    class Other(hira.Linear):
        pass

    model = hira_model()
    model.base_model.model.first.__class__ = Other
    report = accelerate_hira(model)
    assert report.kept == {ROOT + "first": "Other: not a linear layer"}


def test_a_base_with_its_own_forward_is_named():
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = Net()
    net.first = Odd(24, 40)
    model = get_peft_model(net, HiraConfig(r=2, target_modules=LAYERS, init_weights=False))
    x = torch.randn(5, 24)
    y = model(x)
    report = accelerate_hira(model)
    assert "Odd has a forward of its own" in report.kept[ROOT + "first"]
    assert error(model(x), y.detach().double()) < 2e-6


def test_hooks_on_the_base_layer_still_run(fused_calls):
    model, x = hira_model(), torch.randn(5, 24)
    accelerate_hira(model)
    seen = []
    hook = model.base_model.model.first.base_layer.register_forward_hook(
        lambda *args: seen.append(args)
    )
    model(x)
    assert len(seen) == 1
    assert len(fused_calls) == 2
    hook.remove()
    model(x)
    assert len(fused_calls) == 5


def test_disabled_and_merged_models_are_pefts(fused_calls):
    model, x = hira_model(), torch.randn(5, 24)
    reference = copy.deepcopy(model)
    accelerate_hira(model)
    with model.disable_adapter(), reference.disable_adapter():
        assert torch.equal(model(x), reference(x))
    model.merge_adapter()
    reference.merge_adapter()
    assert torch.equal(model(x), reference(x))
    model.unmerge_adapter()
    assert not fused_calls
    merged = model.merge_and_unload()
    assert not any(isinstance(module, hira.HiraLayer) for module in merged.modules())


def test_a_trained_base_weight_keeps_pefts_path():
    model, x = hira_model(), torch.randn(5, 24)
    accelerate_hira(model)
    weight = model.base_model.model.first.base_layer.weight.requires_grad_(True)
    model(x).sum().backward()
    assert weight.grad is not None


def test_autocast(fused_calls):
    model, x = hira_model(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    accelerate_hira(model)
    with torch.autocast("cpu", torch.bfloat16):
        y_fused = model(x)
    assert len(fused_calls) == 3
    assert y_fused.dtype == y.dtype == torch.bfloat16
    assert error(y_fused, y.detach().double()) < 6 * limit(torch.bfloat16, 40)


def test_checkpoints_copies_and_pickles(tmp_path):
    model, x = hira_model(), torch.randn(5, 24)
    keys = list(model.state_dict())
    accelerate_hira(model)
    y = model(x)
    assert list(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model.base_model.model))(x), y)
    buffer = io.BytesIO()
    torch.save(model.base_model.model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert error(loaded(x), y.detach().double()) < 2e-6


@pytest.mark.parametrize("make", [gpt2, bert])
def test_transformers(make, fused_calls):
    model = get_peft_model(make(), HiraConfig(r=4, init_weights=False)).eval()
    inputs = torch.randint(3, 60, (2, 9))
    y = model(inputs).logits
    report = accelerate_hira(model)
    assert report.fused
    assert not report.kept
    assert error(model(inputs).logits, y.detach().double()) < 1e-5
    assert len(fused_calls) == len(report.fused)
    assert any(isinstance(module, FusedHiraLinear) for module in model.modules())


def test_training_steps_are_pefts():
    model, x = hira_model(), torch.randn(16, 24)
    reference = copy.deepcopy(model)
    accelerate_hira(model)
    for module in (model, reference):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for (name, trained), wanted in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert error(trained, wanted.detach().double()) < 2e-5, name


def test_errors():
    with pytest.raises(ValueError, match="no HiRA layer"):
        accelerate_hira(Net())
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'exact'"):
        accelerate_hira(hira_model(), precision="exact")
