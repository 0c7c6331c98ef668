"""A small GPT of plain `nn.Linear` layers, so that any adapter fits into it: of all examples."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ["q", "k", "v", "o", "up", "down"]  # every linear layer of every block


@dataclass(frozen=True)
class GPTConfig:
    width: int
    depth: int
    heads: int
    context: int
    vocabulary: int = 256  # bytes


class Block(nn.Module):
    """Pre-norm attention and MLP; queries, keys and values are layers of their own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.head_size = width // config.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            # [batch, heads, time, size]; under tensor parallelism a rank has some of the heads
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and a tied output layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Large embeddings, and a residual stream that begins almost empty: it learns sooner."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.6 / module.in_features**0.5)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in (block.o, block.down):
                nn.init.normal_(layer.weight, std=0.05 / (2 * self.config.depth) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, time, vocabulary]` of the token after each of `[batch, time]`."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)

    def losses(self, window: Tensor) -> Tensor:
        """Cross entropy in nats, `[batch, time]`, over `window` `[batch, time + 1]`."""
        logits = self(window[:, :-1]).float()
        return F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")


def windows(data: Tensor, starts: Tensor, context: int) -> Tensor:
    """The `context + 1` bytes from each of `starts` on, as int64 `[len(starts), context + 1]`."""
    return data[starts[:, None] + torch.arange(context + 1, device=data.device)].long()
