"""FLOP formulas of `torch.ops.hut.*` for `torch.utils.flop_counter.FlopCounterMode`.

As that counts elsewhere: matrix products alone, those made again in backward included. A HUT step
has three full products, `2 N O K` operations each. `low_rank` has thin ones besides, `2 O K r` for
every T that is formed and for each factor's gradient.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def forward_flops(
    x: Shape, weight: Shape, hut_A: Shape, hut_B: Shape, bias: Any, gamma: Any, beta: Any,
    transform: str, offset: float, scaling: float, precision: str, backend: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Operations of `hut::forward`, from its arguments with shapes for tensors."""
    sizes = hut_B[0], hut_A[1]  # a stored weight has another shape
    return _product(x, sizes, precision) + _thin(sizes, hut_A, transform)


def backward_flops(
    grad: Shape, x: Shape, weight: Shape, hut_A: Shape, hut_B: Shape, gamma: Any,
    transform: str, offset: float, scaling: float, precision: str,
    need_x: bool, need_A: bool, need_B: bool, need_gamma: bool, backend: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Operations of `hut::backward`: dx, and G with its reductions, where they are needed."""
    sizes = hut_B[0], hut_A[1]
    thin = _thin(sizes, hut_A, transform)
    operations = _product(grad, sizes, precision) + thin if need_x else 0
    if need_A or need_B or need_gamma:
        operations += _product(grad, sizes) + thin * (need_A + (need_B or need_gamma))
    return operations


def weight_flops(
    weight: Shape, hut_A: Shape, hut_B: Shape, gamma: Any,
    transform: str, offset: float, scaling: float, dtype: Any, backend: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Operations of `hut::weight`."""
    return _thin((hut_B[0], hut_A[1]), hut_A, transform)


def grouped_forward_flops(
    x: Shape, weight: Shape, hut_A: Shape | None, hut_B: Any, offsets: Any, bias: Any, gamma: Any,
    beta: Any, transform: str, offset: float, scaling: float, backend: str, **_: Any,
) -> int:  # fmt: skip
    """Operations of `hut::grouped_forward`, of rows and experts that all take part."""
    return _product(x, weight[1:]) + weight[0] * _thin(weight[1:], hut_A, transform)


def grouped_backward_flops(
    grad: Shape, x: Shape, weight: Shape, hut_A: Shape | None, hut_B: Any, offsets: Any, gamma: Any,
    transform: str, offset: float, scaling: float,
    need_x: bool, need_A: bool, need_B: bool, need_gamma: bool, need_sums: bool, backend: str,
    **_: Any,
) -> int:  # fmt: skip
    """Operations of `hut::grouped_backward`, of rows and experts that all take part."""
    thin = weight[0] * _thin(weight[1:], hut_A, transform)
    operations = _product(grad, weight[1:]) + thin if need_x else 0
    if need_A or need_B or need_gamma:
        operations += _product(grad, weight[1:]) + thin * (need_A + (need_B or need_gamma))
    return operations


def _product(activations: Shape, weight: Shape, precision: str = "merged") -> int:
    products = 2 if precision == "split" else 1
    return products * 2 * math.prod(activations[:-1]) * math.prod(weight)


def _thin(weight: Shape, hut_A: Shape | None, transform: str) -> int:
    """T's low-rank product; the two_sided T, and what is reduced with it, has none."""
    if hut_A is None or transform == "two_sided":
        return 0
    return 2 * math.prod(weight) * hut_A[-2]


@functools.cache
def register() -> None:
    """Makes the formulas known to every `FlopCounterMode`, now or once its module is imported.

    That module imports triton, which is not for `import hut_kernels` to do.
    """
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hut.forward)(forward_flops)
    register_flop_formula(torch.ops.hut.backward)(backward_flops)
    register_flop_formula(torch.ops.hut.weight)(weight_flops)
    register_flop_formula(torch.ops.hut.grouped_forward)(grouped_forward_flops)
    register_flop_formula(torch.ops.hut.grouped_backward)(grouped_backward_flops)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself, but lets the counter's module run `_register` when it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
