"""inject and merge: what they change, what they leave, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from hut_kernels.adapter_file import adapter_options, adapter_state_dict, load_adapter, save_adapter
from hut_kernels.adapters import inject, merge
from hut_kernels.errors import HUTBackendError
from hut_kernels.nn import PAPER, HUTLinear

from .adapted_models import (
    NAMES,
    TARGETS,
    TOKENS,
    Block,
    Conv1D,
    Model,
    assert_unchanged,
    every_option,
    hut_names,
    snapshot,
    trained,
)

V_PROJ = ["layers.0.v_proj", "layers.1.v_proj"]


def order(name):
    return name.split(".")[1], ["q_proj", "v_proj", "c_fc", "0"].index(name.split(".")[-1])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return Model()


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


def test_a_listed_name_may_match_only_hut_layers(model):
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


def test_injecting_into_only_hut_layers_is_refused(model):
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


@pytest.mark.parametrize(
    ("option", "own"),
    [
        ("lora_alpha", "HUT's own is alpha"),
        ("hut_alpha", "HUT's own is alpha"),
        ("lora_dropout", "HUT's own is dropout"),
        ("use_rslora", "HUT's own is alpha, with scaling = alpha / r"),
        ("use_dora", "HUT's own is scale_shift=True"),
        ("init_lora_weights", "HUT's own is reset_factors"),
        ("bias", "bias is the linear layer's own.*scale_shift=True"),
        ("dtype", "dtype is the linear layer's own"),
        ("nonsense", "unexpected keyword argument 'nonsense'"),
    ],
)
def test_loras_options_name_huts_own(model, option, own):
    before = snapshot(model)
    with pytest.raises(TypeError, match=rf"layers\.0\.q_proj: .*{own}"):
        inject(model, ["q_proj"], **{option: 1})
    assert_unchanged(model, before)
    if option not in ("bias", "dtype"):
        with pytest.raises(TypeError, match=own):
            HUTLinear(4, 4, **{option: 1})


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


def test_an_invalid_pattern_is_refused(model):
    with pytest.raises(ValueError, match="regular expression"):
        inject(model, "*.q_proj")


def test_a_bare_linear_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match="candidates: none"):
        inject(nn.Linear(4, 4), ".*")


class MambaMixer(nn.Module):
    """A stand-in for Mamba's mixer: it reads its layers' weights without calling them."""

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
