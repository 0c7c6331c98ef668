"""Small models, and formulas in float64, for the tests of the PEFT integration."""

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

from hut_kernels.versions import release

# transformers 5.24.0 wants PEFT 0.22, which is not out: its add_adapter raises for every method.
MISMATCH = (
    f"transformers {transformers.__version__} wants PEFT {MIN_PEFT_VERSION} for add_adapter; "
    f"{peft.__version__} is installed"
    if release(peft.__version__) < release(MIN_PEFT_VERSION)
    else ""
)
needs_add_adapter = pytest.mark.skipif(bool(MISMATCH), reason=MISMATCH)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


class Net(nn.Module):
    """Two linear layers with a Conv1D between them, an embedding and a convolution."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 24)
        self.first = nn.Linear(24, 40)
        self.middle = Conv1D(20, 40)
        self.last = nn.Linear(20, 12, bias=False)
        self.conv = nn.Conv2d(1, 3, 2)
        nn.init.normal_(self.middle.weight, std=0.2)
        nn.init.normal_(self.middle.bias)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


LAYERS = ["first", "middle", "last"]


def llama(**options):
    config = LlamaConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=64,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def bert():
    config = BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=64, num_labels=3)
    return BertForSequenceClassification(config)


def multiplier(layer, name="default"):
    """T of one adapter of a HUT layer, in float64, from docs/definition.md."""
    A, B = layer.hut_A[name].detach().double(), layer.hut_B[name].detach().double()
    form = layer.hut_form[name]
    r = A.shape[0]
    if form.transform == "two_sided":
        q = [i * r // layer.in_features for i in range(layer.in_features)]
        p = [o * r // layer.out_features for o in range(layer.out_features)]
        return B[:, q] * A[p]
    return form.offset + layer.scaling[name] * B @ A


def weight_and_bias(layer, names=("default",)):
    """The effective weight `[out, in]` and bias of a HUT layer under `names`, in float64."""
    base = layer.get_base_layer()
    W0 = base.weight.detach().double()
    W0 = W0.t() if isinstance(base, Conv1D) else W0
    b0 = torch.zeros(len(W0)).double() if base.bias is None else base.bias.detach().double()
    weight, bias = W0.clone(), b0.clone()
    for name in names:
        gamma = beta = None
        if name in layer.hut_gamma:
            gamma = layer.hut_gamma[name].detach().double()
            beta = layer.hut_beta[name].detach().double()
        T = multiplier(layer, name)
        weight += (W0 * T if gamma is None else gamma[:, None] * W0 * T) - W0
        bias += 0 if gamma is None else gamma * b0 + beta - b0
    return weight, bias
