"""Adapter files: what they hold, whom they fit, and what is refused without a change."""

import copy
import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hut_kernels.adapter_file import adapter_options, adapter_state_dict, load_adapter, save_adapter
from hut_kernels.adapters import inject, merge
from hut_kernels.errors import HUTBackendError
from hut_kernels.nn import HUTLinear

from .adapted_models import (
    NAMES,
    TARGETS,
    TOKENS,
    Model,
    assert_unchanged,
    every_option,
    hut_names,
    snapshot,
    trained,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return Model()


@every_option
def test_state_dict_has_the_factors_of_every_layer(model, options):
    inject(model, TARGETS, **options)
    state = adapter_state_dict(model)
    keys = ["hut_A", "hut_B"] + (["gamma", "beta"] if options.get("scale_shift") else [])
    assert list(state) == [f"{name}.{key}" for name in hut_names(model) for key in keys]
    for name, value in state.items():
        assert not value.requires_grad
        assert value.data_ptr() == model.get_parameter(name).data_ptr()


@every_option
def test_a_saved_adapter_is_loaded_bit_for_bit(model, options, tmp_path):
    fresh = copy.deepcopy(model)
    inject(model, TARGETS, **options)
    trained(model).eval()
    save_adapter(model, tmp_path / "adapter.safetensors")
    assert inject(fresh, TARGETS, **adapter_options(tmp_path / "adapter.safetensors")) == NAMES
    load_adapter(fresh.eval(), str(tmp_path / "adapter.safetensors"))
    state = adapter_state_dict(model)
    assert list(adapter_state_dict(fresh)) == list(state)
    for name, value in adapter_state_dict(fresh).items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert repr(fresh) == repr(model)


def test_adapter_options_are_those_of_inject(model, tmp_path):
    inject(model, TARGETS, 3, alpha=6, dropout=0.25, scale_shift=True, precision="split")
    save_adapter(model, tmp_path / "file")
    assert adapter_options(tmp_path / "file") == {
        "r": 3,
        "alpha": 6,
        "transform": "low_rank",
        "offset": 1.0,
        "dropout": 0.25,
        "scale_shift": True,
        "precision": "split",
        "factor_dtype": torch.float32,
    }


def test_the_file_is_safetensors_with_a_version(model, tmp_path):
    inject(model, TARGETS, r=2)
    save_adapter(model, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata()["format_version"] == "1"
        assert set(file.keys()) == set(adapter_state_dict(model))


def test_a_hut_layer_by_itself_saves_loads_and_merges(tmp_path):
    layer = trained(HUTLinear(6, 4, 2))
    save_adapter(layer, tmp_path / "file")
    other = HUTLinear(6, 4, **adapter_options(tmp_path / "file"))
    load_adapter(other, tmp_path / "file")
    assert list(adapter_state_dict(layer)) == ["hut_A", "hut_B"]
    assert torch.equal(other.hut_B, layer.hut_B)
    assert type(merge(layer)) is nn.Linear


def test_tied_and_strided_factors_can_be_saved(tmp_path):
    model = nn.Sequential(HUTLinear(4, 4, 2), HUTLinear(4, 4, 2))
    model[0].hut_A = model[1].hut_A = nn.Parameter(torch.randn(4, 2).t())
    model[0].hut_B = model[1].hut_B = nn.Parameter(torch.randn(4, 2))
    save_adapter(model, tmp_path / "file")
    saved = load_file(tmp_path / "file")
    for name, factor in adapter_state_dict(model).items():
        assert torch.equal(saved[name], factor)


def test_compiled_and_plain_models_share_files(model, tmp_path):
    inject(model, ["q_proj"], r=2)
    save_adapter(trained(model), tmp_path / "file")
    wanted = adapter_state_dict(model)
    model.layers[0] = torch.compile(model.layers[0])
    compiled = torch.compile(model)
    assert list(adapter_state_dict(compiled)) == list(wanted)
    load_adapter(compiled, tmp_path / "file")


class Averaged(torch.optim.swa_utils.AveragedModel):
    pass


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "a subclass": Averaged,
    "compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "of a compiled model": lambda model: nn.DataParallel(torch.compile(model)),
    "twice": lambda model: Averaged(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_and_plain_models_share_files(model, wrap, tmp_path):
    inject(model, ["q_proj"], r=2)
    plain = copy.deepcopy(trained(model))
    wrapped = wrap(model)
    assert list(adapter_state_dict(wrapped)) == list(adapter_state_dict(plain))
    save_adapter(wrapped, tmp_path / "file")
    load_adapter(plain, tmp_path / "file")
    load_adapter(wrapped, tmp_path / "file")


def test_checkpointed_layers_keep_their_names(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inject(model, ["q_proj"], r=2)
    wanted = list(adapter_state_dict(model))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    assert list(adapter_state_dict(model)) == wanted


def test_names_that_are_only_like_a_wrappers_are_kept():
    named = {"module": nn.Linear(4, 4), "my_orig_mod": nn.Sequential(nn.Linear(4, 4))}
    model = nn.ModuleDict(named)
    inject(model, ["module", "0"], r=2)
    expected = ["module.hut_A", "module.hut_B", "my_orig_mod.0.hut_A", "my_orig_mod.0.hut_B"]
    assert list(adapter_state_dict(model)) == expected
    assert list(adapter_state_dict(nn.DataParallel(model))) == expected


def test_options_of_other_types_are_saved_and_loaded(tmp_path):
    """NumPy's numbers and fractions: what a sweep or a parsed configuration has at hand."""
    given = {"alpha": np.float32(0.5), "dropout": np.float64(0.25), "offset": np.int64(1)}
    layer = HUTLinear(8, 6, r=np.int64(2), **given)
    assert (layer.r, layer.alpha, layer.dropout, layer.offset) == (2, 0.5, 0.25, 1.0)
    save_adapter(layer, tmp_path / "file")
    load_adapter(HUTLinear(8, 6, **adapter_options(tmp_path / "file")), tmp_path / "file")
    assert HUTLinear(8, 6, alpha=Fraction(1, 2)).alpha == 0.5
    assert type(HUTLinear(8, 6, alpha=np.int32(4)).alpha) is int


def test_layers_of_different_options_save_and_load_but_have_no_common_options(model, tmp_path):
    fresh = copy.deepcopy(model)
    for each in (model, fresh):
        inject(each, ["q_proj"], r=2)
        inject(each, ["v_proj"], r=3, offset=0)
    save_adapter(trained(model), tmp_path / "file")
    with pytest.raises(ValueError, match="differ in their options"):
        adapter_options(tmp_path / "file")
    load_adapter(fresh, tmp_path / "file")
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_a_failed_save_leaves_the_old_file_and_no_other(model, tmp_path, monkeypatch):
    inject(model, TARGETS, r=2)
    save_adapter(model, tmp_path / "file")
    old = (tmp_path / "file").read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(trained(model), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == old


@pytest.mark.parametrize("use", [adapter_state_dict, lambda m: save_adapter(m, os.devnull)])
def test_a_model_without_hut_layers_has_no_adapter(model, use):
    with pytest.raises(ValueError, match="no HUT layer"):
        use(model)


# Files that do not fit


def rewrite(path, change_tensors=None, change_metadata=None):
    """The adapter file again, with its tensors or its metadata changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    (change_tensors or (lambda _: None))(tensors)
    (change_metadata or (lambda _: None))(metadata)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)


def set_option(key, value):
    def change(metadata):
        layers = json.loads(metadata["layers"])
        layers[NAMES[-1]][key] = value
        metadata["layers"] = json.dumps(layers)

    return change


LAST = f"{NAMES[-1]}.hut_B"
DAMAGE = {
    "truncated": ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-4])),
    "truncated header": ("truncated", lambda path: path.write_bytes(path.read_bytes()[:20])),
    "empty": ("truncated", lambda path: path.write_bytes(b"")),
    "pickle": ("not a safetensors", lambda path: torch.save({"hut_A": torch.zeros(2)}, path)),
    "foreign": (
        "not a hut_kernels adapter",
        lambda path: save_file({"lora_A": torch.zeros(2)}, path),
    ),
    "foreign metadata": (
        "format='pt'",
        lambda path: save_file({"a": torch.zeros(2)}, path, {"format": "pt"}),
    ),
    "version": (
        "format version 2",
        lambda path: rewrite(path, None, lambda m: m.update(format_version="2")),
    ),
    "no layers": ("layer options", lambda path: rewrite(path, None, lambda m: m.pop("layers"))),
    "layers []": (
        "layer options",
        lambda path: rewrite(path, None, lambda m: m.update(layers="[]")),
    ),
    "layers [1]": (
        "layer options",
        lambda path: rewrite(path, None, lambda m: m.update(layers="[1]")),
    ),
    "layers {}": (
        "layer options",
        lambda path: rewrite(path, None, lambda m: m.update(layers="{}")),
    ),
    "layers cut": (
        "layer options",
        lambda path: rewrite(path, None, lambda m: m.update(layers='{"a": {')),
    ),
    "unknown option": ("layer options", lambda path: rewrite(path, None, set_option("blocks", 2))),
    "unknown type": (
        "layer options",
        lambda path: rewrite(path, None, set_option("factor_dtype", "int4")),
    ),
    "unhashable type": (
        "layer options",
        lambda path: rewrite(path, None, set_option("factor_dtype", [])),
    ),
    "other rank": ("has r=2, but the file 3", lambda path: rewrite(path, None, set_option("r", 3))),
    "other transform": (
        "the file 'two_sided'",
        lambda path: rewrite(path, None, set_option("transform", "two_sided")),
    ),
    "other alpha": (
        "has alpha=2, but the file 5",
        lambda path: rewrite(path, None, set_option("alpha", 5)),
    ),
    "tensor missing": (
        "only in the model .*hut_B",
        lambda path: rewrite(path, lambda t: t.pop(LAST)),
    ),
    "tensor too many": (
        "only in the file .*extra",
        lambda path: rewrite(path, lambda t: t.update(extra=torch.zeros(1))),
    ),
    "shape": (
        "hut_B has shape",
        lambda path: rewrite(path, lambda t: t.update({LAST: t[LAST][:-1]})),
    ),
    "transposed": (
        "hut_B has shape",
        lambda path: rewrite(path, lambda t: t.update({LAST: t[LAST].t()})),
    ),
    "type": ("float16", lambda path: rewrite(path, lambda t: t.update({LAST: t[LAST].half()}))),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_leaves_the_model_unchanged(model, message, damage, tmp_path):
    path = tmp_path / "file"
    inject(model, TARGETS, r=2)
    save_adapter(model, path)
    damage(path)
    trained(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["truncated", "pickle", "foreign", "version", "layers cut"])
def test_options_of_a_damaged_file_are_refused(model, name, tmp_path):
    inject(model, TARGETS, r=2)
    save_adapter(model, tmp_path / "file")
    DAMAGE[name][1](tmp_path / "file")
    with pytest.raises(ValueError, match=str(tmp_path / "file")):
        adapter_options(tmp_path / "file")


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (TARGETS, {"r": 4}, r"layers\.0\.q_proj has r=4, but the file 2"),
        (TARGETS, {"r": 2, "alpha": 4}, "alpha=4, but the file 2"),
        (TARGETS, {"r": 2, "transform": "two_sided"}, "but the file"),
        (TARGETS, {"r": 2, "offset": 0}, "but the file"),
        (TARGETS, {"r": 2, "scale_shift": True}, "scale_shift=True, but the file False"),
        (TARGETS, {"r": 2, "factor_dtype": torch.bfloat16}, "factor_dtype='bfloat16'"),
        (["q_proj"], {"r": 2}, r"only in the file \['layers.0.c_fc'"),
        ([*TARGETS, "lm_head"], {"r": 2}, r"only in the model \['lm_head'\]"),
    ],
)
def test_a_file_for_another_model_leaves_this_one_unchanged(
    model, targets, options, message, tmp_path
):
    other = copy.deepcopy(model)
    inject(other, TARGETS, r=2)
    save_adapter(other, tmp_path / "file")
    inject(model, targets, **options)
    before = snapshot(trained(model))
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "file")
    assert_unchanged(model, before)


def test_dropout_precision_and_fused_may_differ(model, tmp_path):
    other = copy.deepcopy(model)
    inject(other, TARGETS, r=2, dropout=0.5, precision="split")
    save_adapter(trained(other), tmp_path / "file")
    inject(model, TARGETS, r=2, fused=False)
    load_adapter(model, tmp_path / "file")
    assert torch.equal(model.layers[1].q_proj.hut_A, other.layers[1].q_proj.hut_A)
    assert model.layers[1].q_proj.dropout == 0


def test_a_scaling_by_rms_is_loaded_to_the_bit_over_any_base(model, tmp_path):
    other = Model()
    inject(model, TARGETS, r=2, alpha=3, scale_by_rms=True)
    save_adapter(trained(model), tmp_path / "file")
    options = adapter_options(tmp_path / "file")
    assert options["scale_by_rms"] is True
    inject(other, TARGETS, **options)
    scalings = [model.get_submodule(name).scaling for name in NAMES]
    assert [other.get_submodule(name).scaling for name in NAMES] != scalings
    load_adapter(other, tmp_path / "file")
    assert [other.get_submodule(name).scaling for name in NAMES] == scalings
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(TOKENS), model.eval()(TOKENS))
    plain = Model()
    inject(plain, TARGETS, r=2, alpha=3)
    before = snapshot(plain)
    with pytest.raises(ValueError, match="has scale_by_rms=False, but the file True"):
        load_adapter(plain, tmp_path / "file")
    assert_unchanged(plain, before)
    for rms in (0.0, -1.0, float("nan"), 1, True, "1"):
        rewrite(tmp_path / "file", change_metadata=set_option("rms", rms))
        with pytest.raises(ValueError, match="has no readable layer options"):
            load_adapter(other, tmp_path / "file")


def test_a_wider_model_is_refused(tmp_path):
    narrow, wide = Model(8), Model(16)
    for model in (narrow, wide):
        inject(model, TARGETS, r=2)
    save_adapter(narrow, tmp_path / "file")
    before = snapshot(wide)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj\.hut_A has shape \(2, 16\)"):
        load_adapter(wide, tmp_path / "file")
    assert_unchanged(wide, before)


def test_factors_on_the_meta_device_are_refused(model, tmp_path):
    inject(model, TARGETS, r=2)
    save_adapter(model, tmp_path / "file")
    with pytest.raises(HUTBackendError, match="meta"):
        load_adapter(model.to("meta"), tmp_path / "file")


def test_a_file_that_is_not_there_is_an_os_error(model, tmp_path):
    inject(model, TARGETS, r=2)
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "absent")


class Unknown(nn.Module):
    """A module of nobody's list that reads a weight without calling its layer."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, x):
        return self.called(x) @ self.read.weight


@every_option
def test_saving_names_the_layers_that_training_passed_over(options, tmp_path, recwarn):
    model = nn.Sequential(Unknown())
    inject(model, ["called", "read"], **options)
    save_adapter(model, tmp_path / "fresh")
    assert not recwarn.list
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"1 of 2 HUT layers .*: 0\.read\. They received no"):
        save_adapter(model, tmp_path / "file")
    for parameter in model[0].read.parameters():
        parameter.requires_grad_(False)
    recwarn.clear()
    save_adapter(model, tmp_path / "file")
    assert not recwarn.list
