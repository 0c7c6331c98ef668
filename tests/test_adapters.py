"""inject, adapter files and merge: what they change, what they leave, and what they refuse."""

import copy
import json
import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune

from hut_kernels.adapters import (
    adapter_options,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from hut_kernels.errors import HUTBackendError
from hut_kernels.nn import PAPER, HUTLinear

OPTIONS = {
    "residual": {"r": 3, "alpha": 6, "dropout": 0.25},
    "direct": {"r": 2, "offset": 0, "factor_dtype": torch.bfloat16},
    "two_sided": {"r": 4, "transform": "two_sided", "precision": "split"},
    "paper": {"r": 4, "factor_dtype": torch.float64, **PAPER},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Conv1D(nn.Module):
    """What the Conv1D of transformers looks like from outside."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.c_fc = Conv1D(2 * width, width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())

    def forward(self, x):
        return x + self.mlp(self.c_fc(self.v_proj(self.q_proj(self.norm(x)))))


class Model(nn.Module):
    """Two blocks between an embedding and a head that share one weight."""

    def __init__(self, width=8, vocabulary=12):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TARGETS = ["q_proj", "c_fc", "mlp.0"]
NAMES = [f"layers.{i}.{name}" for i in range(2) for name in TARGETS]
TOKENS = torch.tensor([[1, 5, 7], [0, 2, 11]])


V_PROJ = ["layers.0.v_proj", "layers.1.v_proj"]


def order(name):
    return name.split(".")[1], ["q_proj", "v_proj", "c_fc", "0"].index(name.split(".")[-1])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return Model()


def trained(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HUTLinear):
                for _, factor in module.named_factors():
                    factor.normal_(0.5, 1.0)
    return model


def snapshot(model):
    """Everything an operation that failed may not have changed."""
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [
        (name, id(p), p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return modules, parameters


def assert_unchanged(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    for now, then in zip(parameters, before[1], strict=True):
        assert now[:3] == then[:3]
        assert torch.equal(now[3], then[3])


def hut_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, HUTLinear)]


# inject


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        ("all-linear", [*sorted([*NAMES, *V_PROJ], key=order), "lm_head"]),
        ({"layers.1.q_proj"}, ["layers.1.q_proj"]),
        (["mlp.0"], ["layers.0.mlp.0", "layers.1.mlp.0"]),
        (["0"], ["layers.0.mlp.0", "layers.1.mlp.0"]),  # also the container layers.0
        (["lm_head"], ["lm_head"]),
        (r"layers\.0\.[qv]_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
        (r".*\.0\..*(proj|fc)", ["layers.0.q_proj", "layers.0.v_proj", "layers.0.c_fc"]),
        (TARGETS, NAMES),
    ],
)
def test_target_modules_are_matched_by_pefts_rules(model, target_modules, expected):
    assert inject(model, target_modules, r=2) == expected
    assert hut_names(model) == expected


@pytest.mark.parametrize(
    "target_modules", [["proj"], ["_proj"], "q_proj", r"layers\.0", [], ["relu"]]
)
def test_no_match_lists_the_candidates(model, target_modules):
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"candidates: layers\.0\.q_proj.*lm_head"):
        inject(model, target_modules)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_proj", "typo"], r"matches \['typo'\] of target_modules"),
        (["q_proj", "v_prj"], "near matches: .*v_proj"),
        (["q_proj", "layers.2.q_proj"], "near matches: layers"),
        (["q_proj", "layers"], r"matches \['layers'\]"),  # containers only
    ],
)
def test_a_listed_name_that_matches_no_layer_is_refused(model, target_modules, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, target_modules)
    assert_unchanged(model, before)


def test_a_listed_name_may_match_hut_layers_alone(model):
    inject(model, ["q_proj"])
    assert inject(model, ["q_proj", "lm_head"]) == ["lm_head"]


def test_all_linear_leaves_out_the_output_layer_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(intermediate_size=24, **sizes)
    for kind in ("LlamaForCausalLM", "LlamaForSequenceClassification"):
        adapted = inject(getattr(transformers, kind)(config), "all-linear")
        assert len(adapted) == 7
        assert not {"lm_head", "score"} & {*adapted}


def test_a_pattern_passes_over_other_kinds_of_modules(model):
    replaced = inject(model, ".*", r=2)
    assert len(replaced) == 9
    assert isinstance(model.embed, nn.Embedding)
    assert isinstance(model.layers[0].norm, nn.LayerNorm)


@every_option
def test_a_fresh_model_computes_exactly_the_base_model(model, options):
    base = copy.deepcopy(model).eval()
    inject(model.eval(), TARGETS, **options)
    if options.get("precision") == "split":
        torch.testing.assert_close(model(TOKENS), base(TOKENS))
    else:
        torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(trained(model)(TOKENS), base(TOKENS), rtol=1e-2)


def test_options_reach_every_layer(model):
    inject(model, TARGETS, 3, alpha=6, dropout=0.5, scale_shift=True, fused=False)
    for name in NAMES:
        layer = model.get_submodule(name)
        assert (layer.r, layer.scaling, layer.dropout, layer.fused) == (3, 2.0, 0.5, False)
        assert layer.gamma is not None


def test_everything_but_the_factors_is_frozen(model):
    inject(model, TARGETS, r=2, scale_shift=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    keys = ("hut_A", "hut_B", "gamma", "beta")
    assert trainable == {f"{name}.{key}" for name in NAMES for key in keys}
    model(TOKENS).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


def test_base_parameters_are_the_very_same_objects(model):
    base = dict(model.named_parameters())
    inject(model, TARGETS, r=2)
    for name in NAMES:
        assert model.get_submodule(name).weight is base[f"{name}.weight"]
        assert model.get_submodule(name).bias is base[f"{name}.bias"]
    assert set(base) <= set(model.state_dict())


def test_the_mode_of_each_layer_is_kept(model):
    model.layers[0].eval()
    inject(model, TARGETS, r=2)
    assert not model.layers[0].q_proj.training
    assert model.layers[1].q_proj.training


def test_a_tied_weight_stays_tied_through_moves(model):
    inject(model, ["lm_head"], r=2)
    assert model.lm_head.weight is model.embed.weight
    model.to(torch.float64)
    assert model.lm_head.weight is model.embed.weight
    assert model.lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("target_modules", [["first", "second"], ["second"]])
def test_a_module_under_two_names_becomes_one_hut_layer(target_modules):
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(4, 4)})
    assert inject(model, target_modules, r=2) == ["first", "second"]
    assert isinstance(model["first"], HUTLinear)
    assert model["first"] is model["second"]
    merge(model)
    assert type(model["first"]) is nn.Linear
    assert model["first"] is model["second"]


def test_layers_of_a_shared_block_are_replaced_once():
    block = Block(4)
    model = nn.Sequential(block, block)
    assert inject(model, ["q_proj"], r=2) == ["0.q_proj", "1.q_proj"]
    assert list(adapter_state_dict(model)) == ["0.q_proj.hut_A", "0.q_proj.hut_B"]


def test_injecting_again_adds_other_targets_and_leaves_the_first(model):
    inject(model, ["q_proj"], r=2)
    first = trained(model).layers[0].q_proj
    values = copy.deepcopy(first.state_dict())
    assert inject(model, ["q_proj", "v_proj"], r=4) == ["layers.0.v_proj", "layers.1.v_proj"]
    assert model.layers[0].q_proj is first
    assert all(torch.equal(first.state_dict()[key], value) for key, value in values.items())
    assert first.hut_A.requires_grad
    assert (first.r, model.layers[0].v_proj.r) == (2, 4)


def test_injecting_into_hut_layers_alone_is_refused(model):
    inject(model, ["q_proj"], r=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="HUT layers already"):
        inject(model, ["q_proj"], r=2)
    assert_unchanged(model, before)


def test_hooks_move_and_their_handles_stay_valid(model):
    calls = []
    old = model.layers[0].q_proj
    handle = old.register_forward_hook(lambda *_: calls.append("after"))
    old.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    inject(model, ["q_proj"], r=2)
    model(TOKENS)
    assert calls == ["before", "after"]
    merge(model)
    handle.remove()
    model(TOKENS)
    assert calls == ["before", "after", "before"]


@every_option
def test_a_model_copies_and_pickles(model, options):
    inject(model, TARGETS, **options)
    trained(model).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, r"layers\.0\.q_proj: r must be at least 1"),
        ({"r": 9, "transform": "two_sided"}, ValueError, r"layers\.0\.q_proj: two_sided"),
        ({"alpha": 2, "offset": 0}, ValueError, "alpha belongs to"),
        ({"rank": 2}, TypeError, "rank"),
    ],
)
def test_a_wrong_option_leaves_the_model_unchanged(model, options, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, TARGETS, **options)
    assert_unchanged(model, before)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class QuantLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def int8_linear():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize("as_pattern", [True, False])
@pytest.mark.parametrize(
    ("module", "name", "error", "message"),
    [
        (OwnForward(4, 4), "bad", TypeError, "bad: OwnForward has a forward"),
        (QuantLinear(), "bad", HUTBackendError, "bad: QuantLinear"),
        (int8_linear(), "bad", HUTBackendError, "bad: .*int8"),
        (nn.MultiheadAttention(4, 2), "bad.out_proj", ValueError, "bad.out_proj cannot be a HUT"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(
    module, name, error, message, as_pattern
):
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": module})
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, f"good|{name}" if as_pattern else ["good", name], r=2)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["embed", "norm"])
def test_a_listed_module_of_another_kind_is_refused(model, name):
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name} is a (Embedding|LayerNorm)"):
        inject(model, ["q_proj", name], r=2)
    assert_unchanged(model, before)


def test_a_pattern_that_is_none_is_refused(model):
    with pytest.raises(ValueError, match="regular expression"):
        inject(model, "*.q_proj")


def test_a_bare_linear_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match="candidates: none"):
        inject(nn.Linear(4, 4), ".*")


class MambaMixer(nn.Module):
    """What Mamba's mixer looks like to a program that puts layers into it."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(8, 8)
        self.dt_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.in_proj(x) @ self.dt_proj.weight


@pytest.mark.parametrize("targets", [["dt_proj"], "all-linear", r".*proj"])
def test_a_layer_whose_weight_is_read_without_a_call_is_refused(targets):
    model = nn.Sequential(MambaMixer())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.dt_proj .*MambaMixer reads its weight without"):
        inject(model, targets)
    assert_unchanged(model, before)
    assert inject(model, ["in_proj"]) == ["0.in_proj"]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("Mamba", "dt_proj"),
        ("Mamba", "out_proj"),
        ("Mamba2", "out_proj"),
        ("FalconMamba", "dt_proj"),
        ("FalconH1", "out_proj"),
        ("NemotronH", "out_proj"),
    ],
)
def test_mamba_of_transformers_is_refused(name, layer):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(num_hidden_layers=1)
        model = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match=rf"{layer} .* reads its weight without calling it"):
        inject(model, [layer])


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


@pytest.mark.parametrize("padded", [True, False])
def test_fused_inference_does_not_bypass_the_adapter(padded):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    inject(model, ["linear1", "linear2"], r=2, scale_shift=True)
    trained(model)
    expected = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        out = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out[~mask], expected[~mask])


# Adapter state and files


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


# merge


@every_option
def test_a_merged_model_computes_what_the_adapted_one_does(model, options):
    inject(model, [*TARGETS, "lm_head"], **options)
    trained(model).double().eval()
    adapted = model(TOKENS)
    embedding = model.embed.weight.clone()
    assert merge(model) is model
    assert not hut_names(model)
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-10, atol=1e-10)
    assert type(model.layers[0].q_proj) is nn.Linear
    assert type(model.layers[0].c_fc) is Conv1D
    assert torch.equal(model.embed.weight, embedding)


def test_a_merged_model_has_the_state_of_a_plain_one(model):
    plain = copy.deepcopy(model)
    inject(model, TARGETS, r=2)
    merge(model)
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in plain.state_dict().items()}
    plain.load_state_dict(model.state_dict())


def test_merging_a_plain_model_changes_nothing(model):
    before = snapshot(model)
    assert merge(model) is model
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["weight", "bias", "hut_A", "hut_B"])
def test_a_pruned_layer_is_neither_merged_nor_saved_with_stale_values(model, name, tmp_path):
    inject(model, TARGETS, r=2)
    prune.l1_unstructured(trained(model).layers[1].q_proj, name, 0.5)
    before = snapshot(model)
    with pytest.raises(HUTBackendError, match=rf"layers\.1\.q_proj: {name} .* not a parameter"):
        merge(model)
    with pytest.raises(HUTBackendError, match=f"{name} .* not a parameter"):
        model.layers[1].q_proj.to_linear()
    assert_unchanged(model, before)
    if name.startswith("hut"):
        with pytest.raises(HUTBackendError, match=rf"layers\.1\.q_proj: {name} .*prune"):
            save_adapter(model, tmp_path / "file")
    else:
        save_adapter(model, tmp_path / "file")
    prune.remove(model.layers[1].q_proj, name)
    adapted = model(TOKENS)
    torch.testing.assert_close(merge(model)(TOKENS), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["weight", "hut_B"])
def test_a_parametrized_layer_merges_to_what_it_computes(model, name, tmp_path):
    inject(model, TARGETS, r=2)
    layer = trained(model).layers[1].q_proj
    parametrize.register_parametrization(layer, name, nn.Tanh())
    adapted = model(TOKENS)
    if name == "hut_B":
        with pytest.raises(HUTBackendError, match=rf"layers\.1\.q_proj: {name} .*parametrization"):
            save_adapter(model, tmp_path / "file")
    torch.testing.assert_close(merge(model)(TOKENS), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_layers_are_refused_where_their_data_is_needed(model, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    inject(model, TARGETS, r=2)
    adapted, cpu = trained(model)(TOKENS), torch.device("cpu")
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=cpu)
    assert torch.equal(model(TOKENS), adapted)
    layer = model.layers[0].q_proj
    uses = (
        lambda: merge(model),
        lambda: save_adapter(model, tmp_path / "file"),
        lambda: adapter_state_dict(model),
        layer.to_linear,
        layer.merged_weight,
        layer.merged_bias,
    )
    for use in uses:
        with pytest.raises(HUTBackendError, match="remove_hook_from_module"):
            use()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(merge(model)(TOKENS), adapted, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_forward_was_replaced_is_not_merged(model):
    inject(model, TARGETS, r=2)
    layer = model.layers[1].q_proj
    layer.forward = lambda x: x
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"layers\.1\.q_proj: HUTLinear has a forward of its own"):
        merge(model)
    assert_unchanged(model, before)


def test_a_layer_compiled_by_itself_is_neither_replaced_nor_merged(model):
    model.layers[0].q_proj = torch.compile(model.layers[0].q_proj, backend="eager")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q_proj\._orig_mod was compiled by itself"):
        inject(model, r".*q_proj.*")
    assert_unchanged(model, before)
    inject(model, TARGETS, r=2)
    model.layers[1].q_proj = torch.compile(model.layers[1].q_proj, backend="eager")
    with pytest.raises(ValueError, match=r"q_proj\._orig_mod was compiled by itself"):
        merge(model)


def test_a_tied_model_of_transformers_is_saved_merged(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inject(model, ["lm_head", "q_proj"], r=2)
    logits = trained(model)(TOKENS).logits
    merge(model).tie_weights()
    torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_gpt2_of_transformers_round_trip(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    base = copy.deepcopy(model)
    with torch.no_grad():
        expected = base(TOKENS).logits
        targets = ["c_attn", "c_fc", "lm_head"]
        assert len(inject(model, targets, r=4, **PAPER)) == 3
        torch.testing.assert_close(model(TOKENS).logits, expected)
        adapted = trained(model)(TOKENS).logits
        save_adapter(model, tmp_path / "file")
        inject(base, targets, **adapter_options(tmp_path / "file"))
        load_adapter(base.eval(), tmp_path / "file")
        assert torch.equal(base(TOKENS).logits, adapted)
        torch.testing.assert_close(merge(model)(TOKENS).logits, adapted, rtol=1e-4, atol=1e-4)
