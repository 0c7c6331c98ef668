"""A small model and its state, for the tests of inject, merge and adapter files."""

import pytest
import torch
from torch import nn

from hut_kernels.nn import PAPER, HUTLinear

OPTIONS = {
    "residual": {"r": 3, "alpha": 6, "dropout": 0.25},
    "direct": {"r": 2, "offset": 0, "factor_dtype": torch.bfloat16},
    "two_sided": {"r": 4, "transform": "two_sided", "precision": "split"},
    "paper": {"r": 4, "factor_dtype": torch.float64, **PAPER},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Conv1D(nn.Module):
    """A stand-in for the Conv1D of transformers."""

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
