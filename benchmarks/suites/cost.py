"""Costs of each method by count: operations, bytes and trainable parameters of a layer.

Of a model, operations of the linear layers of its blocks: what else it does is the same for every
method. Bytes are the fewest that the formula allows: of HUT, those of fused kernels, which store
neither W nor G. What a plan really moves is the planner's to say (`explain`). Nothing is measured
here, so a table of this suite is the same on every machine. A full product is `2 N O K` operations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..shapes import MODELS, Model, Shape

FEW_AND_ALL = ("few", "all")
RANKS = (16, 4, 8, 32, 64, 128)  # the first is the one of the tables that show one
Row = dict[str, Any]


def _nothing(shape: Shape, r: int, item: int, adapter: int) -> int:
    return 0


def _weight(shape: Shape, r: int, item: int, adapter: int) -> int:
    """A weight-sized tensor in the adapters' type."""
    return shape.in_features * shape.out_features * adapter


def _inner(shape: Shape, r: int, item: int, adapter: int) -> int:
    """The product x Aᵀ in the adapters' type."""
    return shape.tokens * r * adapter


def _computed_inner(shape: Shape, r: int, item: int, adapter: int) -> int:
    """The product x Aᵀ in the compute type."""
    return shape.tokens * r * item


def _computed_weight(shape: Shape, r: int, item: int, adapter: int) -> int:
    """W0 * (B A) in the compute type, and the factors in it where they had to be cast."""
    factors = r * (shape.in_features + shape.out_features) if adapter != item else 0
    return (shape.in_features * shape.out_features + factors) * item


def _wide_weight(shape: Shape, r: int, item: int, adapter: int) -> int:
    """W in the compute type, and W0 in float32 where that is another."""
    return shape.in_features * shape.out_features * (item + (adapter if adapter != item else 0))


@dataclass(frozen=True)
class Method:
    """The counts of one method.

    Attributes:
        label: What tables call it.
        products: Full products of forward and of backward.
        thin: Pairs of thin products, `2 N r (K + O)` operations, of forward and of backward.
        passes: Passes over a weight-sized matrix of `2 r O K` operations, of forward and backward:
            `B A` is one, each reduction of G another.
        by_rank: Whether a pass takes `2 r O K` operations; else `2 O K`.
        temporaries: Weight-sized temporaries of forward and backward.
        keeps_input: Whether backward needs x.
        casts_input: Whether x is kept in the adapters' type, as PEFT's layers do.
        kept: Bytes kept for backward beside x, of a shape, a rank, and the bytes of a number in
            the compute type and in the adapters'; None where it depends on more than these.
        trainable: Trainable numbers for `(in_features, out_features, r)`.
    """

    label: str
    products: tuple[int, int]
    thin: tuple[int, int] = (0, 0)
    passes: tuple[int, int] = (0, 0)
    by_rank: bool = True
    temporaries: tuple[int, int] = (0, 0)
    keeps_input: bool = True
    casts_input: bool = False
    kept: Callable[[Shape, int, int, int], int] | None = _nothing
    trainable: Callable[[int, int, int], int] = lambda K, O, r: r * (K + O)

    def operations(self, shape: Shape, r: int) -> tuple[int, int]:
        """Floating-point operations of forward and of backward."""
        N, K, O = shape
        depth = r if self.by_rank else 1
        forward, backward = (
            products * 2 * N * K * O + thin * 2 * N * r * (K + O) + passes * 2 * depth * K * O
            for products, thin, passes in zip(self.products, self.thin, self.passes, strict=True)
        )
        return forward, backward

    def moved(self, shape: Shape, r: int, item: int) -> tuple[int, int]:
        """The fewest bytes of forward and backward; a temporary is written once and read once."""
        N, K, O = shape
        weight, factors, x, y = (
            K * O * item,
            4 * self.trainable(K, O, r),
            N * K * item,
            N * O * item,
        )
        needs_x = x if self.keeps_input else 0
        return (
            weight + factors + x + y + 2 * self.temporaries[0] * weight,
            weight + 2 * factors + needs_x + y + x + 2 * self.temporaries[1] * weight,
        )

    def stack_kept(self, shape: Shape, r: int, depth: int, item: int, adapter: int) -> int | None:
        """Bytes out after the forward of `depth` square layers, the output's included.

        The stack's input is at hand before. A layer that keeps a cast copy of x lets x itself go.
        """
        if self.kept is None:
            return None
        extras = depth * self.kept(shape, r, item, adapter)
        activation = shape.tokens * shape.in_features
        if not self.keeps_input:
            return activation * item + extras
        if self.casts_input and adapter != item:
            return activation * (item + depth * adapter) + extras
        return activation * item * depth + extras


def _hut(label: str, by_rank: bool, vectors: int) -> dict[str, Any]:
    def trainable(K: int, O: int, r: int) -> int:
        return r * (K + O) + vectors * O

    return {
        "label": label,
        "products": (1, 2),
        "passes": (1, 3),  # T; T again, and two reductions of G
        "by_rank": by_rank,
        "trainable": trainable,
    }


def _hut_eager(label: str, by_rank: bool, vectors: int, **kept: Any) -> dict[str, Any]:
    fused = _hut(label, by_rank, vectors)
    return {**fused, "passes": (1, 2), "temporaries": (3, 2), **kept}  # T itself is kept


METHODS = {
    "full": Method("full fine-tuning", (1, 2), temporaries=(0, 1), trainable=lambda K, O, r: K * O),
    "frozen": Method("frozen linear", (1, 1), keeps_input=False, trainable=lambda K, O, r: 0),
    "lora": Method("LoRA, lean", (1, 1), thin=(1, 2), kept=_computed_inner),
    "peft_lora": Method("LoRA (PEFT)", (1, 1), thin=(1, 2), casts_input=True, kept=_inner),
    "hira": Method(
        "HiRA, plain PyTorch", (2, 3), passes=(1, 2), temporaries=(2, 2), kept=_computed_weight
    ),
    "peft_hira": Method(
        "HiRA (PEFT)",
        (2, 3),
        passes=(1, 2),
        temporaries=(2, 2),
        casts_input=True,
        kept=_weight,
    ),
    "peft_loha": Method(
        "LoHa (PEFT)",
        (2, 3),
        passes=(2, 6),  # two products B A; both again, and four gradients
        temporaries=(3, 4),
        casts_input=True,
        kept=_weight,
        trainable=lambda K, O, r: 2 * r * (K + O),
    ),
    "hut_low_rank": Method(**_hut("HUT low_rank", True, 0)),
    "hut_two_sided": Method(**_hut("HUT paper's form", False, 2)),
    "hut_low_rank_eager": Method(
        **_hut_eager("HUT low_rank, plain PyTorch", True, 0, kept=_wide_weight)
    ),
    "hut_two_sided_eager": Method(
        **_hut_eager("HUT paper's form, plain PyTorch", False, 2, kept=None)
    ),
}
# Full products that the formula itself needs, however it is written: the floor of a share.
NEEDED = {name: (1, 1) if method.products == (1, 1) else (1, 2) for name, method in METHODS.items()}


def adaptation_per_weight(method: str, r: int) -> int:
    """Operations, for each weight, that make the adapted weight from W0: a merged layer's cost.

    LoRA and HiRA form `B A` and add it, or multiply by it: `2 r + 1`; LoHa does so twice. The
    two-sided form multiplies by two factors: 2, whatever r is. That is the paper's saving.
    """
    if not METHODS[method].by_rank:
        return 2
    return (2 * r + 1) * (2 if method == "peft_loha" else 1)


def adapted_share(model: Model, targets: str) -> float:
    """The share f of the blocks' linear work that lies in adapted layers."""
    names = model.adapted(targets)
    sizes = {p.name: p.in_features * p.out_features for p in model.projections}
    return sum(sizes[name] for name in names) / sum(sizes.values())


def step_ratio(f: float, c: int) -> float:
    """A HUT step's full products over a LoRA step's: the third product in a share f of the work.

    Args:
        f: The adapted share.
        c: Forwards computed again: 1 under full activation checkpointing.
    """
    return (2 + c + f) / (2 + c)


def model_operations(model: Model, method: str, targets: str, tokens: int, r: int, c: int) -> int:
    """Operations of a step of the blocks' linear layers."""
    adapted, total = model.adapted(targets), 0
    for name, K, O in model.projections:
        counts = METHODS[method if name in adapted else "frozen"]
        forward, backward = counts.operations(Shape(tokens, K, O), r)
        total += (1 + c) * forward + backward
    return model.blocks * total


def layer_rows(shapes: Sequence[Shape], ranks: Sequence[int], item: int = 2) -> Iterator[Row]:
    """Every method's counts on each shape at each rank; 16-bit numbers unless told otherwise."""
    for shape in shapes:
        for r in ranks:
            lora = sum(METHODS["lora"].operations(shape, r))
            for name, method in METHODS.items():
                operations, moved = method.operations(shape, r), method.moved(shape, r, item)
                yield {
                    "suite": "cost",
                    "provider": name,
                    "label": method.label,
                    "case": {"what": "layer", **shape._asdict(), "r": r},
                    "counts": {
                        "forward_products": method.products[0],
                        "backward_products": method.products[1],
                        "step_operations": sum(operations),
                        "step_over_lora": sum(operations) / lora,
                        "step_bytes": sum(moved),
                        "temporaries": max(method.temporaries),
                        "adaptation_per_weight": _adaptation(name, r),
                        "trainable": method.trainable(shape.in_features, shape.out_features, r),
                    },
                }


def _adaptation(name: str, r: int) -> int | None:
    return None if name in ("full", "frozen") else adaptation_per_weight(name, r)


def model_rows(names: Sequence[str], tokens: int, r: int) -> Iterator[Row]:
    """Steps of whole models by HUT and by others, beside LoRA's."""
    for name in names:
        model = MODELS[name]
        for targets in FEW_AND_ALL:
            for c in (0, 1):
                lora = model_operations(model, "lora", targets, tokens, r, c)
                f = adapted_share(model, targets)
                for method in ("lora", "hut_low_rank", "hut_two_sided", "peft_hira", "full"):
                    trained = "all" if method == "full" else targets
                    taken = model_operations(model, method, trained, tokens, r, c)
                    yield {
                        "suite": "cost",
                        "provider": method,
                        "label": METHODS[method].label,
                        "case": {
                            "what": "model",
                            "model": name,
                            "targets": "+".join(model.few) if targets == "few" else "all",
                            "checkpointing": bool(c),
                            "tokens": tokens,
                            "r": r,
                        },
                        "counts": {
                            "step_operations": taken,
                            "step_over_lora": taken / lora,
                            "adapted_share": f,
                            "third_product_alone": step_ratio(f, c),
                        },
                    }
