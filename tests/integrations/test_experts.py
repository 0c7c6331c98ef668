"""HUT on experts of transformers' models: every layout, every former implementation, refusals."""

import copy
import importlib
import io
import pickle

import accelerate
import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import finegrained_fp8, mxfp4

from hut_kernels import (
    HUTBackendError,
    HUTExperts,
    adapter_options,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from tests.references import error

from .moe_models import CONFIGS, experts_of, ids, parameters_of, routed, tiny

FORMERS = ("eager", "grouped_mm", "batched_mm")
TARGETS = ["gate_up_proj", "down_proj"]
FORMS = {
    "residual": {"alpha": 4},
    "direct": {"offset": 0.0},
    "two_sided": {"transform": "two_sided"},
}
every_family = pytest.mark.parametrize("family", CONFIGS)
three_families = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])


def targets(model):
    return [f"experts.{name}" for name in parameters_of(experts_of(model)[0])]


def adapted(family, r=3, former=None, noise=0.2, **options):
    """A model with HUT on all its experts, whose factors are not the identity."""
    model = tiny(family, **({"experts_implementation": former} if former else {}))
    inject(model, [], r, target_parameters=targets(model), **options)
    shake(model, noise)
    return model


def shake(model, noise=0.2):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HUTExperts):
                for factor in module.parameters():
                    factor.add_(noise * torch.randn_like(factor))


def step(experts, given):
    """The output, and the gradients of the hidden states, the weights and all factors."""
    hidden, index, weights = given
    leaves = [hidden.requires_grad_(), weights.requires_grad_()]
    leaves += [p for p in experts.parameters() if p.requires_grad]
    y = experts(hidden, index, weights)
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y) * hidden.detach())]


def close(results, expected, limit=2e-6):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert error(result, wanted.detach().double().numpy()) < limit


# Values


@every_family
@pytest.mark.parametrize("former", FORMERS)
def test_a_fresh_adapter_leaves_the_experts_as_they_are(family, former):
    model = tiny(family, experts_implementation=former)
    experts = experts_of(model)[0]
    given = routed(experts)
    expected = experts(*given)
    inject(model, [], 3, target_parameters=targets(model), scale_shift=True)
    assert error(experts(*given), expected.detach().double().numpy()) < 1e-6


@every_family
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("former", FORMERS)
def test_the_experts_equal_those_with_merged_weights(family, form, former):
    model = adapted(family, former=former, **form)
    merged = merge(copy.deepcopy(model))
    experts, plain = experts_of(model)[0], experts_of(merged)[0]
    assert plain.config._experts_implementation == former
    assert not list(plain.children()) or [*plain.children()] == [plain.act_fn]
    given = routed(experts)
    y, dx, dw = step(experts, given)[:3]
    close([y, dx, dw], step(plain, given), 5e-6)
    assert error(experts_of(tiny(family))[0](*given), y.detach().double().numpy()) > 0.01


@every_family
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_gradients_equal_the_definitions(family, form):
    model = adapted(family, scale_shift=True, **form)
    eager = copy.deepcopy(model)
    for module in eager.modules():
        if isinstance(module, HUTExperts):
            module.fused = False
    experts = experts_of(model)[0]
    given = routed(experts)
    results = step(experts, given)
    close(results, step(experts_of(eager)[0], given), 5e-6)
    for name, factor in experts.named_parameters():
        if factor.requires_grad:
            (grad,) = torch.autograd.grad(experts(*given).sum(), factor)
            assert not grad[-1].any(), name  # an expert without tokens
            assert grad[0].any(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_keeps_nothing_of_an_experts_size(family, dtype):
    """Beyond what frozen experts keep, and the stacks and factors themselves."""
    model = adapted(family, scale_shift=True).to(dtype)
    experts = experts_of(model)[0]
    given = routed(experts, tokens=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(*given)
    own = {t.untyped_storage().data_ptr() for t in experts.parameters()}
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert kept
    assert max(t.untyped_storage().nbytes() for t in kept) < experts.down_proj[0].nbytes


def test_idle_experts_cost_no_operation():
    """8 experts with tokens of 8, and of 64: the same work, whatever was there before it."""
    counts = []
    for idle in (0, 56):
        config = CONFIGS["qwen3_moe"]()
        config.num_experts = 8 + idle
        model = type(tiny("qwen3_moe"))(config)
        inject(model, [], 3, target_parameters=TARGETS)
        experts = experts_of(model)[0]
        given = routed(experts, tokens=24, idle=idle)
        with torch.profiler.profile() as profiler:
            step(experts, given)
        events = profiler.key_averages()
        work = ("mm", "addmm", "addcmul", "mul", "mul_", "copy_", "linear", "embedding_bag")
        counts.append({e.key: e.count for e in events if e.key in {f"aten::{w}" for w in work}})
    assert counts[0] == counts[1]
    assert counts[0]["aten::mm"] >= 8


def test_one_of_two_stacks():
    model = tiny("qwen3_moe")
    inject(model, [], 3, target_parameters=["experts.down_proj"])
    shake(model)
    plain = merge(copy.deepcopy(model))
    given = routed(experts_of(model)[0])
    close(step(experts_of(model)[0], given)[:3], step(experts_of(plain)[0], given), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, None])
def test_other_types(dtype, weights_dtype):
    """A router may give its weights in float32 whatever the experts' type."""
    model = adapted("qwen3_moe", factor_dtype=torch.float64).to(dtype)
    experts = experts_of(model)[0]
    hidden, index, weights = routed(experts)
    weights = weights.to(weights_dtype or dtype)
    y, dx, dw = step(experts, (hidden, index, weights))[:3]
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, weights.dtype)
    plain = experts_of(merge(copy.deepcopy(model).double()))[0]
    plain.config._experts_implementation = "eager"  # others have no float64
    expected = step(plain, (hidden.detach().double(), index, weights.detach().double()))
    for result, wanted in zip((y, dx, dw), expected, strict=True):
        assert error(result, wanted.detach().numpy()) < (2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_hidden_states_of_another_type_than_the_experts():
    """As under grouped_mm: computed in the weights' type, given back in the hidden states'."""
    experts = experts_of(adapted("qwen3_moe").bfloat16())[0]
    hidden, index, weights = routed(experts)
    y = experts(hidden.float(), index, weights.float())
    assert y.dtype == torch.float32
    assert error(y, experts(hidden, index, weights).detach().double().numpy()) < 8e-3


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    model = adapted("qwen3_moe")
    experts = experts_of(model)[0]
    results = step(experts, routed(experts, tokens))
    assert results[0].shape == (tokens, 32)
    assert all(result.isfinite().all() for result in results)


def test_a_token_that_takes_an_expert_twice():
    model = adapted("qwen3_moe")
    hidden, index, weights = routed(experts_of(model)[0])
    index[:, 1] = index[:, 0]
    plain = merge(copy.deepcopy(model))
    given = hidden, index, weights
    close(step(experts_of(model)[0], given)[:3], step(experts_of(plain)[0], given), 5e-6)


def test_a_width_that_grouped_mm_refuses():
    """16-byte rows are that implementation's wish, not ours."""
    model = tiny("qwen3_moe")
    experts = experts_of(model)[0]
    experts.gate_up_proj = nn.Parameter(torch.randn(4, 44, 30))
    experts.down_proj = nn.Parameter(torch.randn(4, 30, 22))
    given = routed(experts)
    expected = type(experts).forward.__wrapped__(experts, *given)
    inject(model, [], 3, target_parameters=["0.mlp.experts.gate_up_proj"])
    assert error(experts(*given), expected.detach().double().numpy()) < 1e-6


# Choice of implementation


@pytest.mark.parametrize("former", FORMERS)
def test_a_model_of_the_same_config_is_as_it_was(former):
    """Models made from one configuration object share its choice of implementation."""
    config = CONFIGS["qwen3_moe"]()
    config._experts_implementation = former
    kind = type(tiny("qwen3_moe"))
    model, other = kind(config), kind(config)
    given = ids()
    expected = other(given).logits
    inject(model, [], 3, target_parameters=TARGETS)
    shake(model)
    assert torch.equal(other(given).logits, expected)


def test_a_choice_made_later_does_not_silence_the_adapter():
    model = adapted("qwen3_moe")
    given = ids()
    expected = model(given).logits
    for former in FORMERS:
        model.set_experts_implementation(former)
        close([model(given).logits], [expected])
    assert merge(model).config._experts_implementation == "batched_mm"
    model = adapted("qwen3_moe")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(HUTBackendError, match="'sonicmoe' reads the weights by kernels"):
        model(given)


def test_generation_uses_the_adapter():
    model = adapted("qwen3_moe").eval()
    plain = merge(copy.deepcopy(model))
    given = {"input_ids": ids(1, 5), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**given), plain.generate(**given))


# Models


def loss_of(model, given):
    return model(given, labels=given).loss


def train(model, given, steps=15, lr=0.1):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@three_families
def test_train_save_reload_merge(family, tmp_path):
    torch.manual_seed(0)
    base = tiny(family)
    model, eager = copy.deepcopy(base), copy.deepcopy(base)
    names = inject(model, ["q_proj"], 3, target_parameters=targets(model))
    assert len(names) == 2 + 4
    load_state = copy.deepcopy(model.state_dict())
    inject(eager, ["q_proj"], 3, target_parameters=targets(eager), fused=False)
    eager.load_state_dict(load_state)
    given = ids()
    losses = train(model, given)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(losses, train(eager, given), rtol=1e-4, atol=1e-4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("hut_A" in name or "hut_B" in name for name in trained)

    file = tmp_path / "adapter.safetensors"
    save_adapter(model, file)
    again = copy.deepcopy(base)
    inject(again, ["q_proj"], target_parameters=targets(again), **adapter_options(file))
    load_adapter(again, file)
    logits = model(given).logits
    assert torch.equal(again(given).logits, logits)
    merged = merge(again)
    close([merged(given).logits], [logits], 1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert type(merged.config._experts_implementation) is str


def test_an_adapter_of_other_experts_is_refused(tmp_path):
    file = tmp_path / "adapter.safetensors"
    model = adapted("qwen3_moe")
    save_adapter(model, file)
    other = tiny("qwen3_moe")
    inject(other, [], 2, target_parameters=TARGETS)
    with pytest.raises(ValueError, match="r=2"):
        load_adapter(other, file)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(clone):
    model = adapted("qwen3_moe")
    given = ids()
    expected = model(given).logits
    copied = clone(model)
    assert torch.equal(copied(given).logits, expected)
    shake(copied, 1.0)
    assert torch.equal(model(given).logits, expected)
    assert not torch.equal(copied(given).logits, expected)


def test_torch_save_and_load():
    model = adapted("qwen3_moe")
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    given = ids()
    again = torch.load(stream, weights_only=False)
    assert torch.equal(again(given).logits, model(given).logits)


def test_a_second_call_adapts_the_remaining_layers():
    model = tiny("qwen3_moe")
    first = inject(model, [], 2, target_parameters=["gate_up_proj"])
    second = inject(model, [], 3, target_parameters=TARGETS)
    assert len(first) == len(second) == 2
    assert {module.r for module in model.modules() if isinstance(module, HUTExperts)} == {2, 3}


def test_gradient_checkpointing_gives_the_same():
    model = adapted("qwen3_moe").train()
    given = ids()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss_of(model, given), parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(loss_of(model, given), parameters)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_autocast():
    """The experts compute in their weights' type, as under grouped_mm."""
    model = adapted("qwen3_moe")
    given = ids()
    expected = model(given).logits.detach().double().numpy()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, given)
        assert error(model(given).logits, expected) < 0.05
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break(dtype):
    model = adapted("qwen3_moe").to(dtype)
    experts = experts_of(model)[0]
    given = routed(experts)
    expected = step(experts, given)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    hidden, index, weights = given
    y = compiled(hidden, index, weights)
    leaves = [hidden, weights, *(p for p in experts.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y) * hidden.detach())
    close([y, *grads], expected, 1e-6 if dtype == torch.float32 else 8e-3)


# Refusals


@pytest.mark.parametrize(
    ("module", "config", "parameter"),
    [
        ("llama4.modeling_llama4.Llama4TextExperts", "Llama4TextConfig", "gate_up_proj"),
        ("dbrx.modeling_dbrx.DbrxExpertGLU", "DbrxConfig", "w1"),
        ("jetmoe.modeling_jetmoe.JetMoeParallelExperts", None, "weight"),
        ("step3p7.modeling_step3p7.Step3p7Experts", "Step3p7TextConfig", "gate_up_proj"),
        ("longcat_flash.modeling_longcat_flash.LongcatFlashExperts", "LongcatFlashConfig",
         "down_proj"),
    ],
)  # fmt: skip
def test_experts_outside_the_interface_are_refused_by_name(module, config, parameter):
    path, _, name = module.rpartition(".")
    kind = getattr(importlib.import_module(f"transformers.models.{path}"), name)
    with torch.device("meta"):
        given = None if config is None else getattr(transformers, config)()
        experts = kind(2, 4, 8) if given is None else kind(getattr(given, "ffn_config", given))
    model = nn.ModuleDict({"experts": experts})
    with pytest.raises(ValueError, match=f"experts.{parameter}: {name} computes its experts by"):
        inject(model, [], 2, target_parameters=[f"experts.{parameter}"])


def refused(kind, match, model, parameters=("gate_up_proj",), **options):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(kind, match=match):
        inject(model, [], 2, target_parameters=parameters, **options)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(isinstance(module, HUTExperts) for module in model.modules())
    assert not str(model.config._experts_implementation).startswith("hut")


@pytest.mark.parametrize("former", ["deepgemm", "deepgemm_megamoe", "sonicmoe"])
def test_implementations_with_kernels_of_their_own_are_refused(former):
    model = tiny("qwen3_moe")
    model.config._experts_implementation = former
    refused(HUTBackendError, f"'{former}' reads the weights by kernels", model)


def test_expert_parallelism_is_refused():
    model = tiny("qwen3_moe")
    experts_of(model)[1]._is_expert_parallel = True
    refused(HUTBackendError, "expert parallelism", model)
    model = adapted("qwen3_moe")
    experts_of(model)[1]._is_expert_parallel = True
    with pytest.raises(HUTBackendError, match="expert parallelism"):
        model(ids())


def test_a_subclass_that_is_not_dispatched_is_refused():
    """A class that writes forward anew stays at its own, whatever the configuration says."""
    model = tiny("qwen3_moe")
    experts = experts_of(model)[0]
    own = {"forward": lambda self, *args: type(experts).__mro__[1].forward.__wrapped__(self, *args)}
    experts.__class__ = type("OwnExperts", (type(experts),), own)
    refused(ValueError, "OwnExperts computes its experts by itself", model)


def test_fp8_experts_are_refused():
    """They ask an interface of their own, in which ours does not stand."""
    model = tiny("qwen3_moe")
    config = transformers.FineGrainedFP8Config(weight_block_size=(8, 8))
    finegrained_fp8.replace_with_fp8_linear(model, ["q_proj"], config)
    refused(ValueError, "FP8Experts computes its experts by itself", model)


def test_mxfp4_experts_are_refused():
    """Those of gpt-oss as published; a dequantized checkpoint has experts like any other's."""
    model = tiny("gpt_oss")
    with torch.device("meta"):
        model.model.layers[1].mlp.experts = mxfp4.Mxfp4GptOssExperts(model.config)
    match = "Mxfp4GptOssExperts computes its experts by itself.*load it dequantized"
    refused(ValueError, match, model)


@pytest.mark.parametrize(
    ("kind", "match", "parameters", "options"),
    [
        (TypeError, "must be a list of names; got 'gate_up_proj'", "gate_up_proj", {}),
        (ValueError, r"no parameter matches \['gate_proj'\]", ["down_proj", "gate_proj"], {}),
        (ValueError, "near matches: .*gate_up_proj", ["gate_up_pro"], {}),
        (ValueError, "Qwen3MoeTopKRouter computes its experts by", ["gate.weight"], {}),
        (ValueError, "has no dropout; got 0.1", TARGETS, {"dropout": 0.1}),
        (ValueError, "has no precision; got 'split'", TARGETS, {"precision": "split"}),
        (ValueError, "has no scale_by_rms; got True", TARGETS, {"scale_by_rms": True}),
        (ValueError, r"experts.gate_up_proj: two_sided needs", TARGETS,
         {"transform": "two_sided", "r": 33}),
    ],
)  # fmt: skip
def test_targets_are_checked(kind, match, parameters, options):
    model = tiny("qwen3_moe")
    r = options.pop("r", 2)
    with pytest.raises(kind, match=match):
        inject(model, [], r, target_parameters=parameters, **options)
    assert not any(isinstance(module, HUTExperts) for module in model.modules())


def test_refuses_a_bias_as_a_stack():
    refused(ValueError, "gate_up_proj_bias is no stack", tiny("gpt_oss"), ["gate_up_proj_bias"])


def test_other_types_of_weights_are_refused():
    model = tiny("qwen3_moe")
    experts = experts_of(model)[0]
    experts.gate_up_proj = nn.Parameter(
        experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    refused(HUTBackendError, "float8_e4m3fn: dequantize the experts first", model)


def test_a_partitioned_parameter_is_refused():
    """DeepSpeed ZeRO-3 leaves parameters of size 0 that remember their shape."""
    model = tiny("qwen3_moe")
    for experts in experts_of(model):
        experts.gate_up_proj = nn.Parameter(torch.empty(0))
        experts.gate_up_proj.ds_shape = torch.Size((4, 48, 32))
    refused(HUTBackendError, "DeepSpeed ZeRO-3", model)


def test_offloaded_experts_are_refused():
    """Between calls accelerate leaves them on the meta device."""
    model = tiny("qwen3_moe")
    accelerate.cpu_offload(experts_of(model)[0], "cpu")
    refused(HUTBackendError, "gate_up_proj is offloaded", model)


def test_a_device_map_without_offloading_is_right():
    model = adapted("qwen3_moe")
    given = ids()
    expected = model(given).logits
    mapped = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    assert torch.equal(mapped(given).logits, expected)
    base = accelerate.dispatch_model(tiny("qwen3_moe"), {"": "cpu"}, force_hooks=True)
    inject(base, [], 3, target_parameters=TARGETS)
    before = base(given).logits
    shake(base)
    assert not torch.allclose(base(given).logits, before)


def test_a_device_map_that_offloads_is_refused(tmp_path):
    model = tiny("qwen3_moe")
    places = {"lm_head": "cpu", "model": "disk"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    refused(HUTBackendError, "gate_up_proj is offloaded", model)


def test_a_4_bit_model_has_experts_of_16_bits(tmp_path):
    """load_in_4bit passes experts by without a word: they are adapted as they are."""
    pytest.importorskip("bitsandbytes")
    tiny("qwen3_moe").bfloat16().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        dtype=torch.bfloat16,
    )
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    experts = experts_of(model)[0]
    assert experts.down_proj.dtype == torch.bfloat16
    inject(model, [], 3, target_parameters=TARGETS)
    given = ids()
    losses = train(model.train(), given, 6)
    assert losses[-1] < losses[0]


def test_quantized_experts_are_refused():
    """Stacks of torchao run under eager only; load_in_4bit leaves experts as they are."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    model = tiny("qwen3_moe", experts_implementation="eager").bfloat16()
    config = FqnToConfig({"re:.*experts.gate_up_proj": Int8WeightOnlyConfig(version=2)})
    quantize_(model, config, filter_fn=None)
    refused(HUTBackendError, r"quantized \(Int8Tensor\)", model)


def test_a_shift_without_a_bias_cannot_be_merged():
    model = adapted("qwen3_moe", scale_shift=True)
    given = ids()
    expected = model(given).logits
    with pytest.raises(ValueError, match="has no bias, so that the shift"):
        merge(model)
    assert torch.equal(model(given).logits, expected)
    merged = adapted("gpt_oss", scale_shift=True)
    expected = merged(given).logits
    close([merge(merged)(given).logits], [expected], 1e-5)
