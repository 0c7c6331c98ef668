"""The parts of a plan on Triton: a launch config, and a launcher or the staged GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .. import torch_backend
from ..formats import Stored
from ..layer import FactorGrads, Layer, Needs, as_rows, effective_bias
from ..planner import FUSED, Plan
from . import forward as fused_forward
from . import grad_factors as fused_grad_factors
from . import grad_input as fused_grad_input
from . import grad_reduce as chunked_grad_factors
from . import stored_weight as stored_weight_kernel
from . import weight as weight_kernel
from .launch import (
    LaunchConfig,
    busy_programs,
    cdiv,
    choose_num_splits,
    choose_reduction_splits,
    is_heavy,
    is_transposed,
    kind,
)
from .tables import launch_config


class DoesNotFit(Exception):
    """A launch of `kernel`, by its name in the tables, wanted more than the device has."""

    def __init__(self, kernel: str, error: OutOfResources) -> None:
        self.kernel = kernel
        self.lack = f"{error.name} of {error.required}, at most {error.limit}"


class _Launching:
    """Around a launch, which may turn out to be too large for the device."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OutOfResources):
            raise DoesNotFit(self.kernel, error) from error


def linear_forward(plan: Plan, x: Tensor, layer: Layer) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
    if plan.forward == FUSED:
        x2d = as_rows(x)
        with _Launching("stored_forward" if isinstance(layer.weight, Stored) else "forward"):
            if is_transposed(layer.weight):
                y = _times_weight(plan, x2d, layer.transposed)
            else:
                y = _times_weight_t(plan, x2d, layer)
        return y.view(*x.shape[:-1], plan.problem.O)
    total_bias = effective_bias(layer.bias, layer.gamma, layer.beta, x.dtype)
    if layer.spec.precision == "split":
        return torch_backend.split_forward(x, layer, _stage_split(plan, layer, x.dtype), total_bias)
    return F.linear(x, stage(plan, layer, x.dtype), total_bias)


def linear_backward(
    plan: Plan, grad: Tensor, x: Tensor | None, layer: Layer, need_x: bool, needs: Needs
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
    grads = [grad_input(plan, grad, layer)] if need_x else []
    if x is not None and any(needs):
        factors = grad_factors(plan, grad, x, layer, needs)
        grads += [gradient for gradient in factors if gradient is not None]
    return grads


def merged_weight(plan: Plan, layer: Layer, dtype: torch.dtype) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    kernel, launch = _weight_kernel(layer)
    config = _config(kernel, plan, torch.float32, layer)
    with _Launching(kernel):
        return launch(layer, dtype, config, exact=True)


def dequantize(weight: Stored, dtype: torch.dtype, arch: str) -> Tensor:
    """A stored W0, `[out, in]`, in `dtype`."""
    config = launch_config("stored", arch, 1, 1, kind(dtype))
    try:
        return stored_weight_kernel.launch_dequantize(weight, dtype, config)
    except OutOfResources:
        return weight.dense(dtype)


def grad_input(plan: Plan, grad: Tensor, layer: Layer) -> Tensor:
    """`dx = (gamma * grad) W`, `[..., in]`, in grad's type."""
    if plan.grad_input == FUSED:
        grad2d = as_rows(grad)
        with _Launching("grad_input"):
            grad2d, bare = fused_grad_input.join_gamma(grad2d, layer)
            if is_transposed(layer.weight):
                dx = _times_weight_t(plan, grad2d, bare.transposed)
            else:
                dx = _times_weight(plan, grad2d, bare)
        return dx.view(*grad.shape[:-1], plan.problem.K)
    if layer.spec.precision == "split":
        return torch_backend.split_grad_input(grad, layer, _stage_split(plan, layer, grad.dtype))
    return grad @ stage(plan, layer, grad.dtype)


def grad_factors(plan: Plan, grad: Tensor, x: Tensor, layer: Layer, needs: Needs) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, each where it is needed."""
    grad2d, x2d, O = as_rows(grad), as_rows(x), plan.problem.O
    if plan.grad_factors == FUSED:
        config = _config("grad_factors", plan, x.dtype, layer)
        splits = _splits(O, config, plan)
        with _Launching("grad_factors"):
            return fused_grad_factors.launch_grad_factors(grad2d, x2d, layer, needs, config, splits)
    kernel = "stored_reduce" if isinstance(layer.weight, Stored) else "grad_reduce"
    config = _config(kernel, plan, x.dtype, layer)
    chunk = min(plan.chunk, O)
    splits = _splits(chunk, config, plan)
    with _Launching(kernel):
        return chunked_grad_factors.launch_grad_reduce(
            grad2d, x2d, layer, needs, config, splits, chunk
        )


def _times_weight_t(plan: Plan, x: Tensor, layer: Layer) -> Tensor:
    """Fused `gamma * (x W^T + bias) + beta` of a row-major W0: y, or a transposed one's dx."""
    kernel = "stored_forward" if isinstance(layer.weight, Stored) else "forward"
    config = _config(kernel, plan, x.dtype, layer)
    tiles = cdiv(len(x), config.BN) * cdiv(layer.sizes[0], config.BO)
    num_splits = choose_num_splits(tiles, cdiv(layer.sizes[1], config.BK), plan.device.sms)
    return fused_forward.launch_forward(x, layer, config, num_splits)


def _times_weight(plan: Plan, grad: Tensor, layer: Layer) -> Tensor:
    """Fused `gamma * (grad W + bias) + beta` of a row-major W0: dx, or a transposed one's y."""
    config = _config("grad_input", plan, grad.dtype, layer)
    tiles = cdiv(len(grad), config.BN) * cdiv(layer.sizes[1], config.BK)
    num_splits = choose_num_splits(tiles, cdiv(layer.sizes[0], config.BO), plan.device.sms)
    return fused_grad_input.launch_grad_input(grad, layer, config, num_splits)


def stage(plan: Plan, layer: Layer, dtype: torch.dtype) -> Tensor:
    """`gamma W`, or under `split` `gamma (W0 * (T - 1))`, in the shared workspace.

    The workspace is a block of torch's caching allocator, free again when the product has been
    enqueued: every layer's W lands in the same memory, also inside a CUDA graph.
    """
    kernel, launch = _weight_kernel(layer)
    config, is_split = _config(kernel, plan, dtype, layer), layer.spec.precision == "split"
    with _Launching(kernel):
        return launch(layer, dtype, config, subtract_identity=is_split)


class Experts:
    """The kernels over a stack of experts: one launch for the experts of a group.

    Args:
        plan: The plan of the stack.
        layer: Its operands, `[experts, ...]` each.
    """

    def __init__(self, plan: Plan, layer: Layer) -> None:
        self.plan, self.layer = plan, layer

    gram = staticmethod(chunked_grad_factors.gram)

    def stage(self, dtype: torch.dtype, experts: Tensor) -> Tensor:
        """`gamma W` of those experts, int64: `[group, out, in]`, with weight's order of strides."""
        config = _config("weight", self.plan, dtype, self.layer)
        with _Launching("weight"):
            return weight_kernel.launch_weight(self.layer, dtype, config, experts=experts)

    def start_reduction(self, dtype: torch.dtype, needs: Needs, group: int) -> None:
        """Begins to reduce G, `group` experts at a time, which share the device's programs."""
        config = _config("grad_reduce", self.plan, dtype, self.layer)
        splits = _splits(self.plan.problem.O, config, self.plan, group)
        self.reduction = chunked_grad_factors.ExpertsReduction(
            self.layer, dtype, needs, config, splits
        )

    def reduce(self, G: Tensor, experts: Tensor) -> None:
        """Reduces G, `[group, out, in]`, of those experts."""
        with _Launching("grad_reduce"):
            self.reduction.add(G, experts)

    def finish_reduction(self) -> FactorGrads:
        """`d hut_A`, `d hut_B`, `sum_i W G`, `[experts, ...]` each, where it is needed."""
        return self.reduction.finish()


def _weight_kernel(layer: Layer) -> tuple[str, Callable[..., Tensor]]:
    """The kernel that writes W, by its name in the tables, and its launcher."""
    if isinstance(layer.weight, Stored):
        return "stored", stored_weight_kernel.launch_stored_weight
    return "weight", weight_kernel.launch_weight


def _stage_split(plan: Plan, layer: Layer, dtype: torch.dtype) -> torch_backend.Stage:
    """The two matrices of `split`: the update, and a stored W0."""
    return lambda update: (
        stage(plan, layer, dtype) if update else dequantize(layer.weight, dtype, plan.device.arch)
    )


def _config(kernel: str, plan: Plan, dtype: torch.dtype, layer: Layer) -> LaunchConfig:
    where = kernel, plan.device.arch, plan.problem.N, plan.problem.r, kind(dtype)
    config = launch_config(*where)
    if is_heavy(kernel, layer, dtype, config):
        return launch_config(*where, low_smem=True, gathers=layer.spec.transform == "two_sided")
    return config


def _splits(rows: int, config: LaunchConfig, plan: Plan, group: int = 1) -> tuple[int, int]:
    """The splits of `rows` of O, and of K, that programs reduce on their own.

    A `group` of experts has as many each.
    """
    problem = plan.problem
    return choose_reduction_splits(
        cdiv(rows, config.BO),
        cdiv(problem.K, config.BK),
        problem.O,
        problem.K,
        problem.r,
        problem.partial_bytes,
        cdiv(busy_programs(plan.device.sms, config.warps), group),
    )
