"""Shapes to measure: as numbers, or as the linear layers of models that people fine-tune."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """N tokens through a weight `[out_features, in_features]`."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.in_features}x{self.out_features}"


class Projection(NamedTuple):
    """A linear layer that every block of a model has."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Model:
    """The linear layers of a transformer's blocks; embeddings and heads are not among them.

    Attributes:
        blocks: How many there are.
        projections: What each has.
        few: The projections that papers adapt; the alternative is all of them.
    """

    blocks: int
    projections: tuple[Projection, ...]
    few: tuple[str, ...]

    def adapted(self, targets: str) -> tuple[str, ...]:
        """The names of the adapted projections, for `"few"` or `"all"`."""
        return self.few if targets == "few" else tuple(p.name for p in self.projections)

    @property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """The different `(in_features, out_features)`, in order."""
        return tuple(dict.fromkeys((p.in_features, p.out_features) for p in self.projections))


def _bert(blocks: int, d: int) -> Model:
    square = tuple(Projection(name, d, d) for name in ("query", "key", "value", "output"))
    mlp = (Projection("intermediate", d, 4 * d), Projection("mlp_output", 4 * d, d))
    return Model(blocks, square + mlp, ("query", "value"))


def _gpt2(blocks: int, d: int) -> Model:
    projections = (
        Projection("c_attn", d, 3 * d),
        Projection("attn_c_proj", d, d),
        Projection("c_fc", d, 4 * d),
        Projection("mlp_c_proj", 4 * d, d),
    )
    return Model(blocks, projections, ("c_attn",))


def _llama(blocks: int, d: int, key_value: int, mlp: int) -> Model:
    projections = (
        Projection("q_proj", d, d),
        Projection("k_proj", d, key_value),
        Projection("v_proj", d, key_value),
        Projection("o_proj", d, d),
        Projection("gate_proj", d, mlp),
        Projection("up_proj", d, mlp),
        Projection("down_proj", mlp, d),
    )
    return Model(blocks, projections, ("q_proj", "v_proj"))


MODELS = {
    "roberta-base": _bert(12, 768),
    "roberta-large": _bert(24, 1024),
    "gpt2-medium": _gpt2(24, 1024),
    "llama-3.2-1b": _llama(16, 2048, 512, 8192),
    "llama-3.1-8b": _llama(32, 4096, 1024, 14336),
}


def parsed(texts: Sequence[str], tokens: Sequence[int]) -> list[Shape]:
    """Shapes from `INxOUT` or a model's name, at each number of tokens; or from `TOKENSxINxOUT`.

    Raises:
        ValueError: A text that is none of these.
    """
    shapes: dict[Shape, None] = {}
    for text in texts:
        if text in MODELS:
            weights: Sequence[tuple[int, ...]] = MODELS[text].weights
        else:
            weights = [_sizes(text)]
        for sizes in weights:
            found = [Shape(*sizes)] if len(sizes) == 3 else [Shape(n, *sizes) for n in tokens]
            shapes.update(dict.fromkeys(found))
    return list(shapes)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"{text!r} is no shape: give INxOUT, TOKENSxINxOUT, or one of {', '.join(MODELS)}"
        )
    return tuple(int(part) for part in parts)
