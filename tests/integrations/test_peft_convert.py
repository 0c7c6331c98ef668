"""Adapters of HiRA and adapter files made PEFT's of HUT, and back: the same factors."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model

from hut_kernels import adapter_options, inject, load_adapter, save_adapter
from hut_kernels.integrations.peft import (
    HUTConfig,
    from_hira,
    from_native,
    to_hira,
    to_native,
)

from ..references import error
from .peft_models import LAYERS, Net, bert, llama


@pytest.fixture
def net():
    return Net()


def saved(net, config, folder):
    """The outputs of `net` under a random adapter that is saved in `folder`."""
    model = get_peft_model(copy.deepcopy(net), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "_B" in name:
                parameter.mul_(0.3)
    model.save_pretrained(folder)
    return model


def hira_config(**options):
    return HiraConfig(**({"r": 4, "target_modules": LAYERS, "init_weights": False} | options))


def test_same_numbers(net, tmp_path):
    model, x = saved(net, hira_config(), tmp_path), torch.randn(5, 24)
    adapter = from_hira(tmp_path)
    factors = {
        name.replace(".hira_", ".hut_").replace(".default", ""): value
        for name, value in model.state_dict().items()
        if ".hira_" in name
    }
    assert adapter.state_dict.keys() == factors.keys()
    assert all(torch.equal(adapter.state_dict[name], value) for name, value in factors.items())
    assert isinstance(adapter.config, HUTConfig)
    assert (adapter.config.r, adapter.config.hut_alpha) == (4, None)
    converted = adapter.apply(copy.deepcopy(net)).eval()
    layers = [converted.base_model.model.get_submodule(name) for name in LAYERS]
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    assert (converted(x) - model(x)).abs().max() == 0
    merged = from_hira(tmp_path, precision="merged").apply(copy.deepcopy(net)).eval()
    assert error(merged(x), model(x).detach().double()) < 2e-6


def test_there_and_back(net, tmp_path):
    model, x = saved(net, hira_config(hira_dropout=0.1), tmp_path / "hira"), torch.randn(5, 24)
    adapter = from_hira(tmp_path / "hira")
    assert adapter.config.hut_dropout == 0.1
    adapter.save_pretrained(tmp_path / "hut")
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "hut")
    assert torch.equal(loaded(x), model(x))
    to_hira(tmp_path / "hut").save_pretrained(tmp_path / "back")
    back = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "back")
    assert isinstance(back.peft_config["default"], HiraConfig)
    assert back.peft_config["default"].hira_dropout == 0.1
    assert torch.equal(back(x), model(x))


def test_scaling_is_folded_into_B(net, tmp_path):
    config = HUTConfig(
        r=4, hut_alpha=6, rank_pattern={"middle": 2}, alpha_pattern={"last": 2, "fir": 99},
        target_modules=LAYERS, init_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "fir" matches no layer, and newer versions say so
        model = saved(net, config, tmp_path)
    x = torch.randn(5, 24)
    adapter = to_hira(tmp_path)
    for name, scaling in (("first", 1.5), ("middle", 3.0), ("last", 0.5)):
        B = model.base_model.model.get_submodule(name).hut_B["default"]
        converted = adapter.state_dict[f"base_model.model.{name}.hira_B"]
        assert torch.equal(converted[:, : B.shape[1]], B * scaling)
        assert converted.shape[1] == 4
    converted = adapter.apply(copy.deepcopy(net)).eval()
    assert error(converted(x), model(x).detach().double()) < 2e-6


def test_a_scaling_by_rms_is_folded_into_B(net, tmp_path):
    config = HUTConfig(r=4, target_modules=LAYERS, init_weights=False, scale_by_rms=True)
    model, x = saved(net, config, tmp_path), torch.randn(5, 24)
    converted = to_hira(tmp_path).apply(copy.deepcopy(net)).eval()
    assert error(converted(x), model(x).detach().double()) < 4e-6


def test_ranks_are_those_of_the_tensors(net, tmp_path):
    """PEFT 0.21 makes a first adapter's layers with `r` whatever its rank_pattern says."""
    saved(net, hira_config(rank_pattern={"middle": 2}), tmp_path / "one")
    assert from_hira(tmp_path / "one").config.rank_pattern == {}
    model = get_peft_model(copy.deepcopy(net), hira_config())
    model.add_adapter("other", hira_config(rank_pattern={"middle": 2}))
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "two", selected_adapters=["other"])
    adapter, x = from_hira(tmp_path / "two" / "other"), torch.randn(5, 24)
    assert (adapter.config.r, adapter.config.rank_pattern) == (4, {"middle": 2})
    assert torch.equal(adapter.apply(copy.deepcopy(net)).eval()(x), model.eval()(x))
    adapter.save_pretrained(tmp_path / "hut")
    back = to_hira(tmp_path / "hut").apply(copy.deepcopy(net)).eval()
    assert error(back(x), model(x).detach().double()) < 2e-6


def test_used_together_with_other_adapters(net, tmp_path):
    model, x = saved(net, hira_config(), tmp_path), torch.randn(5, 24)
    adapted = get_peft_model(copy.deepcopy(net), HUTConfig(target_modules=["first"]))
    assert from_hira(tmp_path).apply(adapted, "converted") is adapted
    adapted.set_adapter("converted")
    assert torch.equal(adapted.eval()(x), model(x))


def test_trained_further(net, tmp_path):
    hira, x = saved(net, hira_config(), tmp_path), torch.randn(5, 24)
    adapter = from_hira(tmp_path)
    fixed = adapter.apply(copy.deepcopy(net))
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    model = adapter.apply(copy.deepcopy(net), is_trainable=True)
    for one in (hira, model):
        one(x).square().sum().backward()
    for name in LAYERS:
        (theirs, ours) = (one.base_model.model.get_submodule(name) for one in (hira, model))
        for factor in "AB":
            wanted = getattr(theirs, f"hira_{factor}")["default"].grad
            grad = getattr(ours, f"hut_{factor}")["default"].grad
            assert error(grad, wanted.double()) < 5e-6


def test_modules_to_save_and_transformers(tmp_path):
    base = bert().eval()
    config = HiraConfig(r=4, init_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    ids = torch.randint(3, 60, (2, 7))
    model.save_pretrained(tmp_path)
    converted = from_hira(tmp_path).apply(copy.deepcopy(base)).eval()
    assert torch.equal(converted(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("target", "what"), [("emb", "emb is an embedding"), ("conv", "conv is a convolution")]
)
def test_embeddings_and_convolutions_are_refused_by_name(net, target, what, tmp_path):
    saved(net, hira_config(target_modules=["first", target]), tmp_path)
    with pytest.raises(ValueError, match=f"^{what}, which HUT does not adapt"):
        from_hira(tmp_path)


@pytest.mark.parametrize(
    "form", [{"transform": "two_sided"}, {"offset": 0}, {"scale_shift": True}], ids=str
)
def test_layers_that_hira_cannot_express_are_refused(net, form, tmp_path):
    saved(net, HUTConfig(r=4, target_modules=LAYERS, **form), tmp_path)
    with pytest.raises(ValueError, match="HiRA is low_rank with offset 1 and without scale"):
        to_hira(tmp_path)


def test_other_adapters_are_refused(net, tmp_path):
    saved(net, LoraConfig(target_modules=["first"]), tmp_path)
    for convert in (from_hira, to_hira):
        with pytest.raises(ValueError, match=r"is not an adapter of .*peft_type=LORA"):
            convert(tmp_path)


def test_a_model_that_does_not_fit(net, tmp_path):
    saved(net, hira_config(), tmp_path)
    adapter = from_hira(tmp_path)
    del adapter.state_dict["base_model.model.first.hut_A"]
    with pytest.raises(ValueError, match=r"missing \['base_model.model.first.hut_A.default'\]"):
        adapter.apply(net)
    assert type(net.first) is torch.nn.Linear
    adapter.state_dict["base_model.model.nowhere.hut_A"] = torch.zeros(2, 2)
    model = get_peft_model(net, HUTConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r"without a place in the model .*nowhere"):
        adapter.apply(model, "second")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="not found"):
        adapter.apply(llama())


NATIVE = {
    "residual": {"r": 3},
    "by rms": {"r": 3, "alpha": 5, "scale_by_rms": True},
    "alpha": {"r": 3, "alpha": 5, "dropout": 0.25, "precision": "split"},
    "direct": {"r": 2, "offset": 0, "factor_dtype": torch.bfloat16},
    "paper": {"r": 4, "transform": "two_sided", "scale_shift": True},
}


@pytest.mark.parametrize("options", NATIVE.values(), ids=NATIVE)
def test_adapter_files_become_pefts_and_files_again(net, options, tmp_path):
    native, x = copy.deepcopy(net), torch.randn(5, 24)
    inject(native, LAYERS, **options)
    with torch.no_grad():
        for parameter in native.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    save_adapter(native, tmp_path / "file")
    from_native(tmp_path / "file").save_pretrained(tmp_path / "peft")
    adapted = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "peft").eval()
    y = native.eval()(x)
    assert torch.equal(adapted(x), y)
    adapted.save_pretrained(tmp_path / "again")
    to_native(tmp_path / "again", tmp_path / "back")
    # PEFT holds factors in the base layer's type, or in float32.
    expected = adapter_options(tmp_path / "file") | {"factor_dtype": torch.float32}
    assert adapter_options(tmp_path / "back") == expected
    loaded = copy.deepcopy(net)
    inject(loaded, LAYERS, **adapter_options(tmp_path / "back"))
    load_adapter(loaded, tmp_path / "back")
    assert torch.equal(loaded.eval()(x), y)


def test_layers_of_several_ranks_become_patterns(net, tmp_path):
    inject(net, ["first"], r=3, alpha=6)
    inject(net, ["last"], r=5)
    save_adapter(net, tmp_path / "file")
    config = from_native(tmp_path / "file").config
    assert (config.r, config.rank_pattern) == (5, {"^first": 3})
    to_native_of = tmp_path / "peft"
    from_native(tmp_path / "file").save_pretrained(to_native_of)
    to_native(to_native_of, tmp_path / "back")
    load_adapter(net, tmp_path / "back")
    inject(net, ["middle"], offset=0)
    save_adapter(net, tmp_path / "file")
    with pytest.raises(ValueError, match="one HUTConfig has one offset"):
        from_native(tmp_path / "file")


def test_an_adapter_at_the_wrong_door_is_sent_to_the_right_one(net, tmp_path):
    saved(net, LoraConfig(target_modules=["first"]), tmp_path / "lora")
    saved(net, HUTConfig(target_modules=["first"]), tmp_path / "hut")
    saved(net, hira_config(target_modules=["first"]), tmp_path / "hira")
    inject(net, ["first"])
    save_adapter(net, tmp_path / "file")
    weights = "adapter_model.safetensors"
    for use in (adapter_options, lambda file: load_adapter(net, file)):
        with pytest.raises(ValueError, match="it is a LoRA adapter, which adds to weights"):
            use(tmp_path / "lora" / weights)
        for folder in ("hut", "hira"):
            for given in (tmp_path / folder, tmp_path / folder / weights):
                with pytest.raises(ValueError, match=r"peft\.to_native\(directory, file\) makes"):
                    use(given)
    for convert in (from_hira, to_hira, lambda file: to_native(file, tmp_path / "x")):
        with pytest.raises(ValueError, match=r"from_native\(file\) makes one"):
            convert(tmp_path / "file")
    with pytest.raises(ValueError, match="to_hira and to_native take it"):
        from_hira(tmp_path / "hut")
    with pytest.raises(ValueError, match="from_hira takes it"):
        to_native(tmp_path / "hira", tmp_path / "x")
    with pytest.raises(ValueError, match="it cannot be converted"):
        to_native(tmp_path / "lora", tmp_path / "x")


def test_modules_trained_as_a_whole_have_no_place_in_an_adapter_file(net, tmp_path):
    saved(net, HUTConfig(target_modules=["first"], modules_to_save=["conv"]), tmp_path / "peft")
    with pytest.raises(ValueError, match=r"holds base_model\.model\.conv\."):
        to_native(tmp_path / "peft", tmp_path / "file")
