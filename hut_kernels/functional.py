"""`hut_linear` and `hut_weight`: arguments checked, a backend chosen, the function called."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import definition, dispatch, ops
from .autograd import HUTLinearFunction
from .checks import (
    OPERANDS,
    check_dtype,
    check_frozen,
    check_number,
    check_options,
    check_tensors,
)
from .layer import Layer, Spec
from .rules import call


def hut_linear(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None = None,
    *,
    transform: str = "low_rank",
    offset: float = 1.0,
    scaling: float = 1.0,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    precision: str = "merged",
    fused: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The product of x with a frozen weight under a trainable multiplier.

    Computes `y = gamma * (x (W0 * T)^T + bias) + beta` (docs/definition.md, "Forward") with
    `T = offset + scaling * hut_B @ hut_A` (`low_rank`) or
    `T[o, i] = hut_B[o, q(i)] * hut_A[p(o), i]` (`two_sided`).

    Args:
        x: Activations, `[..., in_features]`; its type is the compute type. Under autocast x, and
            nothing else, is cast.
        weight: The frozen weight W0, `[out_features, in_features]`, any strides.
        hut_A: Factor on the input side, `[r, in_features]`.
        hut_B: Factor on the output side, `[out_features, r]`.
        bias: `[out_features]` or None.
        transform: `"low_rank"` or `"two_sided"`.
        offset: 1 for the residual form (HiRA's), 0 for the direct one. `low_rank` only.
        scaling: Factor of the low-rank product. `low_rank` only.
        gamma: Output scale, `[out_features]`, or None.
        beta: Output shift, `[out_features]`, or None.
        precision: `"merged"` rounds W once to the compute type; `"split"` keeps updates too small
            to survive that, for a second product.
        fused: True recomputes W in backward and saves x alone; False is the definition under
            ordinary autograd, which saves weight-sized tensors.
        backend: `"auto"`, `"torch"`, `"triton"` or `"cuda"`.

    Returns:
        `[..., out_features]` in the compute type; never a view of an argument.

    Raises:
        ValueError: Shapes that do not fit, an unknown option, tensors on different devices, a
            weight that requires grad.
        TypeError: What is no dense floating-point tensor, an offset or scaling that is no real
            number, or float64 on Triton or CUDA.
        HUTBackendError: The backend cannot run here, the weight is quantised or on the meta device,
            or a tensor is sharded (a DTensor).
    """
    spec = Spec(
        transform, check_number("offset", offset), check_number("scaling", scaling), precision
    )
    check_options(spec)
    check_tensors(x, weight, hut_A, hut_B, bias, gamma, beta, transform)
    check_frozen(weight)
    if not fused and backend not in ("auto", "torch"):
        raise ValueError(f'fused=False needs backend "auto" or "torch"; got {backend!r}')
    x, autocast = autocast_input(x)
    if fused:
        chosen = dispatch.choose(backend, (x, weight, hut_A, hut_B))
        if torch.compiler.is_exporting():  # which keeps a function's forward alone, under no_grad
            return ops.forward(x, weight, hut_A, hut_B, bias, gamma, beta, *spec, chosen)
        return HUTLinearFunction.apply(x, weight, hut_A, hut_B, bias, gamma, beta, spec, chosen)
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        return definition.linear(x, Layer(weight, hut_A, hut_B, bias, gamma, beta, spec))


def hut_weight(
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    *,
    transform: str = "low_rank",
    offset: float = 1.0,
    scaling: float = 1.0,
    gamma: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The merged weight `gamma[:, None] * (W0 * T)` (docs/definition.md, "Forward").

    Args:
        weight: W0, `[out_features, in_features]`.
        hut_A: `[r, in_features]`.
        hut_B: `[out_features, r]`.
        transform: As in `hut_linear`.
        offset: As in `hut_linear`.
        scaling: As in `hut_linear`.
        gamma: `[out_features]` or None.
        dtype: The result's type; None means weight's.

    Returns:
        `[out_features, in_features]`, detached, formed in float32 (float64 for float64) and rounded
        once.

    Raises:
        ValueError, TypeError, HUTBackendError: As `hut_linear`.
    """
    spec = Spec(transform, check_number("offset", offset), check_number("scaling", scaling))
    check_options(spec)
    names = ("weight", *OPERANDS[1:])
    check_tensors(weight, weight, hut_A, hut_B, None, gamma, None, transform, names)
    dtype = weight.dtype if dtype is None else dtype
    check_dtype("dtype", dtype)
    chosen = dispatch.choose("auto", (weight, hut_A, hut_B))
    return call(ops.weight, weight, hut_A, hut_B, gamma, *spec[:3], dtype, chosen)


def autocast_input(x: Tensor) -> tuple[Tensor, bool]:
    """x, cast where autocast is on, and whether it is on."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x, autocast
