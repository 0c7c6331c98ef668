"""The experts suite: a module of stacked experts, HUT beside PEFT's LoRA and a lean one.

PEFT's LoRA runs under `grouped_mm`: under `eager` it adds its factors to the whole stack once for
each expert that has tokens, which would flatter HUT. The lean LoRA multiplies by its factors, two
thin products an expert, and shares all else with HUT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hut_kernels.experts import HUTExperts
from hut_kernels.grouped import grouped_product

from ..measure import Call, Quantiles, interleaved, kept_bytes, peak_bytes, ratios
from .layer import type_name

Row = dict[str, Any]
BASELINES = ("peft_lora", "lora", "frozen")
LABELS = {
    "frozen": "frozen experts",
    "lora": "LoRA, lean: two thin products",
    "peft_lora": "LoRA, PEFT's target_parameters",
    "hut_low_rank": "HUT",
    "hut_paper": "HUT, two_sided",
    "hut_idle": "HUT, eight times the experts, the others idle",
}
STACKS = ("gate_up_proj", "down_proj")


class Shape(NamedTuple):
    """A module of experts and its tokens."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int


def parsed(texts: Sequence[str], tokens: Sequence[int]) -> list[Shape]:
    """Shapes of `EXPERTSxTOPxHIDDENxINTERMEDIATE`, at each number of tokens (ValueError)."""
    shapes = []
    for text in texts:
        parts = text.split("x")
        if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(
                f"{text} is no shape of experts: EXPERTSxTOPxHIDDENxINTERMEDIATE, as in 8x2x512x512"
            )
        shapes += [Shape(count, *map(int, parts)) for count in tokens]
    return shapes


def measure(
    shape: Shape,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    on_round: Callable[[float], object] = lambda share: None,
) -> list[Row]:
    """A step of every method on one module, in interleaved rounds, and what it holds.

    Args:
        shape: The module and its tokens, each to `top_k` different experts at random.
        r: Rank of the factors.
        dtype: Type of the activations and the stacks; factors are float32.
        device: Where to run.
        seconds: Time to spend on timing.
        on_round: Called with the share that is done.

    Returns:
        One row per method: time of a step (forward, gradients of the hidden states and the
        factors), its peak above what is resident, and what a forward keeps; of either also what is
        above the frozen experts'.

    Raises:
        ArithmeticError: A method that does not compute its formula.
    """
    few = _base(shape, dtype, device)
    index = torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(shape.tokens)])
    weights = torch.rand(shape.tokens, shape.top_k).softmax(-1).to(device, dtype)
    x = torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=device, requires_grad=True)
    given, g = (x, index.to(device), weights), torch.randn_like(x)
    modules = {name: _adapted(name, few, shape, r, dtype, device) for name in LABELS}
    for name, module in modules.items():
        _prove(name, module, given)
    cases = {name: _step(module, given, g) for name, module in modules.items()}
    times = interleaved(cases, device, seconds, on_round=on_round)
    bytes_of = {name: _bytes(module, given, g, device) for name, module in modules.items()}
    frozen = bytes_of["frozen"]
    return [
        {
            "suite": "experts",
            "provider": name,
            "label": label,
            "types": {
                "compute": type_name(dtype),
                "weight": type_name(dtype),
                "adapter": "float32",
                "autocast": None,
            },
            "case": {**shape._asdict(), "r": r},
            "seconds": {"step": Quantiles.of(times[name]).as_dict()},
            "versus": {
                other: {"step": ratios(times[name], times[other]).as_dict()}
                for other in (*BASELINES, "hut_low_rank")
            },
            "bytes": bytes_of[name]
            | {f"{key}_above": max(0, bytes_of[name][key] - frozen[key]) for key in frozen},
        }
        for name, label in LABELS.items()
    ]


def _base(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A module of random experts, frozen, under `grouped_mm`."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to(device, dtype).requires_grad_(False)
    for name in STACKS:
        stack = getattr(experts, name)
        stack.normal_(0, stack.shape[-1] ** -0.5)
    return experts


def _adapted(
    name: str, base: Any, shape: Shape, r: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The experts under a method; all but the idle ones share the stacks."""
    if name == "hut_idle":
        base = _base(shape._replace(experts=8 * shape.experts), dtype, device)
    model = nn.ModuleDict({"experts": _sharing(base)})
    if name == "lora":
        return _Lora(base, r)
    if name == "peft_lora":
        from peft import LoraConfig, get_peft_model

        parameters = [f"experts.{stack}" for stack in STACKS]
        config = LoraConfig(r=r, target_modules=[], target_parameters=parameters)
        get_peft_model(model, config)
    elif name != "frozen":
        from hut_kernels import inject

        form = {"transform": "two_sided"} if name == "hut_paper" else {}
        inject(model, [], r, target_parameters=STACKS, **form)
    with torch.no_grad():  # off the identity, as in training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model["experts"]


def _sharing(base: Any) -> Any:
    """A copy of the module and of its configuration, on the same stacks."""
    memo: dict[int, Any] = {id(getattr(base, name)): getattr(base, name) for name in STACKS}
    return copy.deepcopy(base, memo)


class _Lora(nn.Module):
    """Experts whose every product is `x W0^T + (x A^T) B^T`, on HUT's way of tokens."""

    def __init__(self, base: Any, r: int) -> None:
        super().__init__()
        self.base = base
        self.factors = nn.ModuleDict()
        for name in STACKS:
            experts, out_features, in_features = getattr(base, name).shape
            self.factors[name] = HUTExperts(
                experts, in_features, out_features, r, device=base.down_proj.device
            )
            nn.init.normal_(self.factors[name].hut_B, 0, 0.1)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        from hut_kernels.integrations import experts

        route = experts._route(index, self.base.num_experts)
        h = experts._Dispatch.apply(x, route.token, route.place)
        h = self._project("gate_up_proj", h, route.offsets)
        h = self._project("down_proj", self.base._apply_gate(h), route.offsets)
        return experts._Combine.apply(h, weights, *route[:3])

    def _project(self, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        factors: Any = self.factors[name]
        counts = [end - start for start, end in pairwise([0, *offsets.tolist()])]
        # In one split: a slice's backward would fill a gradient of all rows for each expert.
        parts = x.split(counts)
        hut_A, hut_B = factors.hut_A.to(x.dtype), factors.hut_B.to(x.dtype)
        update = [
            F.linear(F.linear(part, A), B) for part, A, B in zip(parts, hut_A, hut_B, strict=True)
        ]
        return grouped_product(x, getattr(self.base, name), offsets) + torch.cat(update)


def _step(module: nn.Module, given: tuple[Tensor, ...], g: Tensor) -> Call:
    def run() -> Tensor:
        y = module(*given)
        y.backward(g)
        return y

    def prepare() -> None:
        given[0].grad = None
        module.zero_grad(set_to_none=True)

    return Call(run, prepare)


def _bytes(module: nn.Module, given: tuple[Tensor, ...], g: Tensor, device: torch.device) -> Row:
    return {
        "saved": kept_bytes(Call(lambda: module(*given)), device),
        "peak": peak_bytes(_step(module, given, g), device),
    }


def _prove(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Compares a method's output with that of float32 experts of its merged weights."""
    with torch.no_grad():
        found = module(*given).float()
        merged = _merged(name, module)
        x, index, weights = given
        expected = torch.zeros_like(found)
        for expert in range(len(merged["down_proj"])):
            token, place = torch.where(index == expert)
            gate_up = F.linear(x[token].float(), merged["gate_up_proj"][expert])
            gate, up = gate_up.chunk(2, -1)
            y = F.linear(F.silu(gate) * up, merged["down_proj"][expert])
            expected.index_add_(0, token, y * weights[token, place, None].float())
        error = float((found - expected).norm() / expected.norm())
    if not error < 3e-2:
        raise ArithmeticError(f"{name} does not compute its formula: error {error:.1e}")


def _merged(name: str, module: Any) -> dict[str, Tensor]:
    """The stacks with the factors in them, in float32."""
    if name == "frozen":
        return {stack: getattr(module, stack).float() for stack in STACKS}
    if name == "lora":
        return {
            stack: getattr(module.base, stack).float()
            + module.factors[stack].hut_B @ module.factors[stack].hut_A
            for stack in STACKS
        }
    if name == "peft_lora":
        return {
            wrapper.parameter_name: wrapper.get_param()
            + wrapper.get_delta_weight("default").float()
            for wrapper in (module, module.base_layer)
        }
    from hut_kernels.experts import merged_stack

    return {
        stack: merged_stack(
            getattr(module, stack),
            *getattr(module, f"hut_{stack}").active_factors(),
            False,
            torch.float32,
        )
        for stack in STACKS
    }
