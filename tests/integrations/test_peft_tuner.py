"""The HUT tuner in PEFT: its numbers in float64, and every door of PEFT and transformers to it."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import hira, loha, lora
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hut_kernels import autograd, parameter_groups
from hut_kernels.errors import HUTBackendError
from hut_kernels.integrations.peft import HUTConfig, HUTLayer, HUTModel
from hut_kernels.integrations.peft.layer import Form, Linear
from hut_kernels.integrations.peft.registration import peft_type, register

from ..references import error, limit
from .peft_models import LAYERS, Net, bert, gpt2, llama, needs_add_adapter, weight_and_bias

FORMS = {
    "residual": {},
    "alpha": {"hut_alpha": 12},
    "direct": {"offset": 0},
    "two_sided": {"transform": "two_sided"},
    "paper": {"transform": "two_sided", "scale_shift": True},
    "shifted": {"scale_shift": True, "hut_alpha": 2},
    "split": {"precision": "split"},
    "unfused": {"fused": False},
}
DEFAULTS = {"transform": "low_rank", "offset": 1, "precision": "merged", "fused": True}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def config(**options):
    return HUTConfig(**({"r": 4, "target_modules": LAYERS, "init_weights": False} | options))


def hut_model(dtype=torch.float32, **options):
    return get_peft_model(Net().to(dtype), config(**options)).eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, HUTLayer)]


def reference(model, x, names=("default",)):
    """The Net under its adapters, in float64."""
    x = x.double()
    for index, name in enumerate(LAYERS):
        layer = model.base_model.model.get_submodule(name)
        weight, bias = weight_and_bias(layer, [n for n in names if n in layer.hut_A])
        x = x @ weight.t() + bias
        x = torch.tanh(x) if index < 2 else x
    return x


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


# The numbers.


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output(form, dtype, fused_calls):
    model, x = hut_model(dtype, **form), torch.randn(3, 5, 24).to(dtype)
    y = model(x)
    assert y.dtype == dtype
    assert error(y, reference(model, x)) < 4 * limit(dtype, 40)
    assert len(fused_calls) == (0 if form.get("fused") is False else 3)
    for layer in layers(model):
        given = {key: form.get(key, default) for key, default in DEFAULTS.items()}
        assert layer.hut_form["default"] == Form(**given)
    assert {p.dtype for layer in layers(model) for p in layer.hut_A.values()} == {torch.float32}


@every_form
def test_gradients(form):
    torch.set_default_dtype(torch.float64)
    try:
        model, x = hut_model(torch.float64, **form), torch.randn(6, 24)
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert len(parameters) == 3 * (4 if form.get("scale_shift") else 2)
        wanted = copy.deepcopy(model)
        for layer in layers(wanted):
            layer.hut_form["default"] = layer.hut_form["default"]._replace(fused=False)
        x.requires_grad_()
        grads = torch.autograd.grad(model(x).square().sum(), [x, *parameters])
        expected = torch.autograd.grad(
            wanted(x).square().sum(), [x, *(p for p in wanted.parameters() if p.requires_grad)]
        )
        for grad, one in zip(grads, expected, strict=True):
            assert error(grad, one) < 1e-12
    finally:
        torch.set_default_dtype(torch.float32)


@every_form
def test_a_fresh_adapter_is_the_base_model(form):
    net, x = Net(), torch.randn(5, 24)
    y = net(x)
    model = get_peft_model(copy.deepcopy(net), config(init_weights=True, **form))
    assert error(model(x), y.detach().double()) < 2e-6
    assert error(model.merge_and_unload()(x), y.detach().double()) < 2e-6


def test_alpha_is_not_r():
    """The scaling is alpha / r, per layer by the patterns; None is scaling 1 for every rank."""
    model = hut_model(
        r=4, hut_alpha=8, rank_pattern={"middle": 2}, alpha_pattern={"last": 6, "middle": 5}
    )
    net = model.base_model.model
    scaling = {name: net.get_submodule(name).scaling["default"] for name in LAYERS}
    assert scaling == {"first": 2.0, "middle": 2.5, "last": 1.5}
    assert net.middle.hut_A["default"].shape == (2, 40)
    assert error(model(x := torch.randn(5, 24)), reference(model, x)) < 1e-5
    assert {s for layer in layers(hut_model(r=3)) for s in layer.scaling.values()} == {1.0}


@every_form
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge_are_exact(form, safe):
    model, x = hut_model(**form), torch.randn(5, 24)
    y = model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    storage = {layer.base_layer.weight.data_ptr() for layer in layers(model)}
    model.merge_adapter(safe_merge=safe)
    assert error(model(x), y.detach().double()) < 4e-6
    for layer in layers(model):
        weight, bias = unmerged_weight_and_bias(layer)
        assert error(layer_matrix(layer), weight) < 1e-6
        if layer.base_layer.bias is not None:
            assert error(layer.base_layer.bias, bias) < 1e-6
    model.unmerge_adapter()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert storage == {layer.base_layer.weight.data_ptr() for layer in layers(model)}
    assert torch.equal(model(x), y)


def layer_matrix(layer):
    weight = layer.base_layer.weight
    return weight.t() if layer.fan_in_fan_out else weight


def unmerged_weight_and_bias(layer):
    twin = copy.deepcopy(layer)
    twin.unmerge()
    return weight_and_bias(twin)


def test_a_16_bit_merge_does_not_drift():
    model = hut_model(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_merge_of_a_broken_adapter():
    model = hut_model()
    before = model.base_model.model.first.base_layer.weight.clone()
    with torch.no_grad():
        model.base_model.model.first.hut_B["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected .* adapter default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.first.base_layer.weight, before)
    assert not model.base_model.model.first.merged


@every_form
def test_several_active_adapters_add_up(form, fused_calls):
    """The effective multiplier is 1 + sum(T_i - 1), unmerged and merged, in any order."""
    model, x = hut_model(**form), torch.randn(5, 24)
    model.add_adapter("second", config(r=2, **form))
    model.add_adapter("third", config(r=3, target_modules=["first", "last"]))
    names = ["default", "second", "third"]
    model.base_model.set_adapter(names)
    y = model(x)
    assert error(y, reference(model, x, names)) < 1e-5
    model.merge_adapter()
    assert error(model(x), y.detach().double()) < 1e-5
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["third"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(adapter_names=["default", "second"])
    assert error(model(x), y.detach().double()) < 1e-5
    model.unmerge_adapter()
    model.base_model.set_adapter("second")
    assert error(model(x), reference(model, x, ["second"])) < 1e-5


def test_a_merge_of_several_rounds_once():
    model = hut_model(torch.bfloat16)
    model.add_adapter("second", config(r=2))
    model.base_model.set_adapter(["default", "second"])
    first = model.base_model.model.first
    weight, _ = weight_and_bias(first, ["default", "second"])
    first.merge()
    assert (
        torch.equal(first.base_layer.weight, weight.float().to(torch.bfloat16))
        or ((first.base_layer.weight.double() - weight).abs() <= weight.abs() * 2**-8).all()
    )


@every_form
def test_dropout_acts_on_the_adapter_path_only(form):
    """E over masks is the layer itself; a fresh adapter is not disturbed at all."""
    fresh = get_peft_model(Net(), config(init_weights=True, hut_dropout=0.5, **form)).train()
    x = torch.randn(5, 24)
    with fresh.disable_adapter():
        y = fresh(x)
    assert error(fresh(x), y.detach().double()) < 4e-6

    model = hut_model(hut_dropout=0.5, **form)
    layer = model.base_model.model.first
    x = torch.randn(4, 24)
    weight, bias = weight_and_bias(layer)
    W0 = layer.base_layer.weight.detach().double()
    gamma = layer.hut_gamma["default"].detach().double() if "default" in layer.hut_gamma else 1.0
    layer.train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    d = nn.functional.dropout(x, 0.5).double()
    update = weight - (gamma[:, None] * W0 if torch.is_tensor(gamma) else W0)
    wanted = (x.double() @ W0.t()) * gamma + d @ update.t() + bias
    assert error(y, wanted) < 1e-5
    layer.eval()
    assert error(layer(x), x.double() @ weight.t() + bias) < 1e-5


def test_dropout_counts_in_its_own_mode():
    model, x = hut_model(hut_dropout=0.5), torch.randn(5, 24)
    y = model(x)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()  # while the layers are in eval: several draws of one prediction
    assert not torch.equal(model(x), model(x))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(model(x), y)


def test_dropout_gradients():
    model = hut_model(hut_dropout=0.3).double()
    layer = model.base_model.model.first.train()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        torch.manual_seed(7)
        return torch.func.functional_call(layer, {"hut_A.default": A, "hut_B.default": B}, (x,))

    factors = [layer.hut_A["default"], layer.hut_B["default"]]
    assert torch.autograd.gradcheck(run, (x, *(f.detach().requires_grad_() for f in factors)))


def test_dropout_with_several_adapters():
    model = hut_model(hut_dropout=0.5)
    model.add_adapter("second", config(r=2))
    model.base_model.set_adapter(["default", "second"])
    layer, x = model.base_model.model.first, torch.randn(4, 24)
    layer.train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    d = nn.functional.dropout(x, 0.5).double()
    both, bias = weight_and_bias(layer, ["default", "second"])
    one, _ = weight_and_bias(layer, ["default"])
    W0 = layer.base_layer.weight.detach().double()
    wanted = x.double() @ (both - one + W0).t() + d @ (one - W0).t() + bias
    assert error(y, wanted) < 1e-5


def test_hooks_on_the_base_layer_run_and_count(fused_calls):
    model, x = hut_model(), torch.randn(5, 24)
    y = model(x)
    doubled = copy.deepcopy(model)
    base = doubled.base_model.model.last.base_layer
    hook = base.register_forward_hook(lambda module, args, output: output + 1)
    assert error(doubled(x), (y + 1).detach().double()) < 1e-5
    hook.remove()
    assert torch.equal(doubled(x), y)


def test_a_model_spread_over_devices_is_fused(fused_calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = hut_model(), torch.randn(5, 24)
    for layer in layers(model):  # what accelerate's dispatch_model puts on every layer
        hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(torch.device("cpu")))
    assert error(model(x), reference(model, x)) < 3 * limit(torch.float32, 40)
    assert len(fused_calls) == 3


def test_autocast(fused_calls):
    model, x = hut_model(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert error(y, reference(model, x)) < 6 * limit(torch.bfloat16, 40)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# PEFT's doors.


def test_the_type_is_a_member_of_pefts_enumeration():
    member = peft_type()
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member == "HUT" == member.value == member.name
    assert PeftType.HUT is PeftType("HUT") is PeftType["HUT"] is member
    assert member in list(PeftType)
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert len({*PeftType}) == len(list(PeftType))
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HUT"] is HUTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["HUT"] is HUTModel
    register(HUTConfig, HUTModel)
    assert PeftConfig.from_peft_type(peft_type="HUT", r=3) == HUTConfig(r=3)


def test_another_method_called_hut(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type(), LoraConfig)
    with pytest.raises(ImportError, match=r"already has a method HUT, peft.tuners.lora"):
        register(HUTConfig, HUTModel)


def test_config_survives_its_file(tmp_path):
    config = HUTConfig(
        r=3, hut_alpha=7.5, hut_dropout=0.25, target_modules=["a", "b"], exclude_modules=["c"],
        modules_to_save=["head"], layers_to_transform=0, layers_pattern="layers",
        rank_pattern={"a": 2}, alpha_pattern={"b": 3}, precision="split", fused=False,
        scale_shift=True, fan_in_fan_out=True, init_weights=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "HUT"
    assert PeftConfig.from_pretrained(tmp_path) == config == HUTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1; got 0"),
        ({"rank_pattern": {"q": -1}}, "got -1 for 'q'"),
        ({"transform": "diagonal"}, "transform must be one of .* got 'diagonal'"),
        ({"precision": "exact"}, "precision must be one of"),
        ({"hut_dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"offset": 0.5}, "offset must be 1 .* or 0"),
        ({"offset": 0, "hut_alpha": 4}, "alpha belongs to low_rank with offset 1"),
        ({"transform": "two_sided", "hut_alpha": 4}, "alpha belongs to low_rank"),
        ({"transform": "two_sided", "alpha_pattern": {"q": 4}}, "alpha belongs to low_rank"),
        ({"transform": "two_sided", "offset": 0}, "offset has no part in two_sided"),
        ({"init_weights": "gaussian"}, "init_weights must be True or False; got 'gaussian'"),
        ({"scale_shift": "yes"}, "scale_shift must be True or False; got 'yes'"),
        ({"fused": None}, "fused must be True or False; got None"),
        ({"r": True}, "r must be an integer of at least 1; got True"),
        ({"hut_alpha": "16"}, "hut_alpha must be a number; got '16'"),
        ({"hut_dropout": None}, "hut_dropout must be a number; got None"),
        ({"alpha_pattern": {"q": "4"}}, "q must be a number; got '4'"),
        ({"target_modules": "q", "layers_to_transform": 0}, "layers_to_transform"),
        ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        HUTConfig(**options)


@pytest.mark.parametrize(
    ("option", "own"),
    [
        ("lora_alpha", "hut_alpha"),
        ("alpha", "hut_alpha"),
        ("lora_dropout", "hut_dropout"),
        ("use_rslora", "hut_alpha, with scaling = hut_alpha / r"),
        ("use_dora", "scale_shift=True"),
        ("bias", "scale_shift=True"),
        ("init_lora_weights", "init_weights"),
    ],
)
def test_loras_options_name_huts_own(option, own, tmp_path):
    with pytest.raises(TypeError, match=f"HUTConfig got an unexpected .*HUT's own is {own}"):
        HUTConfig(**{option: 1})
    # In a file they are what PEFT takes for options of a later version.
    HUTConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: 1}))
    with pytest.warns(UserWarning, match=f"Unexpected keyword arguments.*{option}"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


LOAD = """
from peft import PeftModel
from torch import nn
PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), "adapter")
"""


def test_a_saved_adapter_says_what_loading_it_takes(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), HUTConfig(r=2, target_modules=["0"]))
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
    needed = "import hut_kernels.integrations.peft"
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["requires"] == needed
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---")  # PEFT's own card is still one
    assert card.count(needed) == 1
    assert "KeyError: 'HUT'" in card
    command = [sys.executable, "-c", LOAD]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stderr.strip().endswith("KeyError: 'HUT'")


@needs_add_adapter
def test_a_model_saved_by_transformers_says_so_too(tmp_path):
    base = llama()
    base.add_adapter(HUTConfig(r=2))
    base.save_pretrained(tmp_path)
    assert "import hut_kernels.integrations.peft" in (tmp_path / "README.md").read_text()


def test_refused_layers_are_named():
    for name, kind in (("emb", "Embedding"), ("conv", "Conv2d")):
        with pytest.raises(ValueError, match=f"{name} .{kind}. is not supported.*nn.Linear"):
            get_peft_model(Net(), config(target_modules=[name]))
    net = Net()
    net.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"attention.out_proj is not supported: nn.Multihead"):
        get_peft_model(net, config(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="first: two_sided needs r"):
        get_peft_model(Net(), config(transform="two_sided", r=30, target_modules=["first"]))
    lora = get_peft_model(Net(), LoraConfig(target_modules=["first"])).base_model.model
    with pytest.raises(ValueError, match="first is not supported: it carries"):
        inject_adapter_in_model(config(target_modules=["first"]), lora, adapter_name="hut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["first", "lsat"]}, r"target_modules: .*\['lsat'\]; near .*last"),
        ({"exclude_modules": ["first", "typo"]}, r"exclude_modules: nothing matches \['typo'\]"),
        ({"modules_to_save": ["conv", "haed"]}, r"modules_to_save: nothing matches \['haed'\]"),
        ({"rank_pattern": {"typo": 3}}, r"rank_pattern .*\['typo'\]"),
        ({"alpha_pattern": {"typo": 3}}, r"alpha_pattern .*\['typo'\]"),
    ],
)  # fmt: skip
def test_unmatched_names_of_a_config_are_warned_of(options, message):
    with pytest.warns(Warning, match=message):
        hut_model(**options)


def test_matched_names_of_a_config_are_not_warned_of(recwarn):
    hut_model(exclude_modules=["first"], modules_to_save=["conv"])
    get_peft_model(bert(), HUTConfig(r=2, task_type="SEQ_CLS", layers_to_transform=[0, 1]))
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    with pytest.warns(UserWarning, match=r"no adapted layer has index \[9\]"):
        get_peft_model(llama(), HUTConfig(r=2, layers_to_transform=[0, 9]))


@pytest.mark.parametrize("targets", [["dt_proj"], ["out_proj"], "all-linear"])
def test_layers_that_mamba_reads_without_a_call_are_refused(targets):
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)
    with pytest.raises(ValueError, match="MambaMixer reads its weight without calling it"):
        get_peft_model(MambaForCausalLM(config), HUTConfig(r=2, target_modules=targets))


def test_the_encoders_fused_inference_does_not_bypass_an_adapter():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2
    )
    model = get_peft_model(encoder, config(target_modules=["linear1", "linear2"]))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        trained = model(x)
        torch.testing.assert_close(model.eval()(x), trained)
        with model.disable_adapter():
            assert (model(x) - trained).abs().max() > 1e-3


class Reads(nn.Module):
    """A module of nobody's list that reads a weight without calling its layer."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, x):
        return self.called(x) @ self.read.weight


@pytest.mark.parametrize("form", [FORMS["residual"], FORMS["direct"], FORMS["paper"]])
def test_saving_names_the_layers_that_training_passed_over(form, tmp_path, recwarn):
    options = {"target_modules": ["called", "read"], "init_weights": True, **form}
    model = get_peft_model(Reads(), config(**options))
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "HUT" in str(w.message)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"1 of 2 HUT layers .*: base_model\.model\.read\. They"):
        model.save_pretrained(tmp_path)


def test_fan_in_fan_out_is_the_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = hut_model()
    net = model.base_model.model
    assert [net.get_submodule(n).fan_in_fan_out for n in LAYERS] == [False, True, False]
    with pytest.warns(UserWarning, match="middle is `Conv1D`. Setting fan_in_fan_out to True"):
        hut_model(fan_in_fan_out=False)
    with pytest.warns(UserWarning, match="first is `Linear`. Setting fan_in_fan_out to False"):
        hut_model(fan_in_fan_out=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_form
def test_save_and_load(form, low_cpu_mem_usage, tmp_path):
    net = Net()
    model, x = get_peft_model(copy.deepcopy(net), config(**form)).eval(), torch.randn(5, 24)
    y = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(net), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded(x), y)
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, is_trainable=True)
    assert all(p.requires_grad for n, p in trained.named_parameters() if "hut_" in n)
    trained.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    trained.set_adapter("second")
    assert torch.equal(trained.eval()(x), y)
    trained.delete_adapter("default")
    assert torch.equal(trained(x), y)
    assert not any("default" in name for name in trained.state_dict())


def test_a_scaling_by_rms_is_loaded_to_the_bit_over_any_base(tmp_path):
    given = config(scale_by_rms=True, hut_alpha=3, alpha_pattern={"last": 5})
    model = get_peft_model(Net(), given).eval()
    assert given.rms == {}  # the user's object is for any model
    sizes = model.peft_config["default"].rms
    assert sizes.keys() == {*LAYERS}
    scalings = {}
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        weight = layer.base_layer.weight.double()
        assert sizes[name] == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-12)
        alpha = 5 if name == "last" else 3
        scalings[name] = alpha / (4 * sizes[name])
        assert layer.scaling["default"] == scalings[name]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    other = get_peft_model(Net(), given)
    for name in LAYERS:
        layer = loaded.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == scalings[name]
        layer.set_scale("default", 0.5)
        layer.unscale_layer()
        assert layer.scaling["default"] == scalings[name]
        layer = other.base_model.model.get_submodule(name)
        assert layer.scaling["default"] != scalings[name]
    # A further adapter is made over W0, whatever is merged into it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        model.add_adapter("second", config(scale_by_rms=True))
    assert model.peft_config["second"].rms == sizes
    for form in (FORMS["direct"], FORMS["two_sided"]):
        with pytest.raises(ValueError, match="scale_by_rms belongs to low_rank with offset 1"):
            HUTConfig(scale_by_rms=True, **form)


def test_parameter_groups_of_a_peft_model():
    model = get_peft_model(
        bert(), HUTConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    found = [{names[parameter].split(".")[-2] for parameter in g["params"]} for g in groups]
    assert found == [{"hut_B"}, {"hut_A", "default"}]
    assert groups[0]["lr"] > 10 * groups[1]["lr"] == 10 * 1e-3
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in names)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_autocast_adapter_dtype(autocast_adapter_dtype):
    model = get_peft_model(
        Net().bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "hut_" in n} == {wanted}
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    assert error(model(x), reference(model, x)) < 4 * limit(torch.bfloat16, 40)


def test_an_adapter_for_each_row_is_refused():
    model, x = hut_model(), torch.randn(2, 24)
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match="no different adapters in one batch"):
        model(x, adapter_names=["default", "second"])
    assert torch.equal(model(x, adapter_names=None), model(x))
    model = get_peft_model(llama(), HUTConfig(r=2)).eval()
    with pytest.raises(ValueError, match="no different adapters in one batch"):
        model.generate(torch.tensor([[1], [1]]), adapter_names=["default", "__base__"])


class Tied(nn.Module):
    """An embedding and a head of one weight, and a twin of the head."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.twin = nn.Linear(4, 8, bias=False)
        self.head.weight = self.twin.weight = self.emb.weight

    def forward(self, tokens):
        x = self.emb(tokens)
        return self.head(x) - 2 * self.twin(x)


TOKENS = torch.tensor([[1, 5, 7], [0, 2, 3]])


@pytest.mark.parametrize("targets", [["head"], ["head", "twin"]])
def test_merging_unties_a_shared_weight_and_unmerging_ties_it_again(targets):
    net = Tied()
    W0 = net.emb.weight
    values = W0.detach().clone()
    model = get_peft_model(net, config(r=2, target_modules=targets)).eval()
    y = model(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(W0, values)
    model.unmerge_adapter()
    assert torch.equal(model(TOKENS), y)
    assert net.head.base_layer.weight is W0
    assert net.twin.weight is W0
    plain = model.merge_and_unload()
    assert plain.emb.weight is W0
    assert plain.head.weight is not W0
    torch.testing.assert_close(plain(TOKENS), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],  # the same in every process: the suite is dealt to several
)
def test_a_copy_of_a_merged_model_ties_its_own_weights(through):
    model = get_peft_model(Tied(), config(r=2, target_modules=["head"])).eval()
    y = model(TOKENS)
    model.merge_adapter()
    model.base_model._forward_hooks.clear()
    twin = through(model.base_model.model)
    for module in twin.modules():
        if isinstance(module, HUTLayer):
            module.unmerge()
    assert twin.head.base_layer.weight is twin.emb.weight
    assert twin.emb.weight is not model.base_model.model.emb.weight
    assert torch.equal(twin(TOKENS), y)


def test_a_tied_model_of_transformers_is_saved_merged(tmp_path):
    model = get_peft_model(
        llama(tie_word_embeddings=True), config(target_modules=["lm_head", "q_proj"])
    ).eval()
    tokens = torch.randint(3, 64, (2, 5))
    logits = model(tokens).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def pruned(base):
    prune.l1_unstructured(base, "weight", 0.5)


def parametrized(base):
    parametrize.register_parametrization(base, "weight", nn.Tanh())


@pytest.mark.parametrize("own", [pruned, parametrized, nn.utils.spectral_norm])
def test_a_weight_that_is_made_from_others_is_not_merged(own):
    model, x = hut_model(), torch.randn(5, 24)
    own(model.base_model.model.first.base_layer)
    y = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HUTBackendError, match=r"weight of .*Linear is not a parameter"):
            merge()
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_model_is_refused_and_merges_by_pefts_own_onloading(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = hut_model(), torch.randn(5, 24)
    y, cpu = model(x), torch.device("cpu")
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    with pytest.raises(HUTBackendError, match="offload"):
        model(x)
    for use in (layers(model)[0].merge, lambda: layers(model)[0].get_delta_weight("default")):
        with pytest.raises(HUTBackendError, match="offload"):
            use()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with pytest.raises(HUTBackendError, match="offload"):
        model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)


def test_disable_and_set_adapter():
    net, x = Net(), torch.randn(5, 24)
    model = get_peft_model(copy.deepcopy(net), config()).eval()
    y = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), net(x))
    assert torch.equal(model(x), y)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), net(x))
    assert torch.equal(model.unload()(x), net(x))


def test_only_the_adapter_is_trained():
    model = get_peft_model(Net(), config(modules_to_save=["conv"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("hut_" in name or "modules_to_save" in name for name in trained)
    assert len(trained) == 6 + 2
    model.add_adapter("second", config())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)


def test_merging_a_shift_gives_a_bias_and_unmerging_takes_it():
    model, x = hut_model(transform="two_sided", scale_shift=True), torch.randn(5, 24)
    last = model.base_model.model.last
    y = model(x)
    assert last.base_layer.bias is None
    with pytest.warns(UserWarning, match="of 12 outputs has no bias, and gets one by"):
        model.merge_adapter()
    assert last.base_layer.bias.shape == (12,)
    model.unmerge_adapter()
    assert last.base_layer.bias is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert type(merged.last) is nn.Linear
    assert error(merged(x), y.detach().double()) < 4e-6


# What LoRA, LoHa and HiRA layers have for themselves only.
OWN = {"lora_variants", "reset_lora_parameters", "resolve_lora_variant", "reset_hira_parameters"}
OWN |= {f"{name}_init" for name in ("corda", "loftq", "lora_ga", "mica", "olora", "orthogonal")}
OWN |= {"pissa_init", "create_adapter_parameters"}
OWN |= {"reset_adapter_parameters", "reset_adapter_parameters_random"}


@pytest.mark.parametrize("kind", [lora.Linear, loha.Linear, hira.Linear])
def test_a_layer_has_what_layers_of_other_methods_are_asked_for(kind):
    names = {name for name in dir(kind) if not name.startswith("_")} - OWN
    assert names <= {*dir(Linear)}
    with disable_input_dtype_casting(hut_model()):
        pass


@pytest.mark.parametrize("form", [FORMS["residual"], FORMS["alpha"], FORMS["split"]])
def test_an_adapter_is_scaled_exactly(form):
    model, x = hut_model(**form), torch.randn(5, 24)
    layer, h = layers(model)[0], torch.randn(5, 24)
    y, base = layer(h).detach(), layer.base_layer(h)
    before = dict(layer.scaling)
    for scale in (0, 0.5, 2.0):
        layer.set_scale("default", scale)
        assert error(layer(h) - base, (scale * (y - base)).double()) < 1e-4 if scale else True
        assert scale or torch.equal(layer(h), base)
    layer.set_scale("default", 1)
    layer.set_scale("not here", 3)
    assert layer.scaling == before
    layer.scale_layer(4)
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == 2 * before["default"]
    layer.unscale_layer(2)
    assert layer.scaling == before
    layer.scale_layer(3)
    layer.unscale_layer()
    assert layer.scaling == before
    layer.scale_layer(2)
    scaled = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [FORMS["direct"], FORMS["two_sided"], FORMS["shifted"]])
def test_forms_without_a_scale_refuse_all_but_1(form):
    layer = layers(hut_model(**form))[0]
    before = dict(layer.scaling)
    for scale in (lambda: layer.set_scale("default", 0.5), lambda: layer.scale_layer(2)):
        with pytest.raises(ValueError, match="adapter 'default' has no scale: only the update of"):
            scale()
    layer.set_scale("default", 1.0)
    layer.scale_layer(1)
    layer.unscale_layer()
    assert layer.scaling == before
    with pytest.raises(TypeError, match="scale must be a real number"):
        layer.set_scale("default", torch.tensor(1.0))


def test_diffusers_scales_fuses_and_removes_an_adapter():
    diffusers = pytest.importorskip("diffusers", reason="diffusers cannot be imported")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip
    given = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 3, 8)

    @torch.no_grad()
    def run(**options):
        return unet(*given, **options).sample

    base = run()
    unet.add_adapter(HUTConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False))
    y = run()
    assert (y - base).abs().max() > 1e-3
    unet.set_adapters("default", weights=0.0)
    assert torch.equal(run(), base)
    unet.set_adapters("default", weights=1.0)
    assert torch.equal(run(), y)
    assert torch.equal(run(cross_attention_kwargs={"scale": 0.0}), base)
    half = run(cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(run(), y)
    unet.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(run(), half, rtol=1e-4, atol=1e-4)
    unet.unfuse_lora()
    unet.unload_lora()
    assert torch.equal(run(), base)


def test_layerwise_casting_is_refused_in_words():
    model, x = hut_model(), torch.randn(5, 24)
    base = layers(model)[0].base_layer
    base.register_forward_pre_hook(lambda module, _: module.to(torch.float32) and None)
    base.register_forward_hook(lambda module, *_: module.to(torch.float8_e4m3fn) and None)
    with pytest.raises(HUTBackendError, match=r"kept in torch\.float8_e4m3fn between its calls"):
        model(x)


def test_weighted_adapters_are_refused_in_words():
    model = hut_model()
    with pytest.raises(NotImplementedError, match="set_scale"):
        model.add_weighted_adapter(["default"], [0.5], "half")


def test_delta_weight_is_what_merging_adds():
    model = hut_model(scale_shift=True)
    for layer in layers(model):
        before = layer.base_layer.weight.clone()
        delta = layer.get_delta_weight("default")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge()
        assert error(layer.base_layer.weight - before, delta.double()) < 1e-5
        assert torch.equal(layer.get_delta_weight("default"), delta)


def test_repr_and_copies():
    model, x = hut_model(), torch.randn(5, 24)
    assert repr(model.base_model.model.first).startswith("hut.Linear(")
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model.base_model.model))(x), y)


# transformers' doors.


def test_default_targets_and_all_linear():
    def targets(model, **options):
        adapted = get_peft_model(model, HUTConfig(**options))
        return {n.rpartition(".")[2] for n, m in adapted.named_modules() if isinstance(m, Linear)}

    assert targets(llama()) == {"q_proj", "v_proj"}
    assert targets(gpt2()) == {"c_attn"}
    assert targets(bert()) == {"query", "value"}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert targets(llama(), target_modules="all-linear") == every
    left = {"q_proj", "v_proj"}
    assert targets(llama(), target_modules="all-linear", exclude_modules=list(every - left)) == left


def test_layers_to_transform_zero_is_an_index():
    model = get_peft_model(llama(), HUTConfig(layers_to_transform=0, layers_pattern="layers"))
    names = [n for n, m in model.named_modules() if isinstance(m, Linear)]
    assert len(names) == 2
    assert all(".layers.0." in name for name in names)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_without_a_weight_survives_merging(task):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(32, 3)

        def forward(self, x):
            return self.dense(x)

    model = bert()
    model.classifier = Head()
    adapted = get_peft_model(model, HUTConfig(task_type=task, init_weights=False)).eval()
    ids = torch.randint(3, 60, (2, 7))
    y = adapted(ids).logits
    merged = adapted.merge_and_unload()
    assert type(merged.classifier) is Head
    assert error(merged(ids).logits, y.detach().double()) < 1e-5


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate_with_an_unmerged_adapter(make):
    model = get_peft_model(make(), HUTConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    ids = torch.randint(3, 60, (2, 5))
    tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=6, do_sample=False), tokens)


def test_auto_peft_model(tmp_path):
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, HUTConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    ids = torch.randint(3, 60, (2, 5))
    y = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, y)
    assert isinstance(loaded.peft_config["default"], HUTConfig)


@needs_add_adapter
def test_transformers_own_adapters(tmp_path):
    base = llama().eval()
    ids = torch.randint(3, 60, (2, 5))
    plain = base(ids).logits
    model = copy.deepcopy(base)
    model.add_adapter(HUTConfig(init_weights=False), adapter_name="one")
    y = model(ids).logits
    assert not torch.equal(y, plain)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path / "one")
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path / "one"), adapter_name="two")
    assert torch.equal(again(ids).logits, y)
    again.add_adapter(HUTConfig(init_weights=False), adapter_name="three")
    again.set_adapter("three")
    assert not torch.equal(again(ids).logits, y)
    again.set_adapter("two")
    assert torch.equal(again(ids).logits, y)
    again.delete_adapter("three")
    assert again.active_adapters() == ["two"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = get_peft_model(llama(), HUTConfig(init_weights=False, task_type="CAUSAL_LM")).train()
    ids = torch.randint(3, 60, (2, 5))

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert all(torch.allclose(checkpointed[name], grad) for name, grad in plain.items())
    assert any(grad.abs().sum() > 0 for grad in plain.values())


def test_trainer_with_checkpoint_and_resume(tmp_path):
    ids = torch.randint(3, 60, (16, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    torch.manual_seed(0)
    base = llama()

    def trainer(folder):
        torch.manual_seed(0)
        model = get_peft_model(
            copy.deepcopy(base), HUTConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["norm"])
        )
        options = TrainingArguments(
            str(tmp_path / folder), max_steps=6, save_steps=3, learning_rate=3e-2, use_cpu=True,
            per_device_train_batch_size=4, report_to=[], disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        return Trainer(model, options, train_dataset=data)

    straight = trainer("straight")
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    wanted = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.allclose(parameter, wanted[name], atol=1e-6), name
        assert parameter.abs().sum() > 0, name
