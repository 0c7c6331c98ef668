"""The layers to compare: each says how it is built, and which formula it claims to compute.

LoRA and HiRA stand here as plain PyTorch modules with the formulas of PEFT's layers, their adapters
in the type of the base weight (PEFT keeps them in fp32 unless told otherwise, which costs more over
a 16-bit base). HUT's factors are fp32, its default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hut_kernels import PAPER, HUTLinear

# ‖out − reference‖ / ‖reference‖ against float64, as in docs/definition.md.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


class _Adapted(nn.Module):
    """A frozen linear layer's weight and bias, shared with it, and factors beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def factors(self, r: int) -> tuple[nn.Parameter, nn.Parameter]:
        out_features, in_features = self.weight.shape
        A = nn.Parameter(self.weight.new_empty(r, in_features))
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A, nn.Parameter(self.weight.new_zeros(out_features, r))


class LoRALinear(_Adapted):
    """`y = x Wᵀ + bias + (x Aᵀ) Bᵀ`: LoRA with alpha = r and without dropout."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__(linear)
        self.lora_A, self.lora_B = self.factors(r)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + update

    def to_linear(self) -> nn.Linear:
        """The merged layer, its weight `W + B A`."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter((self.weight + self.lora_B @ self.lora_A).detach())
        linear.bias = self.bias
        return linear


class HiRALinear(_Adapted):
    """`y = x Wᵀ + bias + x (W ⊙ (B A))ᵀ`: HiRA, two full products forward, three backward."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__(linear)
        self.hira_A, self.hira_B = self.factors(r)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(x, self.weight * (self.hira_B @ self.hira_A))
        return F.linear(x, self.weight, self.bias) + update


class FrozenLinear(_Adapted):
    """A linear layer that trains nothing; its backward still computes the gradient of `x`."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__(linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _frozen(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def _lora(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return x @ (weight + lora_B @ lora_A).T + bias


def _hira(x: Tensor, weight: Tensor, bias: Tensor, hira_A: Tensor, hira_B: Tensor) -> Tensor:
    return x @ (weight * (1 + hira_B @ hira_A)).T + bias


def _low_rank(x: Tensor, weight: Tensor, bias: Tensor, hut_A: Tensor, hut_B: Tensor) -> Tensor:
    return _hira(x, weight, bias, hut_A, hut_B)


def _paper(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor,
    beta: Tensor,
) -> Tensor:
    (out_features, in_features), r = weight.shape, len(hut_A)
    p = [o * r // out_features for o in range(out_features)]
    q = [i * r // in_features for i in range(in_features)]
    return gamma * (x @ (weight * hut_B[:, q] * hut_A[p]).T + bias) + beta


@dataclass(frozen=True)
class Provider:
    """One way to run an adapted layer.

    Attributes:
        label: What tables call it.
        make: Builds it from a linear layer, whose weight it shares, and a rank.
        formula: What it claims to compute, from `x` and its parameters by name.
    """

    label: str
    make: Callable[[nn.Linear, int], nn.Module]
    formula: Callable[..., Tensor]


def _hut(**options: Any) -> Callable[[nn.Linear, int], nn.Module]:
    return partial(HUTLinear.from_linear, **options)


PROVIDERS = {
    "frozen": Provider("frozen linear", FrozenLinear, _frozen),
    "hut_low_rank": Provider("HUT low_rank, fused", _hut(), _low_rank),
    "hut_paper": Provider("HUT paper's form, fused", _hut(**PAPER), _paper),
    "hut_eager": Provider("HUT low_rank, eager", _hut(fused=False), _low_rank),
    "lora": Provider("LoRA", LoRALinear, _lora),
    "hira": Provider("HiRA", HiRALinear, _hira),
}


def prove(provider: Provider, dtype: torch.dtype, device: torch.device, r: int = 4) -> float:
    """Shows on a small layer that a provider computes its formula, gradients included.

    Args:
        provider: Which one.
        dtype: Type of the activations and the base weight.
        device: Where to run it.
        r: Rank of the factors.

    Returns:
        The largest relative error of the output and all gradients, against float64.

    Raises:
        ArithmeticError: An error is above the limit for `dtype`.
    """
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    layer = provider.make(nn.Linear(40, 56, device=device, dtype=dtype), r)
    with torch.no_grad():  # off the identity, or half of the gradients would be zero
        for parameter in layer.parameters():
            parameter.add_(0.3 * normal(parameter.shape).to(parameter))
    x, g = (normal(24, size).to(device, dtype) for size in (40, 56))
    got = _outputs(layer, x, g, dict(layer.named_parameters()))
    exact = {name: tensor.detach().double() for name, tensor in layer.named_parameters()}
    for name, tensor in layer.named_parameters():
        exact[name].requires_grad_(tensor.requires_grad)
    expected = _outputs(partial(provider.formula, **exact), x.double(), g.double(), exact)
    errors = {name: _relative_error(got.get(name), expected[name]) for name in expected}
    for name, error in errors.items():
        if not error <= LIMITS[dtype]:  # written so that NaN does not pass
            raise ArithmeticError(
                f"{provider.label}: {name} is off its formula by {error:.1e}, "
                f"more than the {LIMITS[dtype]:.0e} that {dtype} allows"
            )
    return max(errors.values())


def _outputs(
    layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The output, and the gradients of `x` and of every trainable parameter."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **{f"d {name}": d for name, d in gradients.items()}}


def _relative_error(got: Tensor | None, expected: Tensor) -> float:
    if got is None:
        return math.inf
    return ((got.double() - expected).norm() / expected.norm()).item()
