"""The operators where a plan decides: one plan for a call, made here and handed down.

A plan depends on the number of tokens, so it is made within the operators; made where a backend is
named, it would be a guard under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from . import planner, torch_backend
from .devices import Device, Misfit, as_seen, gpu, note_misfit
from .formats import FourBit, Stored
from .layer import Layer, Needs, as_rows, dtype_name
from .planner import Plan, Problem
from .triton import backend as triton_backend

_Result = TypeVar("_Result")
# Stands for the device under the interpreter: small limits, so that small shapes meet them.
_INTERPRETER = Device("interpreter", "sm_80", sms=2, shared_memory=163 << 10, l2=1 << 16)


class Planned:
    """The operators of `"triton"`, or of `"auto"`: Triton and the extension, each at its parts.

    PyTorch runs what Triton has no kernel for. A small layer goes to the extension unplanned: the
    plan would take longer than it saves.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def linear_forward(self, x: Tensor, layer: Layer) -> Tensor:
        """`y = gamma * (x W^T + bias) + beta`, `[..., out]`, in x's type."""
        if self._is_launch_bound(layer):
            return _module("cuda").linear_forward(x, layer)

        def run(plan: Plan) -> Tensor:
            runs = plan.backend_of("forward")
            if runs == "triton":
                return triton_backend.linear_forward(plan, x, layer)
            return _module(runs).linear_forward(x, layer)

        return self._by_plan(run, layer, x)

    def linear_backward(
        self, grad: Tensor, x: Tensor | None, layer: Layer, need_x: bool, needs: Needs
    ) -> list[Tensor]:
        """Those asked for of `dx`, `d hut_A`, `d hut_B`, `sum_i W[o, i] G[o, i]`, in this order."""
        if self._is_launch_bound(layer):
            return _module("cuda").linear_backward(grad, x, layer, need_x, needs)

        def run(plan: Plan) -> list[Tensor]:
            for_x, for_factors = plan.backend_of("grad_input"), plan.backend_of("grad_factors")
            if for_x == for_factors or not (need_x and any(needs)):
                runs = for_x if need_x else for_factors
                return _backward(plan, runs, grad, x, layer, need_x, needs)
            dx = _backward(plan, for_x, grad, None, layer, True, Needs(False, False, False))
            return dx + _backward(plan, for_factors, grad, x, layer, False, needs)

        return self._by_plan(run, layer, grad, x)

    def merged_weight(self, layer: Layer, dtype: torch.dtype) -> Tensor:
        """`gamma W`, `[out, in]`, rounded once to `dtype`, with weight's strides."""
        if self.name == "auto" and not isinstance(layer.weight, Stored):
            return _module("cuda").merged_weight(layer, dtype)

        def run(plan: Plan) -> Tensor:
            if plan.backend == "triton":
                return triton_backend.merged_weight(plan, layer, dtype)
            return torch_backend.merged_weight(layer, dtype)

        return self._by_plan(run, layer)

    def dequantize(self, weight: Stored, dtype: torch.dtype) -> Tensor:
        """A stored W0, `[out, in]`, in `dtype`."""
        if weight.form.name.endswith("_repacked"):
            return weight.dense(dtype)
        return triton_backend.dequantize(weight, dtype, _device(weight.device).arch)

    def over_experts(
        self,
        run: Callable[[triton_backend.Experts | None], _Result],
        layer: Layer,
        *activations: Tensor | None,
    ) -> _Result:
        """Runs a call with the kernels over a stack; without, where PyTorch takes its experts."""

        def planned(plan: Plan) -> _Result:
            return run(triton_backend.Experts(plan, layer) if plan.backend == "triton" else None)

        return self._by_plan(planned, layer, *activations)

    def _by_plan(
        self, run: Callable[[Plan], _Result], layer: Layer, *activations: Tensor | None
    ) -> _Result:
        """Runs a call by its plan; where a kernel is too large for the device, by the next one.

        A fused kernel's next is staged, and a staged one's PyTorch, which launches none of ours.
        """
        while True:
            plan = plan_call(self.name, layer, *activations)
            try:
                return run(plan)
            except triton_backend.DoesNotFit as error:
                note_misfit(plan.device, Misfit(error.kernel, plan.problem.row, error.lack))

    def _is_launch_bound(self, layer: Layer) -> bool:
        bound = self.name == "auto" and planner.launch_bound(*layer.sizes[:2])
        return bound and not isinstance(layer.weight, Stored)


PLANNED = {name: Planned(name) for name in ("triton", "auto")}


def _backward(
    plan: Plan,
    runs: str,
    grad: Tensor,
    x: Tensor | None,
    layer: Layer,
    need_x: bool,
    needs: Needs,
) -> list[Tensor]:
    if runs == "triton":
        return triton_backend.linear_backward(plan, grad, x, layer, need_x, needs)
    return _module(runs).linear_backward(grad, x, layer, need_x, needs)


def _module(name: str) -> ModuleType:
    """A backend without plans; the extension's exists only where it was built."""
    if name == "torch":
        return torch_backend
    from . import cuda

    return cuda


def plan_call(name: str, layer: Layer, *activations: Tensor | None) -> Plan:
    """The plan of a direction, by all its operands; merging is planned as one token."""
    rows = [as_rows(tensor) for tensor in activations if tensor is not None]
    example = rows[0] if rows else layer.weight
    stored = isinstance(layer.weight, Stored)
    operands = [*rows, layer.hut_A, layer.hut_B, layer.weight]
    O, K, r = layer.sizes
    problem = Problem(
        len(rows[0]) if rows else 1,
        K,
        O,
        r,
        dtype_name(example.dtype),
        layer.weight.form.name if stored else dtype_name(layer.weight.dtype),
        all(_is_aligned(tensor) for tensor in operands),
        layer.spec.transform,
        layer.spec.precision,
        experts=0 if layer.hut_A.ndim == 2 else len(layer.hut_A),
    )
    return planner.plan(problem, as_seen(_device(example.device)), name)


def _is_aligned(tensor: Tensor | Stored) -> bool:
    """Row-major with rows of a multiple of 16 elements from a 16-byte address: asynchronous copies.

    A factor with fewer than 16 columns (hut_B at r < 16) is a thin load outside the rule. Of codes,
    16 bytes must share one absmax, which is a number.
    """
    if isinstance(tensor, Stored):
        whole = isinstance(tensor, FourBit) and tensor.in_rows and not tensor.nested
        return whole and tensor.data.data_ptr() % 16 == 0
    rows, columns = tensor.stride()[-2:]
    wide = columns == 1 and (rows % 16 == 0 or tensor.shape[-1] < 16)
    transposed = rows == 1 and columns % 16 == 0
    return tensor.data_ptr() % 16 == 0 and (wide or transposed)


def _device(device: torch.device) -> Device:
    return gpu(device) if device.type == "cuda" else _INTERPRETER
