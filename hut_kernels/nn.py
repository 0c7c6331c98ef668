"""HUTLinear: a frozen linear layer (or Conv1D) with trainable Hadamard factors."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import formats
from .checks import (
    check_dtype,
    check_form,
    check_number,
    check_rank,
    check_run_options,
    check_scale_by_rms,
)
from .errors import HUTBackendError
from .explain import explain
from .functional import frozen_linear, hut_linear, hut_weight
from .layer import FLOATS, effective_bias
from .planner import Plan

PAPER: dict[str, Any] = {"transform": "two_sided", "scale_shift": True}
"""The paper's layer, `HUTLinear(..., **PAPER)`: one multiplication per side, scale and shift."""

_FACTORS = ("hut_A", "hut_B", "gamma", "beta")

LayerTensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""A layer's weight `[out, in]`, hut_A, hut_B, bias, gamma and beta."""


# A module's hooks outlive its replacement: the dictionaries move on, so handles stay valid.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class TrainedFactors(NamedTuple):
    """The trained tensors of one adapter, and what their learning rates follow from.

    A module has some if it has a method `hut_factors` that lists them.
    """

    weight: Tensor  # W0, in any layout
    hut_A: Tensor
    hut_B: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    transform: str
    offset: float
    scale_by_rms: bool


T = TypeVar("T", bound=type)


def naming_own_options(alpha: str, dropout: str, init: str) -> Callable[[T], T]:
    """Make a class that is given one of LoRA's options name its own (TypeError).

    Args:
        alpha: the class's name of `lora_alpha`.
        dropout: the class's name of `lora_dropout`.
        init: what stands for `init_lora_weights`.
    """
    own = {
        "lora_alpha": alpha,
        "hut_alpha": alpha,
        "alpha": alpha,
        "use_rslora": f"{alpha}, with scaling = {alpha} / r",
        "lora_dropout": dropout,
        "hira_dropout": dropout,
        "hut_dropout": dropout,
        "dropout": dropout,
        "bias": "scale_shift=True, whose beta is a trained bias",
        "use_dora": "scale_shift=True, a trained scale and shift of each output",
        "init_lora_weights": init,
    }

    def decorate(cls: T) -> T:
        init_: Any = cls.__init__  # type: ignore[misc]
        known = inspect.signature(init_).parameters

        @functools.wraps(init_)
        def checked(self: Any, *args: Any, **options: Any) -> None:
            for name in options:
                if name not in known and name in own:
                    raise TypeError(
                        f"{cls.__name__} got an unexpected keyword argument {name!r}: HUT's own is "
                        f"{own[name]}"
                    )
            init_(self, *args, **options)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate


@naming_own_options("alpha", "dropout", "reset_factors(), which a new layer has had")
class HUTLinear(nn.Module):
    """A linear layer whose frozen weight is multiplied, element by element, by a trainable `T`.

    `y = gamma * (x (W0 * T)^T + bias) + beta`, with `T` built from two small factors (see "The two
    transforms" in docs/definition.md). A fresh layer computes exactly its base layer. `weight` and
    `bias` are frozen; `hut_A`, `hut_B` and, with `scale_shift`, `gamma` and `beta` are trained.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        r: rank of `T` (`low_rank`), or groups per side (`two_sided`); at least 1.
        alpha: `scaling = alpha / r`; None means `alpha = r`. Only for `low_rank` with offset 1.
        transform: `"low_rank"`, or `"two_sided"`, the paper's.
        offset: 1 for the residual form `T = 1 + scaling * B A`, 0 for the direct form `T = B A`.
        bias: whether the base layer has a bias.
        dropout: probability of dropping an input of the update, `x (W - W0)^T`, while training;
            costs a second product.
        scale_shift: whether to train `gamma` and `beta`.
        precision: `"merged"` rounds `W0 * T` once to the compute type; `"split"` keeps the update
            apart, at the price of a second product.
        fused: whether to recompute `T` tile by tile; False builds it under ordinary autograd.
        scale_by_rms: whether `scaling = alpha / (r * rms)`, with the root mean square of W0 as it
            is when the factors are made. A step then moves the weight as far as LoRA's does at the
            same learning rate. Only for `low_rank` with offset 1.
        device: where the parameters are made; `"meta"` is allowed.
        dtype: type of `weight` and `bias`.
        factor_dtype: type of the trainable parameters.

    Shape:
        - Input: `[..., in_features]`.
        - Output: `[..., out_features]`, in the input's type (autocast's under autocast).

    Attributes:
        weight: `[out_features, in_features]`, or `[in_features, out_features]` from a Conv1D.
        bias: `[out_features]` or None.
        hut_A: `[r, in_features]`.
        hut_B: `[out_features, r]`.
        gamma: `[out_features]` or None.
        beta: `[out_features]` or None.
        rms: what `scale_by_rms` divides by; saved with the state dict (as `rms`, float64) and in
            adapter files, so that the scaling stays what it was over any base.

    Raises:
        ValueError: an unknown `transform` or `precision`, `r` out of range, `alpha` where it has no
            part, an `offset` without an identity at init, or `dropout` outside [0, 1).
        TypeError: an `r` that is not an integer, an `alpha`, `offset` or `dropout` that is not a
            real number, an option of LoRA's, or a type other than float16, bfloat16, float32 or
            float64.

    Examples:
        >>> import torch
        >>> from hut_kernels import HUTLinear
        >>> layer = HUTLinear(24, 16, r=4)
        >>> layer(torch.randn(5, 24)).shape
        torch.Size([5, 16])
    """

    dense_default: torch.dtype = torch.float16
    quant_state: Any = None  # of a weight in four bits, kept as a Linear4bit keeps it
    quant_storage: torch.dtype | None = None
    weight: nn.Parameter
    bias: nn.Parameter | None
    hut_A: nn.Parameter
    hut_B: nn.Parameter
    gamma: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        alpha: float | None = None,
        transform: str = "low_rank",
        offset: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        scale_shift: bool = False,
        precision: str = "merged",
        fused: bool = True,
        scale_by_rms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        factor_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        r = _integer("r", r)
        alpha = None if alpha is None else _real("alpha", alpha)
        offset, dropout = float(_real("offset", offset)), float(_real("dropout", dropout))
        check_form(transform, offset, alpha)
        check_rank(r, transform, in_features, out_features)
        check_run_options(precision, dropout)
        check_scale_by_rms(scale_by_rms, transform, offset)
        check_dtype("dtype", dtype or torch.get_default_dtype())
        check_dtype("factor_dtype", factor_dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        residual = transform == "low_rank" and offset == 1
        self.alpha = r if alpha is None and residual else alpha
        self.transform = transform
        self.offset = offset
        self.dropout = dropout
        self.precision = precision
        self.fused = fused
        self.compute_dtype: torch.dtype | None = None
        self.scale_by_rms = scale_by_rms
        self.rms: float | None = None
        self._conv1d_class: type[nn.Module] | None = None

        base = nn.Linear(in_features, out_features, bias, device, dtype).requires_grad_(False)
        self.weight = base.get_parameter("weight")
        self.register_parameter("bias", base.get_parameter("bias") if bias else None)
        kwargs: dict[str, Any] = {"device": self.weight.device, "dtype": factor_dtype}
        self.hut_A = nn.Parameter(torch.empty(r, in_features, **kwargs))
        self.hut_B = nn.Parameter(torch.empty(out_features, r, **kwargs))
        for name in ("gamma", "beta"):
            vector = nn.Parameter(torch.empty(out_features, **kwargs)) if scale_shift else None
            self.register_parameter(name, vector)
        self.reset_factors()

    @classmethod
    def from_linear(cls, linear: nn.Module, r: int = 8, **options: Any) -> HUTLinear:
        """Make a fresh HUT layer over `linear`, sharing the storage of its weight and bias.

        `linear` stays as it was, its `requires_grad` flags included. The factors are made on the
        weight's device.

        Args:
            linear: an `nn.Linear`, or a transformers `Conv1D`, whose weight stays `[in, out]`.
            r: as for `HUTLinear`.
            **options: as for `HUTLinear`, except `bias`, `device` and `dtype`: these are
                `linear`'s.

        Raises:
            TypeError: another kind of module, or a subclass with its own `forward`.
            HUTBackendError: a quantized, sharded or computed weight.
            ValueError: as for `HUTLinear`.
        """
        for name in {"bias", "device", "dtype"} & {*options}:
            raise TypeError(
                f"{name} is the linear layer's own, and stays as it is; got {options[name]!r} "
                f"(scale_shift=True trains a scale and a shift of the outputs)"
            )
        check_linear(linear)
        conv1d = is_conv1d(linear)
        weight = formats.base_weight(linear)
        W0 = formats.stored(weight)
        out_features, in_features = weight.t().shape if conv1d else W0.shape
        layer = cls(
            in_features,
            out_features,
            r,
            bias=linear.bias is not None,
            device="meta",
            dtype=W0.dtype,
            **options,
        )
        layer._conv1d_class = type(linear) if conv1d else None
        layer.compute_dtype = formats.compute_dtype(linear)
        layer.weight = formats.shared(weight)
        layer._keep_quant_state()
        if layer.bias is not None:
            bias = linear.get_parameter("bias").detach()
            layer.bias = nn.Parameter(bias, requires_grad=False)
        for name, factor in layer.named_factors():
            setattr(layer, name, nn.Parameter(torch.empty_like(factor, device=W0.device)))
        layer.reset_factors()
        return layer.train(linear.training)

    @property
    def scaling(self) -> float:
        """The factor of `hut_B @ hut_A`: `alpha / r`, and 1 where alpha has no part.

        With `scale_by_rms`, `alpha / (r * rms)`.
        """
        if self.scale_by_rms:
            return scaling_by_rms(self.alpha, self.r, self.rms)
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def scale_shift(self) -> bool:
        """True for a layer with `gamma` and `beta`."""
        return self.gamma is not None

    @property
    def fan_in_fan_out(self) -> bool:
        """True where `weight` is `[in_features, out_features]`, as in a Conv1D."""
        return self._conv1d_class is not None

    def named_factors(self) -> list[tuple[str, nn.Parameter]]:
        """List what is trained: `hut_A`, `hut_B` and, with `scale_shift`, `gamma` and `beta`."""
        return [(name, p) for name in _FACTORS if (p := getattr(self, name)) is not None]

    def hut_factors(self) -> list[TrainedFactors]:
        """List the layer's one adapter, for `parameter_groups`."""
        factors = self.hut_A, self.hut_B, self.gamma, self.beta
        form = self.transform, self.offset, self.scale_by_rms
        return [TrainedFactors(self._base(), *factors, *form)]

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Make `T` 1, `gamma` 1 and `beta` 0: the layer computes its base layer again.

        With `scale_by_rms`, the scaling follows the weight as it now is.

        Raises:
            ValueError: `scale_by_rms` over a weight that is all zero or not finite.
        """
        if self.scale_by_rms and not self.weight.is_meta:
            self.rms = rms(self._base())
        init_factors_(self.hut_A, self.hut_B, self.transform, self.offset)
        if self.gamma is not None and self.beta is not None:
            self.gamma.fill_(1.0)
            self.beta.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Compute `gamma * (x (W0 * T)^T + bias) + beta`, `[..., out_features]`."""
        forward = self._forward_dropout if self.dropout and self.training else self._forward
        if self.compute_dtype is None:
            return forward(x)
        return forward(x.to(self.compute_dtype)).to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return self._linear(x, *self._tensors())

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        hut_A: Tensor,
        hut_B: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Tensor:
        """`hut_linear` with the layer's options; tensor parallelism gives it one rank's tensors."""
        return hut_linear(
            x,
            weight,
            hut_A,
            hut_B,
            bias,
            transform=self.transform,
            offset=self.offset,
            scaling=self.scaling,
            gamma=gamma,
            beta=beta,
            precision=self.precision,
            fused=self.fused,
        )

    def _forward_dropout(self, x: Tensor) -> Tensor:
        d = F.dropout(x, self.dropout)
        return dropout_forward(x, d, self._forward, self._matrix(), self.gamma)

    def _base(self) -> Tensor:
        """The frozen weight as it is stored, in four bits with what belongs to its codes."""
        return self._tensor("weight") if self.quant_state is None else formats.base_weight(self)

    def _matrix(self) -> Tensor:
        """The frozen weight as `[out_features, in_features]`, a view where it is a Conv1D's."""
        weight = self._base()
        return weight if self._conv1d_class is None else weight.t()

    def _tensors(self) -> LayerTensors:
        """List what `hut_linear` takes after x: weight `[out, in]`, factors, vectors."""
        own = self._parameters
        if (
            self._conv1d_class is None
            and self.quant_state is None
            and "weight" in own
            and "hut_A" in own
            and "hut_B" in own
            and "bias" in own
            and "gamma" in own
            and "beta" in own
        ):  # nearly always; to call for each costs a small layer 4 % of its step
            matrices: Any = own["weight"], own["hut_A"], own["hut_B"]
            return *matrices, own["bias"], own["gamma"], own["beta"]
        vectors = self._tensor("bias"), self._tensor("gamma"), self._tensor("beta")
        return self._matrix(), self._tensor("hut_A"), self._tensor("hut_B"), *vectors

    def _tensor(self, name: str) -> Any:
        """`getattr(self, name)`, but a parameter is not first sought everywhere else.

        Six searches in vain cost a small layer 4 % of its step.
        """
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def explain(self, N: int, device_name: str | None = None) -> Plan:
        """Plan a call of this layer on any known device, without running it.

        Dropout, which adds a second product while training, is left out.

        Args:
            N: tokens.
            device_name: as in `hut_kernels.explain`; None means this machine's own device.

        Returns:
            A `Plan`; `str(plan)` is a readable table.

        Raises:
            ValueError: a negative N or an unknown device.
            TypeError: an N that is not an integer.

        Examples:
            >>> import torch
            >>> from hut_kernels import HUTLinear
            >>> layer = HUTLinear(4096, 4096, r=16, device="meta", dtype=torch.bfloat16)
            >>> layer.explain(2048, "A100").forward
            'staged'
        """
        W0 = formats.stored(self._base())
        weight_dtype: torch.dtype | str = W0.dtype
        if isinstance(W0, formats.Stored):
            weight_dtype = W0.form.name.partition("_")[0]
        return explain(
            N,
            self.in_features,
            self.out_features,
            self.r,
            dtype=self.compute_dtype or W0.dtype,
            device_name=device_name,
            weight_dtype=weight_dtype,
            transform=self.transform,
            precision=self.precision,
        )

    def merged_weight(self) -> Tensor:
        """Compute `gamma[:, None] * W0 * T`, detached, in `weight`'s own layout and `dense_dtype`.

        Raises:
            HUTBackendError: a parameter is sharded, on the meta device (offloaded), or made by a
                hook from another one (pruning, the older `weight_norm`).
        """
        self._check_data()
        merged = hut_weight(
            self._matrix(),
            self.hut_A,
            self.hut_B,
            transform=self.transform,
            offset=self.offset,
            scaling=self.scaling,
            gamma=self.gamma,
            dtype=self.dense_dtype,
        )
        return merged.t().contiguous() if self.fan_in_fan_out else merged

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """Compute `gamma * bias + beta`, `[out_features]`, in `dense_dtype`.

        Returns:
            None without bias and beta.

        Raises:
            HUTBackendError: as for `merged_weight`.
        """
        self._check_data()
        bias = effective_bias(self.bias, self.gamma, self.beta, self.dense_dtype)
        return None if bias is None else bias.clone()

    def to_linear(self) -> nn.Module:
        """Make a plain layer that computes the same, on this one's device and in its weight's type.

        Its parameters are new tensors, and frozen as the base layer's are here. Those of a
        quantized layer are dense, in its compute type, and a warning tells their size.

        Returns:
            An `nn.Linear`, or a Conv1D where the layer came from one.

        Raises:
            HUTBackendError: as for `merged_weight`.
            TypeError: the layer has a `forward` of its own, put on it or in a subclass.
        """
        self.check_plain()
        if formats.is_quantized(self._base()):
            formats.warn_of_size(1, *self.sizes())
        return self.plain()

    def plain(self) -> nn.Module:
        """`to_linear` without its checks and its warning."""
        merged = {"weight": self.merged_weight(), "bias": self.merged_bias()}
        # On meta, so that no values are drawn for parameters that are replaced at once.
        with torch.device("meta"):
            if self._conv1d_class is not None:
                linear: nn.Module = self._conv1d_class(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features)
        for name, value in merged.items():
            parameter = None if value is None else nn.Parameter(value, requires_grad=False)
            linear.register_parameter(name, parameter)
        return linear.train(self.training)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The type of the merged weight: that of `weight`, or a quantized layer's compute type."""
        if formats.is_quantized(self._base()):
            return formats.dense_dtype(self, self.dense_default)
        return self.weight.dtype

    def sizes(self) -> tuple[int, int]:
        """Count the bytes of a quantized weight, and of the dense one that merging makes of it."""
        dense = self.in_features * self.out_features * self.dense_dtype.itemsize
        return formats.stored(self._base()).nbytes, dense

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in formats.statistics(self).items():
            destination[prefix + name] = value
        if self.rms is not None:
            destination[prefix + "rms"] = torch.tensor(self.rms, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.scale_by_rms and prefix + "rms" in state_dict:
            self.rms = float(state_dict.pop(prefix + "rms"))
        known = formats.statistics(self)
        found = {name: state_dict[prefix + name] for name in known if prefix + name in state_dict}
        absent = [prefix + name for name in known if name not in found]
        missing_keys += absent
        # Also under strict=False, which lets keys be absent.
        if absent and prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is quantized, and of what belongs to its codes there is no "
                f"{', '.join(absent)}: load the weights of a model that is quantized alike, or none"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if known and not absent:
            formats.load_statistics(self, found)
            unexpected_keys[:] = [key for key in unexpected_keys if key[len(prefix) :] not in known]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self.quant_state is not None:  # pickle takes its class off a weight
            weight: Any = formats.base_weight(self)
            self._parameters["weight"] = weight
            self._keep_quant_state()

    def _keep_quant_state(self) -> None:
        weight = self._parameters.get("weight")
        self.quant_state = getattr(weight, "quant_state", None)
        self.quant_storage = getattr(weight, "quant_storage", None)

    def check_plain(self) -> None:
        """Refuse a layer that no plain layer can stand for; raises what `to_linear` does."""
        self._check_data()
        sharded = any(hasattr(p, "_local_tensor") for p in self.parameters())  # told so elsewhere
        if not sharded and (type(self).forward is not HUTLinear.forward or is_replaced(self)):
            raise TypeError(
                f"{type(self).__name__} {_own_forward(self)}, which a plain layer lacks"
            )

    def _check_data(self) -> None:
        names = ("weight", "bias", *_FACTORS)
        check_data(self, *(name for name in names if not parametrize.is_parametrized(self, name)))

    def extra_repr(self) -> str:
        """List every option, for `repr`."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha}, transform={self.transform!r}, offset={self.offset:g}, "
            f"bias={self.bias is not None}, dropout={self.dropout}, "
            f"scale_shift={self.scale_shift}, precision={self.precision!r}, fused={self.fused}"
        )
        text += ", scale_by_rms=True" if self.scale_by_rms else ""
        return text + (", fan_in_fan_out=True" if self.fan_in_fan_out else "")


@torch.no_grad()
def init_factors_(hut_A: Tensor, hut_B: Tensor, transform: str, offset: float) -> None:
    """Make `T` 1 (see "The two transforms" in docs/definition.md), also of sharded factors."""
    if transform == "two_sided":
        hut_A.fill_(1.0)
        hut_B.fill_(1.0)
        return
    # Drawn whole, since a factor may be sharded.
    A, B = (torch.empty(f.shape, dtype=f.dtype, device=f.device) for f in (hut_A, hut_B))
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B.zero_()
    if offset == 0:
        A[0] = 1.0
        B[:, 0] = 1.0
    fill(hut_A, A)
    fill(hut_B, B)


def dropout_forward(
    x: Tensor, d: Tensor, layer: Callable[[Tensor], Tensor], matrix: Tensor, gamma: Tensor | None
) -> Tensor:
    """Compute a layer whose update sees d, x after dropout, instead of x.

    `x W0^T + d (W - W0)^T = d W^T + (x - d) W0^T`: no `W - W0` to build, and one formula for every
    transform.

    Args:
        x: `[..., in_features]`.
        d: x after dropout.
        layer: the whole layer, biases included.
        matrix: W0, `[out_features, in_features]`.
        gamma: `[out_features]` or None.

    Returns:
        `[..., out_features]`, in the layer's output type.
    """
    y = layer(d)
    rest = frozen_linear((x - d).to(y.dtype), matrix)
    return y + (rest if gamma is None else (gamma * rest).to(y.dtype))


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of the module that it stands for."""
    for name in (*HOOKS, "_is_full_backward_hook"):
        vars(new)[name] = vars(old)[name]


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy the value; into a sharded parameter each rank's part of rank 0's value."""
    if hasattr(parameter, "_local_tensor"):  # a DTensor: an import that others are spared
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        placed = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        # Shards, since an offloaded one is not where its mesh computes.
        parameter, value = parameter.to_local(), placed.to_local()
    parameter.copy_(value)


def rms(weight: Tensor) -> float:
    """Compute the root mean square of a weight (of a quantized one as it dequantizes), in float64.

    Raises:
        ValueError: it is zero or not finite.
        HUTBackendError: it is on the meta device.
    """
    if weight.is_meta:
        raise HUTBackendError("the size of a weight on the meta device (offloaded) is not known")
    with torch.no_grad():  # and no detach(), which takes the class off a weight in few bits
        dense = formats.dense(weight, torch.float32)
        norm = torch.linalg.vector_norm(dense, dtype=torch.float64)
    value = float(whole(norm)) / math.sqrt(dense.numel())
    if not 0 < value < math.inf:
        raise ValueError(f"scale_by_rms needs a weight of a finite size that is not 0; got {value}")
    return value


def scaling_by_rms(alpha: float | None, r: int, rms: float | None) -> float:
    """Compute `alpha / (r * rms)`; one formula, so that it is the same to the bit everywhere."""
    if rms is None:
        raise HUTBackendError(
            "scale_by_rms: the weight was on the meta device when the layer was made; load its "
            "state dict or adapter file, or call reset_factors() once the weight is there"
        )
    return (r if alpha is None else alpha) / (r * rms)


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all ranks of its mesh; another is itself."""
    if not hasattr(tensor, "_local_tensor"):  # a DTensor's: an import that others are spared
        return tensor
    # Offloaded shards go back to where their mesh can send them from.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def is_conv1d(module: nn.Module) -> bool:
    """Tell a Conv1D of transformers, by its shape so as not to import that."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == getattr(module, "nf", None)
    )


def _integer(name: str, value: Any) -> int:
    """NumPy's integers too, as Python's own: an adapter file can hold no others (TypeError)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    return operator.index(value)


def _real(name: str, value: Any) -> int | float:
    """NumPy's numbers and fractions too, as Python's own; an integer stays one (TypeError)."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a real number; got bool")
    number = check_number(name, value)
    return int(value) if isinstance(value, numbers.Integral) else number


def check_data(module: nn.Module, *names: str) -> None:
    """Refuse a parameter whose data is elsewhere, or that a hook makes (HUTBackendError)."""
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        kind = type(module).__name__
        if name not in module._parameters:
            raise HUTBackendError(
                f"{name} of {kind} is not a parameter but made anew from another one (by pruning, "
                f"weight_norm, a parametrization or FSDP1): make it permanent first, such as by "
                f"torch.nn.utils.prune.remove(module, {name!r})"
            )
        if tensor.is_meta:
            raise HUTBackendError(
                f"{name} of {kind} is on the meta device, its data elsewhere or not loaded: where "
                f"accelerate offloads it, accelerate.hooks.remove_hook_from_module(model, "
                f"recurse=True) brings it back"
            )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put a layer's name before what is raised about it."""
    try:
        yield
    except (TypeError, ValueError, HUTBackendError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_linear(linear: nn.Module) -> None:
    """Refuse what HUT cannot multiply, or what would not compute the same without its own class."""
    kind = type(linear).__name__
    conv1d = is_conv1d(linear)
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) and not conv1d:
        if "Linear" in kind and not (isinstance(weight, Tensor) and weight.is_floating_point()):
            raise HUTBackendError(f"{kind} keeps no plain weight (quantized?); dequantize it first")
        raise TypeError(f"expected an nn.Linear or a Conv1D; got {kind}")
    quantized = isinstance(weight, Tensor) and formats.is_quantized(formats.base_weight(linear))
    if not quantized and (not _is_parameter(weight) or weight.dtype not in FLOATS):
        dtype = getattr(weight, "dtype", None)
        raise HUTBackendError(
            f"the weight of {kind} is a {type(weight).__name__} of {dtype}, but HUT needs an "
            f"nn.Parameter of float16, bfloat16, float32 or float64: dequantize or unshard it, or "
            f"remove its parametrization, first"
        )
    bias = getattr(linear, "bias", None)
    if bias is not None and not _is_parameter(bias):
        raise HUTBackendError(
            f"the bias of {kind} is a {type(bias).__name__}, but HUT needs an nn.Parameter: make "
            f"what a hook or a parametrization computes permanent first"
        )
    if not (conv1d or formats.multiplies_only(linear)) or is_replaced(linear):
        raise TypeError(f"{kind} {_own_forward(linear)}, which a HUTLinear would not run")


def _is_parameter(tensor: Any) -> TypeGuard[nn.Parameter]:
    """Tell PyTorch's own parameter, or a memory estimator's stand-in for one."""
    kind = type(tensor)
    fake = kind.__name__ == "FakeTensor" and isinstance(tensor, nn.Parameter)
    return kind is nn.Parameter or fake


def is_replaced(module: nn.Module) -> bool:
    """Tell a module on which a `forward` was put that is not its class's own."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__self__", None) is module
    return forward is not None and not (own and forward.__func__ is type(module).forward)


def _own_forward(module: nn.Module) -> str:
    if "_hf_hook" in vars(module):
        return "has a forward wrapped by accelerate (remove_hook_from_module takes it off)"
    return "has a forward of its own"
