"""The layers of other methods, as lean as plain PyTorch lets them be, and every method's formula.

`LoRALinear` is the floor of a LoRA layer: two full products a step and thin ones, with nothing that
the formula does not need. `HiRALinear` is HiRA's formula under ordinary autograd. Both keep their
factors in fp32, as HUT and PEFT do, and compute in the type of their input.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hut_kernels.nn import is_conv1d

Parameters = Mapping[str, Tensor]


class Adapted(nn.Module):
    """A frozen layer's weight and bias, shared with it, and factors beside them."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.conv1d = is_conv1d(linear)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def matrix(self) -> Tensor:
        """The weight as `[out_features, in_features]`."""
        return self.weight.t() if self.conv1d else self.weight

    def factors(self, r: int) -> tuple[nn.Parameter, nn.Parameter]:
        out_features, in_features = self.matrix.shape
        options = {"dtype": torch.float32, "device": self.weight.device}
        A = nn.Parameter(torch.empty(r, in_features, **options))
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A, nn.Parameter(torch.zeros(out_features, r, **options))

    def computed(self, x: Tensor) -> Tensor:
        """The input in the type to compute in: autocast's, or its own."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class FrozenLinear(Adapted):
    """A linear layer that trains nothing; its backward still computes the gradient of `x`."""

    def __init__(self, linear: nn.Module, r: int) -> None:
        super().__init__(linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class LoRALinear(Adapted):
    """`y = x Wᵀ + bias + (x Aᵀ) Bᵀ`: LoRA with alpha = r and without dropout."""

    def __init__(self, linear: nn.Module, r: int) -> None:
        super().__init__(linear)
        self.lora_A, self.lora_B = self.factors(r)

    def forward(self, x: Tensor) -> Tensor:
        return _LoRA.apply(self.computed(x), self.matrix, self.bias, self.lora_A, self.lora_B)

    def to_linear(self) -> nn.Linear:
        """The merged layer, its weight `W + B A`."""
        out_features, in_features = self.matrix.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        merged = self.matrix + self.lora_B @ self.lora_A
        linear.weight = nn.Parameter(merged.detach().to(self.weight.dtype))
        linear.bias = self.bias
        return linear


class _LoRA(torch.autograd.Function):
    """LoRA with the thin products added in place; keeps x and x Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = rows @ A.to(x.dtype).t()  # [N, r]
        y = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(inner, B.to(x.dtype).t())
        ctx.save_for_backward(x, inner, weight, A, B)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, A, B = ctx.saved_tensors
        rows, g = x.flatten(0, -2), grad.flatten(0, -2)
        thin = g @ B.to(g.dtype)  # [N, r]
        d_A, d_B = thin.t() @ rows, g.t() @ inner
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (g @ weight.to(g.dtype)).addmm_(thin, A.to(g.dtype)).view(x.shape)
        return d_x, None, None, d_A.to(A.dtype), d_B.to(B.dtype)


class HiRALinear(Adapted):
    """`y = x Wᵀ + bias + x (W ⊙ (B A))ᵀ`: HiRA, two full products forward, three backward."""

    def __init__(self, linear: nn.Module, r: int) -> None:
        super().__init__(linear)
        self.hira_A, self.hira_B = self.factors(r)

    def forward(self, x: Tensor) -> Tensor:
        x = self.computed(x)
        A, B = self.hira_A.to(x.dtype), self.hira_B.to(x.dtype)
        update = F.linear(x, self.matrix * (B @ A))
        return F.linear(x, self.matrix, self.bias) + update


class LyCORISLoHa(Adapted):
    """LyCORIS's LoHa in the mode that never forms the update where its kernels run."""

    def __init__(self, linear: nn.Module, r: int) -> None:
        from lycoris.modules.loha import LohaModule

        super().__init__(linear)
        self.lycoris = LohaModule("layer", linear, lora_dim=r, alpha=r, bypass_mode=True)
        self.lycoris.to(self.weight.device, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.lycoris(x)


def replaced(model: nn.Module, targets: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Freezes `model` and replaces its modules whose whole name matches `targets`, in place."""
    model.requires_grad_(False)
    for name in [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]:
        model.set_submodule(name, make(model.get_submodule(name)))
    return model


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own over the very same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # a Linear8bitLt has its codes and scales there
        state = vars(module).get("state")
        tensors += (
            [value for value in vars(state).values() if isinstance(value, Tensor)] if state else []
        )
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# What each method claims to compute, from x and its parameters by their plain names.


def frozen_formula(x: Tensor, p: Parameters) -> Tensor:
    return x @ p["weight"].T + p["bias"]


def lora_formula(x: Tensor, p: Parameters) -> Tensor:
    return x @ (p["weight"] + p["lora_B"] @ p["lora_A"]).T + p["bias"]


def hira_formula(x: Tensor, p: Parameters) -> Tensor:
    return x @ (p["weight"] * (1 + p["hira_B"] @ p["hira_A"])).T + p["bias"]


def loha_formula(x: Tensor, p: Parameters) -> Tensor:
    first, second = (p[f"hada_w{n}_a"] @ p[f"hada_w{n}_b"] for n in (1, 2))
    return x @ (p["weight"] + first * second).T + p["bias"]


def rslora_formula(x: Tensor, p: Parameters) -> Tensor:
    """LoRA with `scaling = alpha / sqrt(r)`, alpha = r."""
    update = math.sqrt(len(p["lora_A"])) * p["lora_B"] @ p["lora_A"]
    return x @ (p["weight"] + update).T + p["bias"]


def dora_formula(x: Tensor, p: Parameters) -> Tensor:
    """A trained norm of each row; that of W + B A is a constant in backward, as in its paper."""
    weight = p["weight"] + p["lora_B"] @ p["lora_A"]
    scale = p["lora_magnitude_vector"] / weight.norm(dim=1).detach()
    return x @ (scale[:, None] * weight).T + p["bias"]


def vera_formula(x: Tensor, p: Parameters) -> Tensor:
    """Random matrices that all layers share, cut to a layer's size, between trained vectors."""
    out_features, in_features = p["weight"].shape
    A, B = p["vera_A"][:, :in_features], p["vera_B"][:out_features]
    update = (p["vera_lambda_b"][:, None] * B) @ (p["vera_lambda_d"][:, None] * A)
    return x @ (p["weight"] + update).T + p["bias"]


def oft_formula(x: Tensor, p: Parameters) -> Tensor:
    """W0 R, R a block's rotation by five terms of Cayley's series, the last counted once."""
    angles = p["oft_R"]
    blocks, size = len(angles), round((1 + math.sqrt(1 + 8 * angles.shape[1])) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    upper = angles.new_zeros(blocks, size, size).index_put(
        (torch.arange(blocks)[:, None], rows, columns), angles
    )
    Q = upper - upper.mT
    R = torch.eye(size).to(Q) + 2 * (Q + Q @ Q + Q @ Q @ Q) + Q @ Q @ Q @ Q
    rotated = torch.einsum("nbi,bij->nbj", x.unflatten(-1, (blocks, size)), R).flatten(-2)
    return rotated @ p["weight"].T + p["bias"]


def ia3_formula(x: Tensor, p: Parameters) -> Tensor:
    return p["ia3_l"].flatten() * (x @ p["weight"].T + p["bias"])


def lokr_formula(x: Tensor, p: Parameters) -> Tensor:
    second = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    return x @ (p["weight"] + torch.kron(p["lokr_w1"], second)).T + p["bias"]


def low_rank_formula(x: Tensor, p: Parameters) -> Tensor:
    return x @ (p["weight"] * (1 + p["hut_B"] @ p["hut_A"])).T + p["bias"]


def paper_formula(x: Tensor, p: Parameters) -> Tensor:
    weight, A, B = p["weight"], p["hut_A"], p["hut_B"]
    (out_features, in_features), r = weight.shape, len(A)
    p_group = [o * r // out_features for o in range(out_features)]
    q_group = [i * r // in_features for i in range(in_features)]
    product = x @ (weight * B[:, q_group] * A[p_group]).T
    return p["gamma"] * (product + p["bias"]) + p["beta"]


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers around it, `lora_A` for `lora_A.default.weight`."""
    for wrapper in ("base_layer.", "lycoris.", ".default"):
        name = name.replace(wrapper, "")
    return name if name == "weight" else name.removesuffix(".weight")
