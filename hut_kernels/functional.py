"""`hut_linear` and `hut_weight`: arguments checked, a backend chosen, the function called."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import autograd, definition, dispatch, formats, ops
from .autograd import HUTLinearFunction, StoredLinearFunction
from .checks import (
    OPERANDS,
    check_dtype,
    check_frozen,
    check_tensors,
    checked_spec,
)
from .formats import Stored
from .layer import Layer
from .rules import call, is_exporting


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
    """Multiplies x by a frozen weight that a trainable T scales element by element.

    Computes `y = gamma * (x (W0 * T)^T + bias) + beta` (docs/definition.md, "Forward") with
    `T = offset + scaling * hut_B @ hut_A` (`low_rank`, HiRA's form) or
    `T[o, i] = hut_B[o, q(i)] * hut_A[p(o), i]` (`two_sided`, that of arXiv 2409.13501).

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
        TypeError: If an input is not a dense floating-point tensor, if offset or scaling is not a
            real number, or if float64 is used with Triton or CUDA.
        HUTBackendError: If the backend cannot run here, if the weight is quantized or on the meta
            device, or if a tensor is sharded (a DTensor).

    Examples:
        >>> import torch
        >>> from hut_kernels import hut_linear
        >>> x, weight = torch.randn(5, 24), torch.randn(16, 24)
        >>> hut_A, hut_B = torch.randn(3, 24), torch.randn(16, 3)
        >>> y = hut_linear(x, weight, hut_A, hut_B)
        >>> torch.allclose(y, x @ (weight * (1 + hut_B @ hut_A)).T, atol=1e-4)
        True
    """
    spec = checked_spec(transform, offset, scaling, precision)
    W0 = formats.stored(weight)
    check_tensors(x, W0, hut_A, hut_B, bias, gamma, beta, transform)
    check_frozen(weight)
    if not fused and backend not in ("auto", "torch"):
        raise ValueError(f'fused=False needs backend "auto" or "torch"; got {backend!r}')
    x, autocast = autocast_input(x)
    if fused:
        chosen = dispatch.choose(backend, (x, W0, hut_A, hut_B))
        data, stored = (W0.data, (W0.scales, W0.form.text)) if isinstance(W0, Stored) else (W0, ())
        if is_exporting():
            data = formats.dense(data)
            return ops.forward(x, data, hut_A, hut_B, bias, gamma, beta, *spec, chosen, *stored)
        return HUTLinearFunction.apply(
            x, data, hut_A, hut_B, bias, gamma, beta, spec, chosen, stored
        )
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        W0 = formats.dense(weight, x.dtype)
        return definition.linear(x, Layer(W0, hut_A, hut_B, bias, gamma, beta, spec))


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
    """Merges the weight: `gamma[:, None] * (W0 * T)` (docs/definition.md, "Forward").

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

    Examples:
        >>> import torch
        >>> from hut_kernels import hut_weight
        >>> weight, hut_A, hut_B = torch.ones(16, 24), torch.ones(3, 24), torch.ones(16, 3)
        >>> hut_weight(weight, hut_A, hut_B, scaling=0.5).unique()  # 1 + 0.5 * 3
        tensor([2.5000])
    """
    spec = checked_spec(transform, offset, scaling, "merged")
    names = ("weight", *OPERANDS[1:])
    W0 = formats.stored(weight)
    check_tensors(W0, W0, hut_A, hut_B, None, gamma, None, transform, names)
    dtype = W0.dtype if dtype is None else dtype
    check_dtype("dtype", dtype)
    chosen = dispatch.choose("auto", (W0, hut_A, hut_B))
    operands = hut_A, hut_B, gamma, *spec[:3], dtype, chosen
    if isinstance(W0, Stored):
        return call(ops.weight, W0.data, *operands, W0.scales, W0.form.text)
    return call(ops.weight, formats.dense(W0), *operands)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W0^T + bias`, `[..., out_features]`: a base layer, differentiable in x and bias.

    Args:
        x: `[..., in_features]`, of the compute type.
        weight: W0, dense or quantized, `[out_features, in_features]`; made dense for each pass.
        bias: `[out_features]` or None.

    Raises:
        HUTBackendError: As `hut_linear`.
    """
    W0 = formats.stored(weight)
    if not isinstance(W0, Stored):
        y = autograd.frozen_linear(x, W0)
        return y if bias is None else y + bias.to(y.dtype)
    chosen = dispatch.choose("auto", (x, W0))
    return StoredLinearFunction.apply(x, W0.data, bias, chosen, (W0.scales, W0.form.text))


def autocast_input(x: Tensor) -> tuple[Tensor, bool]:
    """x, cast where autocast is on, and whether it is on."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x, autocast
