"""`QuantizedLinear`: HUT adapters over a layer whose weight bitsandbytes or torchao quantized."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ... import formats
from ...errors import HUTBackendError
from ...functional import frozen_linear
from ...layer import acc_dtype
from .base import bias, is_watched, matrix
from .layer import Linear, combined


class QuantizedLinear(Linear):
    """HUT adapters over a quantized base layer, whose own forward is never called.

    That may change the weight in place (bitsandbytes repacks it in an evaluation on a CPU), or
    quantize inputs. The base's product is `x W0^T` here, and its inputs are cast as it casts them.
    """

    dense_default: torch.dtype = torch.float16

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer under its active adapters, `[..., out_features]`, in x's type."""
        base = self.base_layer
        if is_watched(base):
            raise HUTBackendError(
                f"a quantized {type(base).__name__} carries hooks (or a replaced forward), which "
                f"would not run: HUT never calls its forward; put them on the adapted layer"
            )
        dtype = formats.compute_dtype(base)
        inputs = x if dtype is None else x.to(dtype)
        active = [] if self.disable_adapters else self._active_here()
        y = self._adapted(inputs, active[0]) if len(active) == 1 else self._sum(inputs, active)
        return y if dtype is None else y.to(x.dtype)

    def _sum(self, x: Tensor, active: list[str]) -> Tensor:
        """The base layer, and what each adapter adds to it."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base = frozen_linear(x, matrix(self.base_layer), bias(self.base_layer))
        acc = acc_dtype(base.dtype)
        total = base.to(acc)
        for name in active:
            total = total + (self._adapted(x, name) - base.to(acc))
        return total.to(base.dtype)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the base layer's weight, quantized and dense."""
        weight = matrix(self.base_layer)
        dtype = formats.dense_dtype(self.base_layer, self.dense_default)
        dense = self.in_features * self.out_features * dtype.itemsize
        return formats.stored(weight).nbytes, dense

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: rounded to 4 or 8 bits, a merged weight would lose most of the update.

        Raises:
            HUTBackendError: Always, where there is an adapter to merge.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if any(name in self.hut_A for name in names):
            raise HUTBackendError(
                f"an adapter cannot be merged into the quantized weight of a "
                f"{type(self.base_layer).__name__}: rounding to so few bits loses it (of an update "
                f"of 1 %, NF4 keeps a tenth, under noise of 1.4 times its size). Leave it "
                f"unmerged, or call merge_and_unload(), which gives dense layers"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, or with `merge` a dense `nn.Linear` of the base's compute type.

        Raises:
            ValueError: `safe_merge`, and the result is not finite.
        """
        base = self.base_layer
        given = check_adapters_to_merge(self, adapter_names) if merge else []
        names = [name for name in given if name in self.hut_A]
        if not names:
            return base
        weight, shift = self._dense(names)
        values = [weight] if shift is None else [weight, shift]
        if safe_merge and not all(torch.isfinite(value).all() for value in values):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {','.join(names)} seems to be "
                f"broken"
            )
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=shift is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if shift is not None:
            linear.bias = nn.Parameter(shift, requires_grad=False)
        return linear.train(self.training)

    @torch.no_grad()
    def _dense(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias under some adapters, in the base layer's compute type."""
        base = self.base_layer
        dtype = formats.dense_dtype(base, self.dense_default)
        W0, b0 = matrix(base), bias(base)
        acc = acc_dtype(dtype) if len(names) > 1 else dtype
        origin = formats.dense(W0, acc) if len(names) > 1 else None
        weight = combined(origin, [self._adapter_weight(name, W0, acc) for name in names])
        shift = combined(b0, [self._adapter_bias(name, b0, acc) for name in names])
        return weight.to(dtype), None if shift is None else shift.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's addition to the dequantized weight, detached and in float32."""
        W0 = matrix(self.base_layer)
        delta = self._adapter_weight(adapter_name, W0, torch.float32)
        return delta - formats.dense(W0, torch.float32)
