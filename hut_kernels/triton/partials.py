"""The two-stage reduction of the factor gradients: partial sums a program owns, then their sum.

Programs that share O and K in `spans_o x spans_k` rectangles write partials of d hut_A, one for
each span of O, and of d hut_B, one for each span of K. Added in order, two runs are bit-equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..definition import FactorGrads, Needs, Spec, finish_factor_grads


class Partials:
    """Buffers of the first stage, float32, left unwritten where a gradient is not needed."""

    def __init__(
        self, weight: Tensor, hut_B: Tensor, spans: tuple[int, int], spec: Spec, needs: Needs
    ) -> None:
        (O, K), r = weight.shape, hut_B.shape[1]
        spans_o, spans_k = spans
        self.needs = needs
        self.NEED_Q = needs.A
        self.NEED_P = needs.P
        self.NEED_SUMS = needs.gamma and spec.constant != 0.0

        def buffer(needed: bool, *shape: int) -> Tensor:
            shape = shape if needed else (0,)
            return torch.empty(shape, dtype=torch.float32, device=weight.device)

        self.Q = buffer(self.NEED_Q, spans_o, r, K)
        self.P = buffer(self.NEED_P, spans_k, O, r)
        self.sums = buffer(self.NEED_SUMS, spans_k, O)

    def finish(self, hut_A: Tensor, hut_B: Tensor, gamma: Tensor | None, spec: Spec) -> FactorGrads:
        """The second stage: the partials added in order, then the gradients."""
        Q = _add(self.Q) if self.NEED_Q else None
        P = _add(self.P) if self.NEED_P else None
        sums = _add(self.sums) if self.NEED_SUMS else None
        return finish_factor_grads(Q, P, sums, hut_A, hut_B, gamma, spec, self.needs)


def _add(partials: Tensor) -> Tensor:
    return partials[0] if len(partials) == 1 else partials.sum(0)
