"""`HUTConfig`: the options of a HUT adapter, in PEFT's words."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from ...checks import check_form, check_run_options, check_scale_by_rms
from ...nn import naming_own_options
from .registration import peft_type

_IMPORT = "hut_kernels.integrations.peft"

# What a directory with an adapter says to a program that does not know the method.
_NOTE = f"""
## Loading this adapter

HUT is a method of the package `hut_kernels`, which has to be imported first. Without it, PEFT
raises `KeyError: 'HUT'`.

```python
import {_IMPORT}  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this directory or repository")
```
"""


@naming_own_options("hut_alpha", "hut_dropout", "init_weights")
@dataclass
class HUTConfig(PeftConfig):
    """The options of a HUT adapter.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Args:
        r: rank of the multiplier T (`low_rank`), or groups per side (`two_sided`).
        target_modules: names or ends of names of the layers to adapt; a string is a regular
            expression for the whole name, `"all-linear"` every linear layer but the output layer;
            None means LoRA's defaults for the architecture.
        exclude_modules: layers to leave out, by the same rules.
        hut_alpha: `scaling = hut_alpha / r`; None means scaling 1 for every rank. Only for
            `low_rank` with offset 1.
        hut_dropout: probability of dropping an input of the update while training; costs a second
            product.
        fan_in_fan_out: whether the weights are stored as `[in, out]`. Told by the layer's class
            (Conv1D or `nn.Linear`) where it is None; a value that does not fit the class is
            overruled with a warning.
        modules_to_save: further modules to train and save as a whole, such as a classifier.
        init_weights: True starts as the base model; False adds normal noise of 0.1 to every factor,
            for tests.
        layers_to_transform: indices of the layers to adapt; an int is one index, 0 included.
        layers_pattern: name of the `nn.ModuleList` that the indices refer to.
        rank_pattern: ranks other than `r`, by name or regular expression.
        alpha_pattern: values other than `hut_alpha`, by name or regular expression.
        transform: `"low_rank"`, or `"two_sided"`, the paper's.
        offset: 1 for the residual form `T = 1 + scaling * B A`, 0 for the direct form `T = B A`.
        scale_shift: whether to train a scale and a shift of the outputs.
        target_parameters: names or ends of names of stacks of experts' weights in a transformers
            model (`"experts.gate_up_proj"`), adapted as LoRA's are; `target_modules=[]` beside
            them means no linear layer. All adapters of a model must name the same.
        precision: `"merged"` rounds `W0 * T` once; `"split"` keeps the update apart, for a second
            product.
        fused: whether to recompute T tile by tile; False builds it under ordinary autograd.
        scale_by_rms: whether `scaling = hut_alpha / (r * rms)`, with the root mean square of each
            adapted weight, so that LoRA's learning rate fits. Only for `low_rank` with offset 1.
        rms: what `scale_by_rms` divided by, by the layer's name: filled in when the adapter is made
            and saved with it, so that it is the same over any base.
        requires: the import that a program needs to load the adapter; for whoever reads the file.

    Raises:
        ValueError: an option out of range, or where it has no part; names the option.
        TypeError: an option of LoRA's; names HUT's own.

    Examples:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from hut_kernels.integrations.peft import HUTConfig
        >>> base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> config = HUTConfig(r=4, target_modules=["0"], modules_to_save=["2"])
        >>> model = get_peft_model(base, config)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 4 * (64 + 64) + head
        772
    """

    r: int = field(default=8, metadata={"help": "Rank of the multiplier, or groups per side"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the layers to adapt, a regex, or 'all-linear'"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of layers not to adapt, or a regex"}
    )
    hut_alpha: float | None = field(
        default=None, metadata={"help": "scaling = hut_alpha / r; None means scaling 1"}
    )
    hut_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter path"})
    fan_in_fan_out: bool | None = field(
        default=None, metadata={"help": "Whether weights are [in, out]; None: as the layer's class"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save as a whole"}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: start as the base model; False: random, for tests"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList the indices refer to"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks other than r, by name or regex"}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Values other than hut_alpha, by name or regex"}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of stacks of experts' weights to adapt"}
    )
    transform: str = field(default="low_rank", metadata={"help": "'low_rank' or 'two_sided'"})
    offset: float = field(
        default=1.0, metadata={"help": "1: residual form T = 1 + s B A; 0: direct form T = B A"}
    )
    scale_shift: bool = field(
        default=False, metadata={"help": "Whether to train a scale and a shift of the outputs"}
    )
    precision: str = field(default="merged", metadata={"help": "'merged' or 'split'"})
    fused: bool = field(default=True, metadata={"help": "Whether to run the fused layer"})
    scale_by_rms: bool = field(
        default=False, metadata={"help": "Whether scaling is divided by the weight's RMS"}
    )
    rms: dict[str, float] = field(
        default_factory=dict, metadata={"help": "The RMS of each adapted weight, filled in by HUT"}
    )
    requires: str = field(
        default=f"import {_IMPORT}", metadata={"help": "What a program must do to load the adapter"}
    )

    def __post_init__(self) -> None:
        """Fill in the type and refuse options that contradict each other."""
        super().__post_init__()
        self.peft_type = peft_type()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self.rms = self.rms or {}
        self._check_types()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if type(r) is not int or r < 1:
                raise ValueError(f"r must be an integer of at least 1; got {r!r} for {name!r}")
        for alpha in (self.hut_alpha, *self.alpha_pattern.values()):
            check_form(self.transform, self.offset, alpha)
        check_run_options(self.precision, self.hut_dropout)
        check_scale_by_rms(self.scale_by_rms, self.transform, self.offset)
        self._check_layer_options()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, as PEFT does, and tell in README.md what loading it takes."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if _IMPORT not in text:
            card.write_text(text.rstrip("\n") + "\n" + _NOTE, encoding="utf-8")

    def _check_types(self) -> None:
        for name in ("init_weights", "scale_shift", "fused", "scale_by_rms"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}")
        given = {name: getattr(self, name) for name in ("hut_alpha", "hut_dropout", "offset")}
        if self.hut_alpha is None:
            del given["hut_alpha"]
        for name, value in (given | self.alpha_pattern).items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number; got {value!r}")

    def _check_layer_options(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"target_parameters must be a list of names; got {self.target_parameters!r}"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must be, too"
            )


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, (list, tuple)) else names
