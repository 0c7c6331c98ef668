"""The ways to run an adapted layer that are compared, each with the formula it claims to compute.

What starts with `peft_` is PEFT's own layer, as users get it: adapters in fp32, or, with `_cast`,
in the compute type. `lora` and `hira` are `methods.py`'s. HUT comes in two forms, `hut_low_rank`
and `hut_paper`, each fused as the planner likes, or in one of the other `MODES`; and through the
two doors of its PEFT integration, `hut_low_rank_config` and `peft_hira_accelerated`.
"""

import copy
import fnmatch
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hut_kernels import PAPER, backends, inject, planner

from . import bases, methods
from .bases import DENSE
from .measure import Call, backward_call, clear_gradients, first_line, forward_call, step_call
from .methods import FrozenLinear, HiRALinear, LoRALinear, Parameters, plain_name, replaced

# ‖out − reference‖ / ‖reference‖ against float64, as in docs/definition.md; in float32 for sums of
# up to 4096 numbers.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
EAGER, COMPILED, GRAPH = "eager", "torch.compile", "CUDA graph"

Adapt = Callable[[nn.Module, str, int], nn.Module]


@dataclass(frozen=True)
class Provider:
    """One way to run adapted layers.

    Attributes:
        label: What tables call it.
        method: Whose costs it has, a key of `cost.METHODS`; None where nobody has counted them.
        adapt: Puts adapters of a rank into the modules of a model whose whole names match a regular
            expression, and freezes the rest; changes the model.
        formula: What a layer claims to compute, from `x` and its parameters by plain name.
        adapters: `"float32"`, or `"compute"` for the compute type.
        run: `EAGER`, `COMPILED` or `GRAPH`.
        force: Strategies that the planner has to take.
    """

    label: str
    method: str | None
    adapt: Adapt
    formula: Callable[[Tensor, Parameters], Tensor]
    adapters: str = "float32"
    run: str = EAGER
    force: Mapping[str, str] = field(default_factory=dict)

    def make(self, linear: nn.Module, r: int) -> nn.Module:
        """One adapted layer over `linear`, whose weight it shares."""
        stack = nn.Sequential(linear)
        bases.mark(stack)
        model = self.adapt(stack, "0", r)
        return next(m for name, m in model.named_modules() if name.rpartition(".")[2] == "0")

    @property
    def for_models(self) -> bool:
        """True if it can be one of many layers: no graph of its own, nothing forced."""
        return self.run == EAGER and not self.force

    @property
    def of_hut(self) -> bool:
        """True for one of this package's own layers."""
        return (self.method or "").startswith("hut_")

    def missing(self, device: torch.device, dtype: torch.dtype, base: str = DENSE) -> str | None:
        """The reason why it cannot run here, over weights stored so; None where it can."""
        if reason := bases.missing(base):
            return reason
        if base != DENSE and not (isinstance(self.adapt, _PEFT) or self.of_hut):
            return "it takes dense weights only"
        if base != DENSE and self.force:
            return "a quantized weight has one strategy"
        if isinstance(self.adapt, _PEFT) and importlib.util.find_spec("peft") is None:
            return "peft is not installed (in the repository: pip install '.[bench]')"
        if self.adapt is _lycoris and importlib.util.find_spec("lycoris") is None:
            return "lycoris is not installed (pip install --no-deps lycoris-lora)"
        if self.adapt is _lycoris and device.type != "cuda":
            return "the kernels of LyCORIS need a CUDA device"
        if isinstance(self.adapt, _PEFT) and self.adapt.cast and dtype == torch.float32:
            return "adapters are in the compute type as it is, float32"
        if self.run == GRAPH and device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if self.force and not (device.type == "cuda" and backends()["triton"]["available"]):
            return "only the Triton backend has strategies to force"
        return None

    def adapter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of its adapters over a base of type `dtype`."""
        return dtype if self.adapters == "compute" else torch.float32


@dataclass(frozen=True)
class _PEFT:
    """`get_peft_model` with one of PEFT's configurations, dropout off."""

    config: str
    options: Callable[[int], Mapping[str, Any]]
    cast: bool = False
    module: str = "peft"
    finish: Callable[[nn.Module], object] = lambda model: None

    def __call__(self, model: nn.Module, targets: str, r: int) -> nn.Module:
        import peft

        kind = getattr(importlib.import_module(self.module), self.config)
        with warnings.catch_warnings():  # on Conv1D layers, whose layout PEFT corrects by itself
            warnings.simplefilter("ignore")
            config = kind(target_modules=targets, **self.options(r))
            made = peft.get_peft_model(model, config, autocast_adapter_dtype=not self.cast)
        self.finish(made)
        return made


def _accelerate(model: nn.Module) -> None:
    from hut_kernels.integrations.peft import accelerate_hira

    accelerate_hira(model)


def _full(model: nn.Module, targets: str, r: int) -> nn.Module:
    """A copy in which everything is trained: the original's weights are frozen, and shared."""
    return copy.deepcopy(model).requires_grad_(True)


def _own(layer: Callable[[nn.Module, int], nn.Module]) -> Adapt:
    def adapt(model: nn.Module, targets: str, r: int) -> nn.Module:
        return replaced(model, targets, lambda linear: layer(linear, r))

    return adapt


def _hut(**options: Any) -> Adapt:
    def adapt(model: nn.Module, targets: str, r: int) -> nn.Module:
        inject(model, targets, r, **options)
        return model

    return adapt


_lycoris = _own(methods.LyCORISLoHa)
FUSED = {"forward": planner.FUSED, "grad_input": planner.FUSED, "grad_factors": planner.FUSED}
STAGED = {"forward": planner.STAGED, "grad_input": planner.STAGED, "grad_factors": planner.CHUNKED}
MODES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # suffix: what labels add, options of the layer, fields of the provider
    "": ("", {}, {}),
    "_fused": (", forced fused", {}, {"force": FUSED}),
    "_staged": (", forced staged", {}, {"force": STAGED}),
    "_compiled": (", compiled", {}, {"run": COMPILED}),
    "_graph": (", graph", {}, {"run": GRAPH}),
    "_eager": (", plain PyTorch", {"fused": False}, {}),
    "_eager_compiled": (", plain PyTorch compiled", {"fused": False}, {"run": COMPILED}),
    "_eager_graph": (", plain PyTorch graph", {"fused": False}, {"run": GRAPH}),
}
FORMS = {
    "hut_low_rank": ("HUT low_rank", "hut_low_rank", {}, methods.low_rank_formula),
    "hut_paper": ("HUT paper's form", "hut_two_sided", PAPER, methods.paper_formula),
}
PEFT_METHODS = {
    "lora": ("LoRA", "LoraConfig", lambda r: {"r": r, "lora_alpha": r}, methods.lora_formula),
    "hira": ("HiRA", "HiraConfig", lambda r: {"r": r}, methods.hira_formula),
    "loha": ("LoHa", "LoHaConfig", lambda r: {"r": r, "alpha": r}, methods.loha_formula),
}
# Those that only run if they are named: whose costs, options by rank, formula. OFT's blocks have
# about as many parameters as two factors; IA3 has a vector, whatever the rank.
MORE_OF_PEFT: dict[str, tuple[str, str | None, str, Callable[[int], Mapping[str, Any]], Any]] = {
    "rslora": (
        "rsLoRA",
        "peft_lora",
        "LoraConfig",
        lambda r: {"r": r, "lora_alpha": r, "use_rslora": True},
        methods.rslora_formula,
    ),
    "dora": (
        "DoRA",
        None,
        "LoraConfig",
        lambda r: {"r": r, "lora_alpha": r, "use_dora": True},
        methods.dora_formula,
    ),
    "vera": ("VeRA", None, "VeraConfig", lambda r: {"r": r}, methods.vera_formula),
    "oft": (
        "OFT",
        None,
        "OFTConfig",
        lambda r: {"r": 0, "oft_block_size": 2 * r},
        methods.oft_formula,
    ),
    "ia3": ("IA3", None, "IA3Config", lambda r: {"feedforward_modules": []}, methods.ia3_formula),
    "lokr": ("LoKr", None, "LoKrConfig", lambda r: {"r": r, "alpha": r}, methods.lokr_formula),
}


def _hut_provider(form: str, mode: str) -> Provider:
    label, method, options, formula = FORMS[form]
    addition, more, fields = MODES[mode]
    method = f"{method}_eager" if mode.startswith("_eager") else method
    return Provider(f"{label}{addition}", method, _hut(**options, **more), formula, **fields)


def _peft_provider(name: str, cast: bool) -> Provider:
    label, config, options, formula = PEFT_METHODS[name]
    return Provider(
        f"{label} (PEFT{', adapters cast' if cast else ''})",
        f"peft_{name}",
        _PEFT(config, options, cast),
        formula,
        "compute" if cast else "float32",
    )


def _more_of_peft(name: str) -> Provider:
    label, method, config, options, formula = MORE_OF_PEFT[name]
    return Provider(f"{label} (PEFT)", method, _PEFT(config, options), formula)


_HIRA = _PEFT("HiraConfig", lambda r: {"r": r}, finish=_accelerate)
_HUT_CONFIG = _PEFT("HUTConfig", lambda r: {"r": r}, module="hut_kernels.integrations.peft")


LORA = Provider("LoRA, lean", "lora", _own(LoRALinear), methods.lora_formula)
PROVIDERS = {
    "frozen": Provider("frozen linear", "frozen", _own(FrozenLinear), methods.frozen_formula),
    "lora": LORA,
    "lora_graph": Provider(
        "LoRA, lean, graph", "lora", _own(LoRALinear), methods.lora_formula, run=GRAPH
    ),
    **{
        f"peft_{name}{'_cast' if cast else ''}": _peft_provider(name, cast)
        for name in PEFT_METHODS
        for cast in (False, True)
    },
    "peft_hira_accelerated": Provider(
        "HiRA (accelerate_hira)", "hut_low_rank", _HIRA, methods.hira_formula
    ),
    "hut_low_rank_config": Provider(
        "HUT low_rank (HUTConfig)", "hut_low_rank", _HUT_CONFIG, methods.low_rank_formula
    ),
    **{f"peft_{name}": _more_of_peft(name) for name in MORE_OF_PEFT},
    "lycoris_loha": Provider("LoHa (LyCORIS, bypass)", None, _lycoris, methods.loha_formula),
    "full": Provider("full fine-tuning", "full", _full, methods.frozen_formula, "compute"),
    "hira": Provider("HiRA, plain PyTorch", "hira", _own(HiRALinear), methods.hira_formula),
    **{f"{form}{mode}": _hut_provider(form, mode) for form in FORMS for mode in MODES},
}


def named(patterns: Sequence[str]) -> list[str]:
    """The names of providers that match shell patterns, in the registry's order.

    Raises:
        ValueError: A pattern that matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(PROVIDERS, pattern):
            raise ValueError(f"no provider matches {pattern!r}; there are {', '.join(PROVIDERS)}")
    return [name for name in PROVIDERS if any(fnmatch.fnmatchcase(name, each) for each in patterns)]


def passes(provider: Provider, layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Call]:
    """The passes of a layer to time: `forward`, `backward` (but in graphs), `step`.

    Each leaves its gradients in `x` and the layer's parameters; running `step` gives the output.

    Args:
        provider: How to run it.
        layer: What `provider.make` gave.
        x: The input; its gradient is computed where it requires one.
        g: The upstream gradient.
    """
    if provider.run == GRAPH:
        return _graph_passes(layer, x, g)
    # One graph for one shape, or an error: no fall-back to eager, in whole or in part, unseen.
    compiled = provider.run == COMPILED
    call = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
    cases = {
        "forward": forward_call(call, x),
        "backward": backward_call(call, x, g),
        "step": step_call(call, x, g),
    }
    if not provider.force:
        return cases
    return {name: _forced(case, provider.force) for name, case in cases.items()}


def _forced(case: Call, force: Mapping[str, str]) -> Call:
    def within(call: Callable[[], object]) -> object:
        with planner.force(**force):
            return call()

    return Call(partial(within, case.run), partial(within, case.prepare))


def _graph_passes(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Call]:
    """The forward and the step, each captured once; a replay costs the host one launch."""

    def step() -> Tensor:
        y = layer(x)
        y.backward(g)
        return y

    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled, and libraries have their buffers
            step()
    torch.cuda.current_stream(x.device).wait_stream(stream)
    return {"forward": _captured(lambda: layer(x), layer, x), "step": _captured(step, layer, x)}


def _captured(run: Callable[[], Tensor], layer: nn.Module, x: Tensor) -> Call:
    clear_gradients(layer, x)  # a replay then writes gradients, where it would add to old ones
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Without its graph of autograd: that holds the node which adds up x's gradient, and with
        # it this stream, for every provider that is timed on the same x afterwards.
        y = run().detach()

    def replay() -> Tensor:
        graph.replay()
        return y

    return Call(replay, replay=True)


@dataclass(frozen=True)
class Admission:
    """The providers that may be timed.

    Attributes:
        errors: Of each that proved its formula, the largest relative error.
        left_out: Why the others may not, by name.
        wrong: Those of the others that failed their proof: a defect, not a lack.
    """

    errors: dict[str, float]
    left_out: dict[str, str]
    wrong: list[str]


def admit(
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    on_each: Callable[[str], object] = lambda name: None,
    base: str = DENSE,
) -> Admission:
    """Has each provider prove its formula, where it can run at all.

    Args:
        names: Keys of `PROVIDERS`.
        dtype: Type of the activations and the base weight.
        device: Where to run.
        on_each: Called with each name before its turn.
        base: How the base weight is stored, of `bases.BASES`.
    """
    found = Admission({}, {}, [])
    for name in names:
        on_each(name)
        reason = PROVIDERS[name].missing(device, dtype, base)
        if reason is None:
            try:
                found.errors[name] = prove(PROVIDERS[name], dtype, device, base=base)
                continue
            except ArithmeticError as failure:
                reason = str(failure)
                found.wrong.append(name)
            except Exception as failure:  # an old PEFT, no compiler: the rest can be measured
                reason = first_line(failure)
        found.left_out[name] = reason
    return found


def prove(
    provider: Provider, dtype: torch.dtype, device: torch.device, r: int = 4, base: str = DENSE
) -> float:
    """Shows on a small layer that a provider computes its formula, gradients included.

    Args:
        provider: Which one.
        dtype: Type of the activations and the base weight.
        device: Where to run it.
        r: Rank of the factors.
        base: How the base weight is stored, of `bases.BASES`.

    Returns:
        The largest relative error of the output and all gradients, against float64.

    Raises:
        ArithmeticError: An error is above the limit for `dtype`.
    """
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    linear = nn.Linear(64, 48, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(0.3 * normal(parameter.shape).to(parameter))
        layer = provider.make(bases.stored(linear, base), r)
        for parameter in layer.parameters():  # off the identity, or half of the gradients are zero
            if parameter.requires_grad:
                parameter.add_(0.3 * normal(parameter.shape).to(parameter))
    x, g = (normal(24, size).to(device, dtype) for size in (64, 48))
    x.requires_grad_()
    return prove_step(provider, layer, passes(provider, layer, x, g)["step"], x, g)


def prove_step(
    provider: Provider, layer: nn.Module, step: Call, x: Tensor, g: Tensor, rows: int = 16
) -> float:
    """Shows of a step as it will be timed that it computes its formula.

    At the size that is timed the planner may choose other kernels than on a small layer. While this
    runs, the upstream gradient is zero but in a few rows: they decide every gradient, and float64
    has to do with no more of them.

    Args:
        provider: Whose step it is.
        layer: What it runs, its factors off their initial point.
        step: Of `passes`; nothing else has run since it was made.
        x, g: What it was made with; `g` is as it was afterwards.
        rows: How many are compared.

    Returns:
        The largest relative error of the output and all gradients, against float64.

    Raises:
        ArithmeticError: An error is above the limit for the type of `x`.
    """
    some = torch.linspace(0, len(x) - 1, min(rows, len(x)), device=x.device).round().long()
    whole = g.clone()
    g.zero_()[some] = whole[some]
    try:
        step.prepare()
        y = step.run().detach()[some]
        got = {"y": y, "dx": x.grad[some], **_gradients(layer.named_parameters())}
        expected = _expected(provider, layer, x.detach()[some], g[some])
    finally:
        g.copy_(whole)
    errors = {name: _relative_error(got.get(name), expected[name]) for name in expected}
    limit = LIMITS[x.dtype]
    if x.dtype == torch.float32:
        limit *= max(1.0, math.sqrt(max(x.shape[1], g.shape[1]) / 4096))
    for name, error in errors.items():
        if not error <= limit:  # written so that NaN does not pass
            raise ArithmeticError(
                f"{provider.label}: {name} is off its formula by {error:.1e}, "
                f"more than the {limit:.0e} that {x.dtype} allows"
            )
    return max(errors.values())


def _expected(provider: Provider, layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The same by the formula, in float64 and by autograd."""
    x = x.double().requires_grad_()
    exact = {
        plain_name(name): p.detach().double().requires_grad_(p.requires_grad)
        for name, p in bases.parameters(layer, g.dtype)
    }
    constants = {plain_name(name): b.double() for name, b in layer.named_buffers()}
    y = provider.formula(x, {**constants, **exact})
    y.backward(g.double())
    return {"y": y.detach(), "dx": x.grad, **_gradients(exact.items())}


def _gradients(parameters: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {f"d {plain_name(name)}": p.grad for name, p in parameters if p.grad is not None}


def _relative_error(got: Tensor | None, expected: Tensor) -> float:
    if got is None:
        return math.inf
    return ((got.double() - expected).norm() / expected.norm()).item()
