"""Small models with HUT layers, as training meets them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hut_kernels import HUTLinear, inject

FORMS = {
    "residual": {"alpha": 6.0},
    "direct": {"offset": 0.0},
    "paper": {"transform": "two_sided", "scale_shift": True},
    "split": {"precision": "split", "scale_shift": True},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

WIDTH = 16


class Block(nn.Module):
    """A pre-norm transformer block: attention over 2 heads, then a GELU MLP."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, 2, width // 2).unbind(2)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def moved(model):
    """The model with factors that are no longer those of the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HUTLinear):
                for _, factor in module.named_factors():
                    factor.add_(torch.randn_like(factor), alpha=0.2)
    return model


def layer(sizes=(WIDTH, 12), r=3, **options):
    return moved(HUTLinear(*sizes, r=r, **options))


def block(r=3, **options):
    model = Block()
    inject(model, ["qkv", "proj", "up", "down"], r=r, **options)
    return moved(model)


def gpt2(**options):
    """GPT-2 of transformers from its config, HUT in every projection (Conv1D)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=2, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    inject(model, ["c_attn", "c_proj", "c_fc"], r=3, **options)
    return moved(model)


def roberta(**options):
    """RoBERTa of transformers from its config, HUT in query and value as in the paper."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.RobertaConfig(
        vocab_size=31, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=70, num_labels=3,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    inject(model, ["query", "value"], r=3, **options)
    return moved(model)


def twin(model):
    """A copy that shares nothing, to compare with."""
    return copy.deepcopy(model)


def gradients(model):
    """The gradient of each trainable parameter, by name; all of them must have one."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in found.items() if grad is None]
    assert found, "nothing is trainable"
    assert not missing, f"no gradient: {missing}"
    return found


def assert_same_gradients(model, other, **tolerance):
    ours, theirs = gradients(model), gradients(other)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, theirs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
