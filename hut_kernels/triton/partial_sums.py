"""The two-stage reduction of the factor gradients: each program's partial sums, then their sum.

Programs that split O and K into `o_splits x k_splits` rectangles write partial sums of d hut_A, one
for each split of O, and of d hut_B, one for each split of K. Added in order, two runs are equal to
the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer import FactorGrads, Layer, Needs, cast, finish_factor_grads


class PartialSums:
    """Buffers of the first stage, float32, empty where a gradient is not needed."""

    def __init__(
        self,
        x: Tensor,
        layer: Layer,
        splits: tuple[int, int],
        needs: Needs,
        stack: tuple[int, ...] = (),
    ) -> None:
        (O, K, r), (o_splits, k_splits) = layer.sizes, splits
        self.layer, self.needs = layer, needs
        self.NEED_Q = needs.A
        self.NEED_P = needs.P
        self.NEED_SUMS = needs.gamma and layer.spec.constant != 0.0

        def buffer(needed: bool, *shape: int) -> Tensor:
            shape = (*stack, *shape) if needed else (0,)
            return torch.empty(shape, dtype=torch.float32, device=x.device)

        self.Q = buffer(self.NEED_Q, o_splits, r, K)
        self.P = buffer(self.NEED_P, k_splits, O, r)
        self.sums = buffer(self.NEED_SUMS, k_splits, O)

    def finish(self) -> FactorGrads:
        """Adds the partial sums in order, and finishes the gradients."""
        return finish_factor_grads(*self.add(), self.layer, self.needs)

    def add(self) -> FactorGrads:
        """Q, P and the row sums, each where it is needed."""
        return (
            _add(self.Q, -3) if self.NEED_Q else None,
            _add(self.P, -3) if self.NEED_P else None,
            _add(self.sums, -2) if self.NEED_SUMS else None,
        )


def with_operands(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer with its factors as the kernel multiplies by them.

    H0, and with it the factors, may be rounded to bf16; fp16 has not the range of a scaled loss.
    """
    if layer.spec.transform == "two_sided":
        return layer
    operand = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    hut_B = layer.hut_B if layer.gamma is None else layer.hut_B * layer.gamma[..., None]
    return layer._replace(hut_A=cast(layer.hut_A, operand), hut_B=cast(hut_B, operand), gamma=None)


def _add(partials: Tensor, dim: int) -> Tensor:
    return partials.select(dim, 0) if partials.shape[dim] == 1 else partials.sum(dim)
