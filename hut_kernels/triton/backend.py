"""The operators on Triton: a plan, a row of the tables, and a launcher or the staged products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import planner, torch_backend
from ..definition import FactorGrads, Needs, Spec, as_rows, merged_bias
from ..dispatch import dtype_name, gpu
from ..planner import FUSED, Device, Plan, Problem
from . import forward as fused_forward
from . import grad_factors as fused_grad_factors
from . import grad_input as fused_grad_input
from . import grad_reduce as chunked_grad_factors
from . import weight as weight_kernel
from .launch import Row, cdiv, is_heavy, kind
from .tables import row

# Stands for the device under the interpreter: small limits, so that small shapes meet them.
_INTERPRETER = Device("interpreter", "sm_80", sms=2, shared_memory=163 << 10, l2=1 << 16)


def forward(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
) -> Tensor:
    """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
    x2d = as_rows(x)
    plan = plan_of(x2d, x2d, weight, hut_A, hut_B, spec)
    if plan.backend == "torch":
        return torch_backend.forward(x, weight, hut_A, hut_B, bias, gamma, beta, spec)
    if plan.forward == FUSED:
        tiles = _row("forward", plan, x.dtype, weight, spec)
        parts = planner.split(
            cdiv(len(x2d), tiles.BN) * cdiv(len(weight), tiles.BO),
            cdiv(x2d.shape[1], tiles.BK),
            plan.device.sms,
        )
        y = fused_forward.forward(x2d, weight, hut_A, hut_B, bias, gamma, beta, spec, tiles, parts)
        return y.view(*x.shape[:-1], len(weight))
    shift = merged_bias(bias, gamma, beta, x.dtype)
    staged = _stage(plan, weight, hut_A, hut_B, gamma, spec, x.dtype)
    if spec.precision == "split":
        return torch_backend.split_forward(x, weight, gamma, staged, shift)
    return F.linear(x, staged, shift)


def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    need_x: bool,
    needs: Needs,
) -> list[Tensor]:
    """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
    grads = [grad_input(grad, weight, hut_A, hut_B, gamma, spec)] if need_x else []
    if x is not None and any(needs):
        factors = grad_factors(grad, x, weight, hut_A, hut_B, gamma, spec, needs)
        grads += [gradient for gradient in factors if gradient is not None]
    return grads


def grad_input(
    grad: Tensor, weight: Tensor, hut_A: Tensor, hut_B: Tensor, gamma: Tensor | None, spec: Spec
) -> Tensor:
    """`dx = (gamma * grad) W`, `[..., in]`, in grad's type."""
    grad2d = as_rows(grad)
    plan = plan_of(grad2d, grad2d, weight, hut_A, hut_B, spec)
    if plan.backend == "torch":
        return torch_backend.grad_input(grad, weight, hut_A, hut_B, gamma, spec)
    if plan.grad_input == FUSED:
        tiles = _row("grad_input", plan, grad.dtype, weight, spec)
        parts = planner.split(
            cdiv(len(grad2d), tiles.BN) * cdiv(weight.shape[1], tiles.BK),
            cdiv(len(weight), tiles.BO),
            plan.device.sms,
        )
        dx = fused_grad_input.grad_input(grad2d, weight, hut_A, hut_B, gamma, spec, tiles, parts)
        return dx.view(*grad.shape[:-1], weight.shape[1])
    staged = _stage(plan, weight, hut_A, hut_B, gamma, spec, grad.dtype)
    if spec.precision == "split":
        return torch_backend.split_grad_input(grad, weight, gamma, staged)
    return grad @ staged


def weight(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
    plan = plan_of(weight[:1], weight[:1], weight, hut_A, hut_B, spec)
    if plan.backend == "torch":
        return torch_backend.weight(weight, hut_A, hut_B, gamma, spec, dtype)
    tiles = _row("weight", plan, torch.float32, weight, spec)
    return weight_kernel.weight(weight, hut_A, hut_B, gamma, spec, dtype, tiles, exact=True)


def grad_factors(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    needs: Needs,
) -> FactorGrads:
    """`d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, each where it is needed."""
    grad2d, x2d = as_rows(grad), as_rows(x)
    plan = plan_of(x2d, grad2d, weight, hut_A, hut_B, spec)
    if plan.backend == "torch":
        return torch_backend.grad_factors(grad, x, weight, hut_A, hut_B, gamma, spec, needs)
    arguments = grad2d, x2d, weight, hut_A, hut_B, gamma, spec, needs
    if plan.grad_factors == FUSED:
        tiles = _row("grad_factors", plan, x.dtype, weight, spec)
        spans = _spans(len(weight), tiles, plan, weight)
        return fused_grad_factors.grad_factors(*arguments, tiles, spans)
    tiles = _row("grad_reduce", plan, x.dtype, weight, spec)
    chunk = min(plan.chunk, len(weight))
    spans = _spans(chunk, tiles, plan, weight)
    return chunked_grad_factors.grad_reduce(*arguments, tiles, chunk, spans)


def _stage(
    plan: Plan,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    gamma: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """`gamma W`, or under `split` `gamma (W0 * (T - 1))`, in the shared workspace.

    The workspace is a block of torch's caching allocator, free again when the product has been
    enqueued: every layer's W lands in the same memory, also inside a CUDA graph.
    """
    minus = 1.0 if spec.precision == "split" else 0.0
    tiles = _row("weight", plan, dtype, weight, spec)
    return weight_kernel.weight(weight, hut_A, hut_B, gamma, spec, dtype, tiles, minus)


def _row(kernel: str, plan: Plan, dtype: torch.dtype, weight: Tensor, spec: Spec) -> Row:
    where = kernel, plan.device.arch, plan.problem.N, plan.problem.r, kind(dtype)
    tiles = row(*where)
    return row(*where, True) if is_heavy(weight, where[3], spec, dtype, tiles) else tiles


def _spans(rows: int, tiles: Row, plan: Plan, weight: Tensor) -> tuple[int, int]:
    """Programs that share `rows` of O, and K."""
    problem = plan.problem
    return planner.spans(
        cdiv(rows, tiles.BO),
        cdiv(problem.K, tiles.BK),
        problem.O,
        problem.K,
        problem.r,
        weight.numel() * weight.element_size(),
        plan.device.sms,
    )


def plan_of(
    x: Tensor, moving: Tensor, weight: Tensor, hut_A: Tensor, hut_B: Tensor, spec: Spec
) -> Plan:
    """The plan of a call; `moving` is the other activation (x itself where there is one)."""
    (O, K), r = weight.shape, len(hut_A)
    problem = Problem(
        len(x),
        K,
        O,
        r,
        dtype_name(x.dtype),
        dtype_name(weight.dtype),
        all(_aligned(tensor) for tensor in (x, moving, weight, hut_A, hut_B)),
        spec.transform,
        spec.precision,
    )
    return planner.plan(problem, _device(x.device), "triton")


def _aligned(tensor: Tensor) -> bool:
    """Row-major with rows of a multiple of 16 elements from a 16-byte address: asynchronous copies.

    A factor with fewer than 16 columns (hut_B at r < 16) is a thin load outside the rule.
    """
    rows, columns = tensor.stride()
    wide = columns == 1 and (rows % 16 == 0 or tensor.shape[1] < 16)
    transposed = rows == 1 and columns % 16 == 0
    return tensor.data_ptr() % 16 == 0 and (wide or transposed)


def _device(device: torch.device) -> Device:
    return gpu(device) if device.type == "cuda" else _INTERPRETER
