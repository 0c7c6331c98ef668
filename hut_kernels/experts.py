"""`HUTExperts`: the trainable factors of one stack of experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import hut_weight
from .nn import HUTLinear, init_factors_


class Factors(NamedTuple):
    """One adapter of a stack: `[experts, r, in]`, `[experts, out, r]`, `[experts, out]` or None.

    `options` are keyword arguments of `hut_grouped_linear`.
    """

    hut_A: Tensor
    hut_B: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    options: dict[str, Any]


class HUTExperts(nn.Module):
    """Factors over a stack of experts' weights, which stays a parameter of the experts' module.

    `inject(model, [], target_parameters=[...])` makes one for each stack, a submodule `hut_<name>`
    of the module that owns the parameter `<name>`. A fresh one leaves the experts as they are.

    Args:
        num_experts: experts of the stack.
        in_features: size of an expert's inputs.
        out_features: size of an expert's outputs.
        r: as for `HUTLinear`, for every expert.
        alpha: as for `HUTLinear`.
        transform: as for `HUTLinear`.
        offset: as for `HUTLinear`.
        scale_shift: as for `HUTLinear`.
        fused: as for `HUTLinear`.
        device: where the factors are made.
        factor_dtype: as for `HUTLinear`.

    Attributes:
        hut_A: `[experts, r, in_features]`.
        hut_B: `[experts, out_features, r]`.
        gamma: `[experts, out_features]` or None.
        beta: `[experts, out_features]` or None.

    Raises:
        ValueError, TypeError: as for `HUTLinear`.

    Examples:
        >>> from hut_kernels import HUTExperts
        >>> HUTExperts(num_experts=4, in_features=8, out_features=6, r=2).hut_A.shape
        torch.Size([4, 2, 8])
    """

    hut_A: nn.Parameter
    hut_B: nn.Parameter
    gamma: nn.Parameter | None
    beta: nn.Parameter | None
    # Adapter files hold these of every layer.
    dropout = 0.0
    precision = "merged"
    scale_by_rms = False
    rms: float | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        alpha: float | None = None,
        transform: str = "low_rank",
        offset: float = 1.0,
        scale_shift: bool = False,
        fused: bool = True,
        device: torch.device | str | None = None,
        factor_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"alpha": alpha, "transform": transform, "offset": offset}
        options |= {"scale_shift": scale_shift, "fused": fused, "factor_dtype": factor_dtype}
        # One expert's layer, for its checks and its normal form of the options.
        one = HUTLinear(in_features, out_features, r, bias=False, device="meta", **options)
        self.r, self.alpha, self.transform = one.r, one.alpha, one.transform
        self.offset, self.fused = one.offset, one.fused
        for name in ("hut_A", "hut_B", "gamma", "beta"):
            like = getattr(one, name)
            stack = None
            if like is not None:
                shape = num_experts, *like.shape
                stack = nn.Parameter(torch.empty(shape, dtype=factor_dtype, device=device))
            self.register_parameter(name, stack)
        self.reset_factors()

    @property
    def scaling(self) -> float:
        """The factor of `hut_B @ hut_A`: `alpha / r`, and 1 where alpha has no part."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def scale_shift(self) -> bool:
        """True if there are `gamma` and `beta`."""
        return self.gamma is not None

    def named_factors(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters: `hut_A`, `hut_B` and, with `scale_shift`, `gamma` and `beta`."""
        return list(self.named_parameters())

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Make `T` 1, `gamma` 1 and `beta` 0: the experts compute what they did."""
        init_stack_(self.hut_A, self.hut_B, self.transform, self.offset)
        if self.gamma is not None and self.beta is not None:
            self.gamma.fill_(1.0)
            self.beta.zero_()

    def active_factors(self) -> list[Factors]:
        """The factors that the experts' module multiplies with."""
        options = {"transform": self.transform, "offset": self.offset, "scaling": self.scaling}
        return [
            Factors(self.hut_A, self.hut_B, self.gamma, self.beta, options | {"fused": self.fused})
        ]

    def extra_repr(self) -> str:
        """Every option, for `repr`."""
        experts, r, in_features = self.hut_A.shape
        return (
            f"num_experts={experts}, in_features={in_features}, "
            f"out_features={self.hut_B.shape[1]}, r={r}, alpha={self.alpha}, "
            f"transform={self.transform!r}, offset={self.offset:g}, "
            f"scale_shift={self.scale_shift}, fused={self.fused}"
        )


def init_stack_(hut_A: Tensor, hut_B: Tensor, transform: str, offset: float) -> None:
    """Make every expert's `T` 1, as `init_factors_` does one layer's."""
    for A, B in zip(hut_A.unbind(0), hut_B.unbind(0), strict=True):
        init_factors_(A, B, transform, offset)


@torch.no_grad()
def merged_stack(
    weight: Tensor, factors: Factors, transposed: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """`gamma W` of every expert, in the stack's own layout, rounded once to `dtype` or its type."""
    merged = torch.empty_like(weight, dtype=dtype)
    matrices = (weight.mT, merged.mT) if transposed else (weight, merged)
    options = {name: factors.options[name] for name in ("transform", "offset", "scaling")}
    for expert, (W0, out) in enumerate(zip(*matrices, strict=True)):
        gamma = None if factors.gamma is None else factors.gamma[expert]
        hut_A, hut_B = factors.hut_A[expert], factors.hut_B[expert]
        out.copy_(hut_weight(W0, hut_A, hut_B, gamma=gamma, dtype=merged.dtype, **options))
    return merged
