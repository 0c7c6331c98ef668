"""HUTConfig over quantized models: trained, saved, loaded, merged, and never misread."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from hut_kernels import formats
from hut_kernels.errors import HUTBackendError
from hut_kernels.integrations.peft import HUTConfig
from hut_kernels.integrations.peft.quantized import QuantizedLinear

from ..formats.weights import (
    assert_compiles_alike,
    bnb,
    four_bit,
    linear4bit,
    linear8bit,
    repacked,
)
from ..references import error


class Model(nn.Module):
    """A model as a quantizer of transformers leaves one: the head is not quantized."""

    is_loaded_in_4bit = True

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = linear4bit(dtype=dtype)
        self.second = linear8bit(64, 96, bias=False)
        self.head = nn.Linear(64, 7)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(model=None, **options):
    model = Model() if model is None else model
    return get_peft_model(model, HUTConfig(target_modules=["first", "second"], r=4, **options))


def randomized(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hut_" in name:
                parameter.add_(torch.randn_like(parameter) / 8)
    return model


FORMS = {
    "residual": {},
    "paper": {"transform": "two_sided", "scale_shift": True},
    "split": {"precision": "split"},
    "dropout": {"hut_dropout": 0.5},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
def test_a_fresh_adapter_is_the_base_in_training(form):
    base = Model().train()
    x = torch.randn(5, 64)
    expected = base(x)
    model = adapted(base, **form)
    assert isinstance(model.base_model.first, QuantizedLinear)
    assert error(model(x), expected.detach().double()) < 2e-6
    model.eval()
    assert error(model(x), expected.detach().double()) < 2e-6


@every_form
def test_training(form):
    model = adapted(**form)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    x, target = torch.randn(16, 64), torch.randn(16, 7)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prepared_for_kbit_training(checkpointing):
    model = prepare_model_for_kbit_training(Model(), use_gradient_checkpointing=False)
    model = adapted(model)
    x = torch.randn(5, 64)
    if checkpointing:
        y = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
    else:
        y = model(x)
    y.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "hut_B" in n}
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_base_forwards_are_never_called(monkeypatch):
    model = randomized(adapted())
    model.add_adapter("other", HUTConfig(target_modules=["first"], r=2, hut_dropout=0.5))
    for layer in (model.base_model.first, model.base_model.second):
        monkeypatch.setattr(type(layer.base_layer), "forward", None)
    x = torch.randn(5, 64)
    model(x)
    with model.disable_adapter():
        model(x)
    model.base_model.set_adapter(["default", "other"])
    model(x)
    model.eval()(x)


def test_disabled_adapters_are_the_base_to_the_bit():
    base = Model(torch.bfloat16).train()
    x = torch.randn(5, 64)
    expected = base(x)
    model = randomized(adapted(base))
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert error(model(x), expected.detach().double()) < 2e-6
        layer = model.base_model.first
        assert torch.equal(layer(x), layer.base_layer(x))


def test_several_adapters_add_what_each_does():
    model = randomized(adapted())
    model.add_adapter("other", HUTConfig(target_modules=["first"], r=2))
    randomized(model)
    layer, x = model.base_model.first, torch.randn(5, 64)
    outs = []
    for active in ([], ["default"], ["other"], ["default", "other"]):
        layer.set_adapter(active)
        outs.append(layer(x).double())
    none, one, two, both = outs
    assert error(both, (one + two - none).detach()) < 2e-6


def test_an_evaluated_base_keeps_right_gradients():
    base = linear4bit(dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    model = nn.Sequential(base)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = model.train()(x)
    repacked(base)
    model = get_peft_model(model, HUTConfig(target_modules=["0"], r=4))
    x.requires_grad_()
    y = model(x)
    assert error(y, expected.detach().double()) < 8e-3
    y.sum().backward()
    assert x.grad.abs().max() > 0


def test_saved_and_loaded_onto_a_quantized_base(tmp_path):
    torch.manual_seed(0)
    model = randomized(adapted(scale_shift=True))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Model(), tmp_path)
    x = torch.randn(5, 64)
    assert torch.equal(again(x), model.eval()(x))


def test_merge_and_unload_gives_dense_layers():
    model = randomized(adapted(Model(torch.bfloat16), scale_shift=True))
    x = torch.randn(5, 64)
    y = model.eval()(x)
    with pytest.warns(UserWarning, match="2 quantized weights dense"):
        merged = model.merge_and_unload()
    assert [type(m) for m in (merged.first, merged.second)] == [nn.Linear, nn.Linear]
    assert merged.second.weight.dtype == torch.float32  # the model's, since the int8 layer has none
    merged.first.to(torch.float32)
    assert error(merged(x), y.detach().double()) < 8e-3


def test_a_merged_transformers_model_is_no_longer_marked(tmp_path):
    """Cast, saved and loaded as the dense model that it is."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, HUTConfig(r=4, target_modules="all-linear"))
    randomized(model)
    ids = torch.randint(3, 96, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        y = model.eval()(input_ids=ids).logits
    with pytest.warns(UserWarning, match="quantized weights dense"):
        merged = model.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    with torch.no_grad():
        assert error(merged(input_ids=ids).logits, y.double()) < 5e-2
        assert torch.equal(again(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_unload_gives_the_base_back():
    base = Model()
    layers = base.first, base.second
    model = randomized(adapted(base)).unload()
    assert (model.first, model.second) == layers


def test_merging_into_few_bits_is_refused():
    model = randomized(adapted())
    with pytest.raises(HUTBackendError, match=r"Linear4bit: .*merge_and_unload\(\)"):
        model.merge_adapter()


def test_a_merged_update_is_lost_in_four_bits():
    """The reason for that: of an update of 1 % a tenth is left, under as much noise."""
    W0 = formats.stored(four_bit(torch.randn(512, 512))).dense(torch.float32)
    update = W0 * (torch.randn(512, 8) @ torch.randn(8, 512))
    update *= 0.01 * W0.norm() / update.norm()
    found = formats.stored(four_bit(W0 + update)).dense(torch.float32) - W0
    assert 0.08 < (found * update).sum() / update.square().sum() < 0.13
    assert 1.3 < error(found, update.double()) < 1.5


def test_the_update_of_a_weight():
    model = randomized(adapted())
    x = torch.eye(64)
    layer = model.base_model.first
    with model.disable_adapter():
        base = layer(x)
    delta = layer.get_delta_weight("default")
    assert error((layer(x) - base).T, delta.double()) < 1e-5


def test_hooks_on_a_base_layer_are_not_passed_over():
    model = adapted()
    model.base_model.first.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(HUTBackendError, match="carries hooks"):
        model(torch.randn(5, 64))


def test_used_together_with_lora():
    """Nothing of LoRA's own path over quantized layers is touched."""
    model = get_peft_model(Model(), LoraConfig(target_modules=["first"], r=4))
    assert model.train()(torch.randn(5, 64)).shape == (5, 7)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_copied_and_pickled(evaluated, nested, storage):
    base = linear4bit(nested=nested, storage=storage)
    if evaluated:
        repacked(base)
    model = randomized(get_peft_model(nn.Sequential(base), HUTConfig(target_modules=["0"], r=4)))
    x = torch.randn(5, 64, requires_grad=True)
    y = model(x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert torch.equal(other(x), y)
        assert torch.equal(torch.autograd.grad(other(x).sum(), x)[0], d_x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("evaluated", [False, True])
def test_compiled_without_a_break(evaluated):
    torch.compiler.reset()
    base = Model()
    if evaluated:
        repacked(base.first)
    model, x = randomized(adapted(base, scale_shift=True)), torch.randn(9, 64)
    assert_compiles_alike(model, x)


# Memory


@pytest.mark.parametrize("form", [FORMS["residual"], FORMS["paper"], FORMS["split"]], ids=str)
def test_backward_keeps_x_and_nothing_else(form):
    """Beside what the model holds anyway; for each layer."""
    model = randomized(adapted(**form)).base_model.model
    for layer in (model.first, model.second):
        x, kept = torch.randn(5, layer.in_features, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=kept: to.append(t) or t, id):
            layer(x)
        weight = formats.stored(formats.base_weight(layer.base_layer))
        own = {t.data_ptr() for t in (weight.data, *weight.scales, *layer.parameters())}
        assert [t.data_ptr() for t in kept if t.data_ptr() not in own] == [x.data_ptr()]


def alive():
    """Bytes of all tensors that there are."""
    gc.collect()
    plain = (torch.Tensor, nn.Parameter, bnb.nn.Params4bit)
    tensors = [t for t in gc.get_objects() if type(t) in plain]
    # What a test of torch.func left has no storage of its own.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    storages = [t.untyped_storage() for t in tensors if not wrapped(t)]
    return sum({s._cdata: s.nbytes() for s in storages if s.device.type == "cpu"}.values())


def resident(config, width, layers):
    """Bytes that an adapted model over NF4 holds after a step, its workspaces included."""

    def measured():
        before = alive()
        base = nn.Sequential(
            *(linear4bit(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers))
        )
        base.is_loaded_in_4bit = True
        model = get_peft_model(base, config).train()
        model(torch.randn(64, width, dtype=torch.bfloat16)).float().square().mean().backward()
        model.zero_grad()
        return alive() - before

    with ThreadPoolExecutor(1) as pool:  # workspaces are a thread's
        return pool.submit(measured).result()


def test_a_model_holds_what_qlora_does_and_one_workspace():
    """And tiles of a fixed size, whatever the model is."""
    width, layers, targets = 1024, 4, r"\d+"
    qlora = resident(LoraConfig(r=8, target_modules=targets), width, layers)
    assert qlora > layers * width * width / 2
    hut = resident(HUTConfig(r=8, target_modules=targets), width, layers)
    # 2 MiB of tiles of 2^18 weights: an index and two float32 for each byte of codes, and W0.
    workspace, tiles = 2 * width * width, 9 << 18
    assert hut <= qlora + workspace + tiles
