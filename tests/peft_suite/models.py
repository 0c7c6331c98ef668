"""Tiny random models under the names that PEFT's tests load from the hub."""

from pathlib import Path

import peft
import torch
import transformers as tf

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_ENCODER = _SMALL | {"intermediate_size": 37}
_LLAMA = _SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
_DEBERTA = _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_TOKENS = {"bos_token_id": 97, "eos_token_id": 98}


def _opt():
    config = tf.OPTConfig(
        vocab_size=99, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, ffn_dim=37,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    return tf.OPTForCausalLM(config)


def _gpt2():
    config = tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, **_TOKENS)
    return tf.GPT2LMHeadModel(config)


def _gptj():
    config = tf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **_TOKENS)
    return tf.GPTJForCausalLM(config)


def _gemma3():
    config = tf.Gemma3TextConfig(**_LLAMA, head_dim=8)
    return tf.Gemma3ForCausalLM(config)


def _t5():
    config = tf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def _bart():
    config = tf.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=37,
        decoder_ffn_dim=37, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=128, decoder_start_token_id=2,
    )  # fmt: skip
    return tf.BartForConditionalGeneration(config)


def _llama_classifier():
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**_LLAMA, num_labels=2))


MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**_LLAMA)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**_LLAMA)
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: tf.RobertaModel(
        tf.RobertaConfig(**_ENCODER)
    ),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: tf.DebertaModel(
        tf.DebertaConfig(**_DEBERTA)
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(**_DEBERTA)
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: (
        tf.BertForSequenceClassification(tf.BertConfig(**_ENCODER))
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: (
        tf.RobertaForSequenceClassification(tf.RobertaConfig(**_ENCODER))
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _llama_classifier,
}


def make_models(directory: Path) -> None:
    """Saves each model, and one LoRA configuration, in a folder of its name under `directory`.

    Models that are there already stay. Run from `directory`, `from_pretrained(name)` then
    finds a local folder, and needs no hub.
    """
    tf.utils.logging.disable_progress_bar()
    for name, make in MODELS.items():
        if not (directory / name / "config.json").exists():
            torch.manual_seed(0)
            make().save_pretrained(directory / name)
    peft.LoraConfig().save_pretrained(directory / "peft-internal-testing/tiny-opt-lora-revision")
