"""The model suite: whole training steps of RoBERTa-large and GPT-2 medium, random weights.

Built from their configurations, dropout off, so nothing is downloaded. A step is forward, loss,
backward and AdamW over the adapters; embeddings, heads and everything else are frozen.
"""

import gc
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels.nn import is_conv1d

from ..measure import Call, Quantiles, interleaved, peak_bytes, ratios, survived
from ..methods import sharing_copy
from ..providers import PROVIDERS
from ..shapes import MODELS
from . import cost
from .layer import labels

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A model to build, and its layers to adapt.

    Attributes:
        build: Makes it with so many blocks.
        vocabulary: Tokens are drawn from 5 up to here.
        labels: The batch's labels, from its tokens.
        targets: Regular expressions over whole names, for `few` and `all`.
    """

    build: Callable[[int], nn.Module]
    vocabulary: int
    labels: Callable[[Tensor], Tensor]
    targets: Mapping[str, str]


def _roberta_large(blocks: int) -> nn.Module:
    """A classifier, as for GLUE."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return RobertaForSequenceClassification(config)


def _gpt2_medium(blocks: int) -> nn.Module:
    """A language model, as for E2E."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=1024, n_layer=blocks, n_head=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


RECIPES = {
    "roberta-large": Recipe(
        _roberta_large,
        50265,
        lambda tokens: tokens[:, 0] % 2,
        {
            "few": r".*\.(query|value)",
            "all": r".*\.encoder\..*\.(query|key|value|dense)",
        },
    ),
    "gpt2-medium": Recipe(
        _gpt2_medium,
        50257,
        lambda tokens: tokens,
        {"few": r".*\.c_attn", "all": r".*\.(c_attn|c_proj|c_fc)"},
    ),
}


@dataclass(frozen=True)
class Setting:
    """One model and how it is trained.

    Attributes:
        model: A key of `RECIPES`.
        targets: `"few"`, as in papers, or `"all"` linear layers of the blocks.
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
        few = "+".join(MODELS[self.model].few)
        return {
            "model": self.model,
            "targets": few if self.targets == "few" else "all",
            "checkpointing": self.checkpointing,
            "blocks": self.blocks,
            "blocks_of": MODELS[self.model].blocks,
            "batch": self.batch,
            "sequence": self.sequence,
            "r": self.r,
        }


def build(setting: Setting, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen model, in training mode."""
    import transformers

    transformers.logging.set_verbosity_error()  # what it says is about checkpoints and generation
    model = RECIPES[setting.model].build(setting.blocks).to(device, dtype).train()
    if setting.checkpointing:
        with warnings.catch_warnings():  # its new name is not there in every supported version
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False)


def measure(
    setting: Setting,
    base: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
    baselines: Sequence[str],
    on_round: Callable[[float], object] = lambda share: None,
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

    Returns:
        One row per provider.
    """
    recipe = RECIPES[setting.model]
    targets = recipe.targets[setting.targets]
    tokens = torch.randint(5, recipe.vocabulary, (setting.batch, setting.sequence), device=device)
    batch = {"input_ids": tokens, "labels": recipe.labels(tokens)}
    share = adapted_share(base, targets)
    left_out: dict[str, str] = {}
    cases: dict[str, Call] = {}
    rows = {
        name: {"suite": "model", **labels(name, dtype), "case": setting.case()} for name in names
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
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    adapted = sum(size for name, size in sizes.items() if re.fullmatch(targets, name))
    return adapted / sum(sizes.values())


def _counts(name: str, model: nn.Module, share: float, checkpointing: bool) -> Row:
    """Counts of a step, and its full products over those of a LoRA step."""
    third = cost.METHODS[PROVIDERS[name].method].products == (1, 2)
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapted_share": share,
        "products_over_lora": cost.step_ratio(share, int(checkpointing)) if third else None,
    }
