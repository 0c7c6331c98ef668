"""The model suite: whole training steps of RoBERTa-large and GPT-2 medium, random weights.

Or of any transformers configuration; nothing is downloaded. A step is forward, loss,
backward and AdamW over the adapters; embeddings, heads and everything else are frozen.
"""

import gc
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels.nn import is_conv1d

from .. import bases
from ..bases import DENSE
from ..measure import Call, Quantiles, interleaved, peak_bytes, ratios, survived
from ..methods import sharing_copy
from ..providers import PROVIDERS
from . import cost
from .layer import labels

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A model of transformers to build, dropout off, weights random.

    Attributes:
        kind: Its class.
        options: Of its configuration, `model_type` among them.
        few: Names of the layers that papers adapt.
    """

    kind: str
    options: Mapping[str, Any]
    few: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: str) -> "Recipe":
        """A model by the configuration in a file or a directory.

        Raises:
            ValueError: There is none, or transformers knows no such model.
        """
        import transformers

        place = Path(file)
        place = place / "config.json" if place.is_dir() else place
        try:
            options = json.loads(place.read_text())
            transformers.AutoConfig.for_model(**options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            known = ", ".join(RECIPES)
            raise ValueError(
                f"a model is one of {known}, or the file or folder of a transformers "
                f"configuration (nothing is downloaded); got {file!r} "
                f"({str(error).splitlines()[0]})"
            ) from error
        kind = (options.get("architectures") or ["AutoModelForCausalLM"])[0]
        return cls(kind, options)

    def config(self, blocks: int | None = None) -> Any:
        """The configuration, with so many blocks where told."""
        import transformers

        config = transformers.AutoConfig.for_model(**self.options)
        if blocks is not None:
            config.num_hidden_layers = blocks
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:blocks]
        return config

    @property
    def blocks(self) -> int:
        return self.config().num_hidden_layers

    def build(self, blocks: int | None = None) -> nn.Module:
        """The frozen model, in training mode."""
        import transformers

        transformers.logging.set_verbosity_error()  # on checkpoints and generation
        kind = getattr(transformers, self.kind)
        config = self.config(blocks)
        model = (
            kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
        )
        return model.train().requires_grad_(False)

    def names(self, targets: str, model: nn.Module) -> list[str]:
        """Names of the layers to adapt: `"few"`, `"all"` of the blocks, or those joined by `+`."""
        if targets == "few" and self.few:
            return list(self.few)
        if targets not in ("few", "all"):
            return targets.split("+")
        linear = {
            name.rpartition(".")[2]: None
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or is_conv1d(module)) and re.search(r"\.\d+\.", name)
        }
        return list(linear)

    def pattern(self, targets: str, model: nn.Module) -> str:
        """A regular expression of the whole names of the layers to adapt."""
        return rf".*\.\d+\.(?:.*\.)?(?:{'|'.join(self.names(targets, model))})"

    def batch(self, batch: int, sequence: int, device: torch.device) -> dict[str, Tensor]:
        """Random tokens, and labels: the tokens themselves, or a class for a classifier."""
        size = (batch, sequence)
        tokens = torch.randint(5, self.config().get_text_config().vocab_size, size, device=device)
        labels = tokens[:, 0] % 2 if "Classification" in self.kind else tokens
        return {"input_ids": tokens, "labels": labels}


def _roberta(blocks: int, width: int, heads: int) -> Recipe:
    """A classifier, as for GLUE."""
    options = {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": width,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "intermediate_size": 4 * width,
        "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "num_labels": 2,
    }  # fmt: skip
    return Recipe("RobertaForSequenceClassification", options, ("query", "value"))


def _decoder(
    kind: str, vocabulary: int, blocks: int, width: int, heads: int, key_value: int, mlp: int,
    tied: bool = False,
) -> Recipe:  # fmt: skip
    options = {
        "model_type": kind.lower(), "vocab_size": vocabulary, "num_hidden_layers": blocks,
        "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": key_value,
        "intermediate_size": mlp, "tie_word_embeddings": tied,
    }  # fmt: skip
    return Recipe(f"{kind}ForCausalLM", options, ("q_proj", "v_proj"))


_GPT2 = {
    "model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
RECIPES = {
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
    "gpt2-medium": Recipe("GPT2LMHeadModel", _GPT2, ("c_attn",)),
    "llama-3.2-1b": _decoder("Llama", 128256, 16, 2048, 32, 8, 8192, tied=True),
    "llama-3.1-8b": _decoder("Llama", 128256, 32, 4096, 32, 8, 14336),
    "qwen2.5-7b": _decoder("Qwen2", 152064, 28, 3584, 28, 4, 18944),
}
TRAINED = ("roberta-large", "gpt2-medium")  # by default


def recipe_of(model: str) -> Recipe:
    """A recipe by its name, or by the path of a transformers configuration."""
    return RECIPES[model] if model in RECIPES else Recipe.read(model)


@dataclass(frozen=True)
class Setting:
    """One model and how it is trained.

    Attributes:
        model: A key of `RECIPES`, or the path of a transformers configuration.
        targets: `"few"`, as in papers, `"all"` linear layers of the blocks, or names joined by `+`.
        checkpointing: Whether blocks are computed again in backward.
        blocks: How many; the model's own number, or fewer.
        batch, sequence: Of the tokens.
        r: Rank of the factors.
    """

    model: str
    targets: str
    checkpointing: bool
    blocks: int
    batch: int
    sequence: int
    r: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def case(self) -> Row:
        """The setting as a record holds it."""
        recipe = recipe_of(self.model)
        return {
            "model": self.model,
            "targets": "+".join(recipe.few) or "all" if self.targets == "few" else self.targets,
            "checkpointing": self.checkpointing,
            "blocks": self.blocks,
            "blocks_of": recipe.blocks,
            "batch": self.batch,
            "sequence": self.sequence,
            "r": self.r,
        }


def build(
    setting: Setting, dtype: torch.dtype, device: torch.device, base: str = DENSE
) -> nn.Module:
    """The frozen model, in training mode, its blocks' weights stored as `base` says."""
    model = recipe_of(setting.model).build(setting.blocks).to(device, dtype)
    model = bases.with_stored(model, base)
    return checkpointed(model) if setting.checkpointing else model


def checkpointed(model: nn.Module) -> nn.Module:
    """The model, its blocks computed again in backward."""
    with warnings.catch_warnings():  # its new name is not there in every supported version
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measure(
    setting: Setting,
    base: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
    baselines: Sequence[str],
    on_round: Callable[[float], object] = lambda share: None,
    storage: str = DENSE,
) -> list[Row]:
    """Measures training steps; all models share the frozen parameters of `base`.

    Args:
        setting: What to train, and how.
        base: What `build` gave.
        dtype: Type of `base`; there is no autocast.
        device: Where `base` is.
        seconds: Time to spend on timing.
        names: Keys of `PROVIDERS`; they have proved their formulas.
        baselines: Those of the names that every row is compared with.
        on_round: Called with the share that is done.
        storage: That of `base`, of `bases.BASES`.

    Returns:
        One row per provider.
    """
    recipe = recipe_of(setting.model)
    targets = recipe.pattern(setting.targets, base)
    batch = recipe.batch(setting.batch, setting.sequence, device)
    share = adapted_share(base, targets)
    left_out: dict[str, str] = {}
    cases: dict[str, Call] = {}
    rows = {
        name: {"suite": "model", **labels(name, dtype, storage), "case": setting.case()}
        for name in names
    }
    for name in names:
        with survived(name, left_out):
            model = PROVIDERS[name].adapt(sharing_copy(base), targets, setting.r)
            step = training_step(model, batch)
            step()  # the optimizer has its state now, which is resident from here on
            rows[name]["bytes"] = {"peak": peak_bytes(Call(step), device)}
            rows[name]["counts"] = _counts(name, model, share, setting.checkpointing)
            cases[name] = Call(step)
    times = interleaved(cases, device, seconds, on_round=on_round, failed=left_out)
    for name, row in rows.items():
        if name in left_out:
            row["left_out"] = left_out[name]
            continue
        rates = [setting.tokens / taken for taken in times[name]]
        row["seconds"] = {"step": Quantiles.of(times[name]).as_dict()}
        row["tokens_per_second"] = Quantiles.of(rates).as_dict()
        row["versus"] = {
            other: {"step": ratios(times[name], times[other]).as_dict()}
            for other in baselines
            if other in times
        }
    del cases
    gc.collect()
    return list(rows.values())


def training_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """One step of AdamW on what the model trains."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 1e-4, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapted_share(model: nn.Module, targets: str) -> float:
    """The share of the linear work in adapted layers, heads included: f of docs/performance.md."""
    sizes = {
        # Of the layer, since a weight in four bits holds two in a byte.
        name: module.weight.numel()
        if is_conv1d(module)
        else module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    adapted = sum(size for name, size in sizes.items() if re.fullmatch(targets, name))
    return adapted / sum(sizes.values())


def _counts(name: str, model: nn.Module, share: float, checkpointing: bool) -> Row:
    """Counts of a step, and its full products over those of a LoRA step."""
    method = PROVIDERS[name].method
    third = method is not None and cost.METHODS[method].products == (1, 2)
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapted_share": share,
        "products_over_lora": cost.step_ratio(share, int(checkpointing)) if third else None,
    }
