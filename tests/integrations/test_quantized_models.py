"""Models that transformers quantizes, under HUTConfig: trained by its Trainer, saved, loaded."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from hut_kernels import formats, inject
from hut_kernels.integrations.peft import HUTConfig
from hut_kernels.integrations.peft.quantized import QuantizedLinear

from ..formats.weights import bnb, repacked

TOKENS = 96
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=TOKENS, max_position_embeddings=32,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=TOKENS, n_positions=32),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each small model, before quantization."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def four_bits(**options):
    options = {"bnb_4bit_compute_dtype": torch.float32, **options}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


def load(folder, config=None, dtype=torch.float32):
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, **given
    )


def adapted(base, **options):
    torch.manual_seed(1)
    config = HUTConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(base, config)


def dense_twin(model):
    """A copy whose quantized layers are plain ones of the weights that theirs dequantize to."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            weight = formats.dense(formats.base_weight(layer), torch.float32)
            plain = nn.Linear(*weight.shape[::-1], bias=layer.bias is not None)
            plain.weight.data = weight
            if layer.bias is not None:
                plain.bias.data = layer.bias.detach().float()
            twin.set_submodule(name, plain)
    formats.forget_quantization(twin)
    return twin.requires_grad_(False)


def data():
    rows = torch.randint(3, TOKENS, (16, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model, folder, steps=4, **options):
    """A run of a few steps, which saves after each second one and evaluates after each."""
    torch.manual_seed(2)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, logging_steps=1, eval_strategy="steps",
        eval_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", seed=3, use_cpu=True,
        per_device_train_batch_size=4, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data()[:4])


def losses(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if key in entry]


def trained(model, folder, steps=4, **options):
    run = trainer(model, folder, steps, **options)
    run.train()
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=data()[0]["input_ids"][None]).logits


@pytest.mark.parametrize("bits", [four_bits(bnb_4bit_use_double_quant=True), EIGHT_BITS], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_the_trainer_trains_as_over_the_dequantized_weights(
    folders, tmp_path, bits, name, reentrant
):
    """In float32, with gradient checkpointing and without; evaluated after each step."""
    base = load(folders / name, bits)
    runs = []
    for model in (base, dense_twin(base)):
        if model is base:
            kwargs = {"use_reentrant": reentrant}
            model = prepare_model_for_kbit_training(model, reentrant is not None, kwargs)
        runs.append(trained(adapted(model), tmp_path))
    layers = [m for m in runs[0].model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * {"llama": 7, "gpt2": 4}[name]
    for key in ("loss", "eval_loss"):
        found, expected = (losses(run, key) for run in runs)
        assert found == pytest.approx(expected, rel=1e-5)
        assert found[-1] < found[0]


def test_the_trainer_in_bf16(folders, tmp_path):
    """Autocast, and a base that computes in bfloat16: factors and their gradients stay float32."""
    base = load(folders / "llama", four_bits(bnb_4bit_compute_dtype=torch.bfloat16), torch.bfloat16)
    twin = dense_twin(base)
    model = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={})
    run = trained(adapted(model), tmp_path, bf16=True)
    factors = [p for p in run.model.parameters() if p.requires_grad]
    assert {p.dtype for p in factors} == {torch.float32}
    expected = losses(trained(adapted(twin.float()), tmp_path, bf16=True))
    # Rounded to bfloat16 (4e-3) at other places than the twin, whose weights are float32.
    assert losses(run) == pytest.approx(expected, rel=5e-3)
    assert losses(run)[-1] < losses(run)[0]


def test_the_trainer_asks_for_peft(folders, tmp_path):
    """Over a quantized model it refuses any adapters but PEFT's; docs/quantized.md says so."""
    base = load(folders / "llama", four_bits())
    inject(base, "all-linear", r=4)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(base, tmp_path)


@pytest.mark.parametrize("bits", [four_bits(), EIGHT_BITS], ids=["nf4", "int8"])
def test_the_trainer_resumes(folders, tmp_path, bits):
    """Six steps, or two and four from the checkpoint: the same losses to the bit."""

    def fresh():
        model = prepare_model_for_kbit_training(load(folders / "llama", bits))
        return adapted(model, scale_shift=True, hut_dropout=0.1)

    whole = trained(fresh(), tmp_path / "whole", 6)
    resumed = trainer(fresh(), tmp_path / "resumed", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "eval_loss") == losses(whole, "eval_loss")
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.parametrize(
    "bits",
    [four_bits(), four_bits(bnb_4bit_use_double_quant=True), EIGHT_BITS],
    ids=["nf4", "nested", "int8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_fits_its_base_however_that_is_loaded(folders, tmp_path, bits, dtype):
    """Quantized anew, or read from a checkpoint in few bits."""
    base = load(folders / "llama", bits, dtype)
    base.save_pretrained(tmp_path / "base")
    run = trained(adapted(base), tmp_path / "run", 2)
    run.model.save_pretrained(tmp_path / "adapter")
    expected = logits(run.model)
    for base in (load(folders / "llama", bits, dtype), load(tmp_path / "base", None, dtype)):
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert any(isinstance(m, QuantizedLinear) for m in model.modules())
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
def test_a_base_that_was_evaluated_first_trains_on_after_each_checkpoint(folders, tmp_path, nested):
    """An evaluation repacks it; each checkpoint asks for its state_dict, which undoes that."""
    base = load(folders / "llama", four_bits(bnb_4bit_use_double_quant=nested))
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            repacked(layer)
    state = base.model.layers[0].mlp.up_proj.weight.quant_state
    twin = dense_twin(base)
    found, expected = (losses(trained(adapted(m), tmp_path)) for m in (base, twin))
    assert not state.packing_format_for_cpu
    # Doubly quantized, absmax is quantized a second time.
    assert found == pytest.approx(expected, rel=1e-2 if nested else 1e-5)
