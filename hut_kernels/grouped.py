"""`hut_grouped_linear`: HUT on a stack of experts, each with rows of its own."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import torch
from torch import Tensor

from . import definition, dispatch, formats, grouped_backend, ops
from .autograd import HUTGroupedFunction
from .checks import check_frozen, check_number, check_options, check_tensors, check_weight
from .errors import HUTBackendError
from .functional import autocast_input
from .layer import Layer, Spec
from .rules import is_exporting


def hut_grouped_linear(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transform: str = "low_rank",
    offset: float = 1.0,
    scaling: float = 1.0,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    transposed: bool = False,
    fused: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Computes `hut_linear` of each expert on its own rows of x.

    The rows of x are sorted by expert: those of expert e end at `offsets[e]`, as
    `torch._grouped_mm` takes them. An expert without rows gets zero gradients. Rows past the last
    offset are not read; their outputs and gradients are zero. See docs/definition.md, "Experts".

    Args:
        x: Activations, `[S, in_features]`, sorted by expert; their type is the compute type.
        weight: The frozen stack, `[experts, out_features, in_features]`, or
            `[experts, in_features, out_features]` with `transposed`.
        hut_A: Factors on the input side, `[experts, r, in_features]`.
        hut_B: Factors on the output side, `[experts, out_features, r]`.
        offsets: The end of each expert's rows, `[experts]`, int32.
        bias: `[experts, out_features]` or None.
        transform: As in `hut_linear`.
        offset: As in `hut_linear`.
        scaling: As in `hut_linear`.
        gamma: Output scale, `[experts, out_features]`, or None.
        beta: Output shift, `[experts, out_features]`, or None.
        transposed: Whether the stack is stored as `[experts, in_features, out_features]`.
        fused: As in `hut_linear`.
        backend: As in `hut_linear`.

    Returns:
        `[S, out_features]` in the compute type.

    Raises:
        ValueError, TypeError, HUTBackendError: As `hut_linear`; ValueError also for offsets that
            decrease or reach beyond x.

    Examples:
        >>> import torch
        >>> from hut_kernels import hut_grouped_linear
        >>> x, stack = torch.randn(5, 8), torch.randn(3, 6, 8)
        >>> hut_A, hut_B = torch.randn(3, 2, 8), torch.zeros(3, 6, 2)
        >>> offsets = torch.tensor([2, 2, 5], dtype=torch.int32)  # two rows, none, three
        >>> y = hut_grouped_linear(x, stack, hut_A, hut_B, offsets)
        >>> torch.allclose(y[:2], x[:2] @ stack[0].T, atol=1e-6)
        True
    """
    spec = Spec(transform, check_number("offset", offset), check_number("scaling", scaling))
    check_options(spec)
    check_stack(weight)
    _check_stacks(x, weight, hut_A, hut_B, offsets, bias, gamma, beta)
    if transposed:
        weight = weight.mT
    first = _expert(0, weight, hut_A, hut_B, bias, gamma, beta, spec)
    check_tensors(x, *first[:6], transform)
    check_frozen(weight)
    if not fused and backend not in ("auto", "torch"):
        raise ValueError(f'fused=False needs backend "auto" or "torch"; got {backend!r}')
    x, autocast = autocast_input(x)
    if fused:
        chosen = dispatch.choose(backend, (x, weight, hut_A, hut_B))
        operands = x, weight, hut_A, hut_B, offsets, bias, gamma, beta
        if is_exporting():
            return ops.grouped_forward(*operands, *spec[:3], chosen)
        return HUTGroupedFunction.apply(*operands, spec, chosen)
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        return _eager(x, weight, hut_A, hut_B, offsets, bias, gamma, beta, spec)


def check_stack(weight: Tensor) -> None:
    """Refuses a stack that is sharded or quantized (HUTBackendError)."""
    check_weight(weight)
    if isinstance(weight, Tensor) and formats.is_quantized(weight):
        raise HUTBackendError(
            f"the stack of experts is quantized ({type(weight).__name__}), which HUT reads of "
            f"single layers only: dequantize it first"
        )


def grouped_product(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x W0^T + bias` of each expert on its own rows, `[S, out]`; the stack is frozen.

    Raises:
        ValueError: the stack requires grad.
    """
    check_frozen(weight)
    chosen = dispatch.choose("auto", (x, weight))
    none = None, None
    return HUTGroupedFunction.apply(x, weight, *none, offsets, bias, *none, Spec(), chosen)


def _eager(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
) -> Tensor:
    """The definition of each expert, one after the other."""
    bounds = grouped_backend.bounds(offsets, len(x))
    parts = [
        definition.linear(
            x[start:end], _expert(expert, weight, hut_A, hut_B, bias, gamma, beta, spec)
        )
        for expert, (start, end) in enumerate(pairwise(bounds))
    ]
    tail = x.new_zeros((len(x) - bounds[-1], weight.shape[1]))
    return torch.cat([*parts, tail])


def _expert(
    index: int,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    spec: Spec,
) -> Layer:
    """One expert's operands."""
    b, g, s = (None if stack is None else stack[index] for stack in (bias, gamma, beta))
    return Layer(weight[index], hut_A[index], hut_B[index], b, g, s, spec)


def _check_stacks(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> None:
    """Refuses what is no stack of as many experts; one expert's tensors are checked elsewhere."""
    for name, stack, dimensions in (
        ("x", x, 2),
        ("weight", weight, 3),
        ("hut_A", hut_A, 3),
        ("hut_B", hut_B, 3),
        ("bias", bias, 2),
        ("gamma", gamma, 2),
        ("beta", beta, 2),
    ):
        if stack is None and name in ("bias", "gamma", "beta"):
            continue
        if not isinstance(stack, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(stack).__name__}")
        if stack.ndim != dimensions:
            raise ValueError(
                f"{name} must have {dimensions} dimensions; got shape {tuple(stack.shape)}"
            )
        if name != "x" and len(stack) != len(weight):
            raise ValueError(f"{name} must hold weight's {len(weight)} experts; got {len(stack)}")
    if len(weight) < 1:
        raise ValueError(f"weight must hold at least 1 expert; got shape {tuple(weight.shape)}")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        found = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets must be an int32 tensor; got {found}")
    if offsets.shape != (len(weight),):
        raise ValueError(
            f"offsets must have shape ({len(weight)},), weight's experts; "
            f"got {tuple(offsets.shape)}"
        )
    if offsets.device != x.device:
        raise ValueError(
            f"all tensors must be on one device, x's: {x.device}; got offsets on {offsets.device}"
        )
