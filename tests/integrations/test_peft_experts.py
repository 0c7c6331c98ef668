"""HUTConfig(target_parameters=[...]): PEFT's doors to experts, beside LoRA's own."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hut_kernels import inject, parameter_groups
from hut_kernels.errors import HUTBackendError
from hut_kernels.integrations.peft import HUTConfig, HUTLayer
from hut_kernels.integrations.peft.experts import ParamWrapper

from ..references import error
from .moe_models import CONFIGS, experts_of, ids, parameters_of, tiny

FORMS = {
    "residual": {"hut_alpha": 6},
    "direct": {"offset": 0.0},
    "two_sided": {"transform": "two_sided"},
}
three_families = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def config_for(model, **options):
    names = [f"experts.{name}" for name in parameters_of(experts_of(model)[0])]
    defaults = {"r": 3, "target_modules": [], "target_parameters": names, "init_weights": False}
    return HUTConfig(**(defaults | options))


def adapted(family="qwen3_moe", **options):
    base = tiny(family)
    return get_peft_model(base, config_for(base, **options))


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def logits(model, given):
    return model(given).logits


def same(result, wanted, limit=1e-5):
    return error(result, wanted.detach().double().numpy()) < limit


@pytest.mark.parametrize("family", CONFIGS)
@every_form
def test_every_family_equals_itself_merged(family, form):
    base = tiny(family)
    given = ids()
    before = base.eval()(given).logits
    model = get_peft_model(base, config_for(base, **form)).eval()
    after = logits(model, given)
    assert not same(after, before, 1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, given), before)
    merged = model.merge_and_unload()
    assert same(merged(given).logits, after)
    assert not [module for module in merged.modules() if isinstance(module, HUTLayer)]
    assert not any("_hut_factors" in vars(module) for module in merged.modules())
    assert merged.config._experts_implementation == "grouped_mm"


@three_families
def test_train_save_reload(family, tmp_path):
    torch.manual_seed(0)
    base = tiny(family)
    options = {"init_weights": True, "target_modules": ["q_proj"]}
    model = get_peft_model(copy.deepcopy(base), config_for(base, **options))
    given = ids()
    start = logits(model.eval(), given)
    assert same(start, base.eval()(given).logits)
    eager = copy.deepcopy(model)
    for layer in wrappers(eager):
        layer.hut_form = {n: form._replace(fused=False) for n, form in layer.hut_form.items()}
    losses, expected = train(model, given), train(eager, given)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    trained = logits(model.eval(), given)
    assert torch.equal(logits(again, given), trained)
    merged = again.merge_and_unload()
    assert same(merged(given).logits, trained)
    assert merged.state_dict().keys() == base.state_dict().keys()


def train(model, given, steps=15, lr=0.1):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = model(given, labels=given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@three_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_exact(family, dtype):
    """LoRA's changes a quarter of the weights in every type."""
    base = tiny(family).to(dtype)
    weights = {name: p.clone() for name, p in base.named_parameters()}
    shift = {"scale_shift": True} if family == "gpt_oss" else {}
    model = get_peft_model(base, config_for(base, **shift)).eval()
    given = ids()
    before = logits(model, given)
    model.merge_adapter()
    merged = logits(model, given)
    assert same(merged, before, 5e-2 if dtype == torch.bfloat16 else 1e-5)
    assert not torch.equal(experts_of(model)[0].down_proj, next(
        p for name, p in weights.items() if name.endswith("0.mlp.experts.down_proj")
    ))  # fmt: skip
    model.unmerge_adapter()
    assert torch.equal(logits(model, given), before)
    experts = experts_of(model)[0]
    for name, parameter in experts.named_parameters(recurse=False):
        assert torch.equal(parameter, weights[f"model.layers.0.mlp.experts.{name}"]), name


def test_parameters_and_keys_are_as_loras():
    """Inner wrapper first registered, outer next, and no parameter's name in a key."""
    base = tiny("qwen3_moe")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, target_modules=[], target_parameters=names)
    peer = get_peft_model(copy.deepcopy(base), config)
    model = get_peft_model(base, config_for(base))
    assert [w.parameter_name for w in wrappers(model)] == [
        m.parameter_name for m in peer.modules() if type(m).__name__ == "ParamWrapper"
    ]
    trained = {n.replace("hut_", "lora_") for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        n.removesuffix(".weight") for n, p in peer.named_parameters() if p.requires_grad
    }
    outer = wrappers(model)[0]
    assert outer.hut_A["default"].shape == (4, 3, 24)
    assert outer.base_layer.hut_B["default"].shape == (4, 48, 3)


def test_several_adapters():
    model = adapted(init_weights=False).eval()
    given = ids()
    first = logits(model, given)
    model.add_adapter("other", config_for(model, r=2))
    assert torch.equal(logits(model, given), first)
    model.set_adapter("other")
    second = logits(model, given)
    assert not same(second, first, 1e-3)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("other" in name for name in trained)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, given)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    assert same(merged(given).logits, both)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model, given), first)


def test_adapters_must_target_the_same_parameters():
    model = adapted()
    config = config_for(model, target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="must target the same set"):
        model.add_adapter("other", config)


def test_unload_gives_the_base_model():
    base = tiny("mixtral")
    given = ids()
    before = base.eval()(given).logits
    model = get_peft_model(base, config_for(base)).eval()
    assert torch.equal(model.unload()(given).logits, before)


def test_patterns_and_scales():
    model = adapted(rank_pattern={"experts.down_proj": 2}, hut_alpha=6).eval()
    assert [w.r["default"] for w in wrappers(model)] == [2, 3] * 2
    given = ids()
    with_adapter = logits(model, given)
    for wrapper in wrappers(model):
        wrapper.set_scale("default", 0.0)
    with model.disable_adapter():
        without = logits(model, given)
    assert same(logits(model, given), without)
    for wrapper in wrappers(model):
        wrapper.set_scale("default", 1.0)
    assert torch.equal(logits(model, given), with_adapter)


def test_modules_to_save(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    given = ids()
    train(model, given, 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("qwen3_moe"), tmp_path)
    wanted = model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight
    found = again.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight
    assert torch.equal(found, wanted)


def test_gradient_checkpointing_and_copies():
    model = adapted().train()
    given = ids()
    model.enable_input_require_grads()
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(given, labels=given).loss, parameters)
    copied = copy.deepcopy(model)
    copied.gradient_checkpointing_enable({"use_reentrant": False})
    loss = copied(given, labels=given).loss
    found = torch.autograd.grad(loss, [p for p in copied.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_break():
    """LoRA's target_parameters are refused by fullgraph."""
    experts = adapted().base_model.model.model.layers[0].mlp.experts
    hidden, index = torch.randn(9, 32, requires_grad=True), torch.randint(4, (9, 2))
    given = hidden, index, torch.rand(9, 2)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    y = compiled(*given)
    assert same(y, experts(*given), 1e-6)
    factors = [p for p in experts.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().sum(), [hidden, *factors])
    wanted = torch.autograd.grad(experts(*given).square().sum(), [hidden, *factors])
    assert all(same(a, b, 1e-5) for a, b in zip(found, wanted, strict=True))


def test_trainer_resumes(tmp_path):
    """Four steps, or two and two from the checkpoint: the same losses."""
    base = tiny("qwen3_moe")
    data = [{"input_ids": row, "labels": row} for row in ids(8, 12)]

    def trainer(model, steps):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, logging_steps=1, report_to=[],
            per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
            lr_scheduler_type="constant", seed=3,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data)

    def fresh():
        return get_peft_model(copy.deepcopy(base), config_for(base, init_weights=True))

    def losses(run):
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    torch.manual_seed(5)
    whole = trainer(fresh(), 4)
    whole.train()
    torch.manual_seed(5)
    trainer(fresh(), 2).train()
    resumed = trainer(fresh(), 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        (TypeError, "must be a list of names", {"target_parameters": "down_proj"}),
        (ValueError, r"no parameter matches \['up_proj_'\]",
         {"target_parameters": ["down_proj", "up_proj_"]}),
        (ValueError, "experts have no hut_dropout; got 0.1", {"hut_dropout": 0.1}),
        (ValueError, "got 'split'", {"precision": "split"}),
        (ValueError, "Qwen3MoeTopKRouter computes its experts by",
         {"target_parameters": ["gate.weight"]}),
    ],
)  # fmt: skip
def test_refusals(kind, match, options):
    with pytest.raises(kind, match=match):
        adapted(**options)


@pytest.mark.parametrize(
    ("match", "spoil"),
    [
        ("is partitioned by DeepSpeed ZeRO-3", lambda e: setattr(e.down_proj, "ds_shape", (4, 32))),
        ("expert parallelism", lambda e: setattr(e, "_is_expert_parallel", True)),
    ],
)
def test_sharded_experts_are_refused(match, spoil):
    base = tiny("qwen3_moe")
    for experts in experts_of(base):
        spoil(experts)
    with pytest.raises(HUTBackendError, match=match):
        get_peft_model(base, config_for(base))


def test_an_implementation_of_its_own_kernels_is_refused():
    base = tiny("qwen3_moe")
    base.config._experts_implementation = "deepgemm"
    with pytest.raises(HUTBackendError, match="'deepgemm' reads the weights by kernels"):
        get_peft_model(base, config_for(base))


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        adapted()


def test_scale_by_rms_and_parameter_groups_know_stacks(tmp_path):
    model = adapted(scale_by_rms=True).eval()
    sizes = model.peft_config["default"].rms
    assert len(sizes) == len(wrappers(model))
    for wrapper in wrappers(model):
        weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name).double()
        size = weight.square().mean().sqrt().item()
        assert wrapper.hut_rms["default"] == pytest.approx(size, rel=1e-12)
    groups = parameter_groups(model, 1e-3)
    assert [(g["lr"], len(g["params"])) for g in groups] == [(1e-3, 2 * len(sizes))]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("qwen3_moe"), tmp_path)
    scalings = [w.scaling for w in wrappers(model)]
    assert [w.scaling for w in wrappers(loaded)] == scalings
    base = tiny("qwen3_moe")
    inject(base, [], target_parameters=["experts.down_proj"])
    groups = parameter_groups(base, 1e-3)
    assert len(groups) == 2
    assert groups[0]["lr"] > 2e-3
