"""`hut_linear` and `hut_weight`: arguments checked, a backend chosen, the function called."""

from __future__ import annotations

import contextlib
import math
import numbers

import torch
from torch import Tensor

from . import definition, dispatch, ops
from .autograd import HUTLinearFunction
from .errors import HUTBackendError, check_choice
from .layer import FLOAT_NAMES, FLOATS, PRECISIONS, TRANSFORMS, Layer, Spec

_FLOAT_NAMES = ", ".join(FLOAT_NAMES)
_LARGEST = torch.finfo(torch.float32).max


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
    _check_options(spec)
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
    _check_options(spec)
    names = ("weight", *_NAMES[1:])
    check_tensors(weight, weight, hut_A, hut_B, None, gamma, None, transform, names)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {_FLOAT_NAMES}; got {dtype}")
    chosen = dispatch.choose("auto", (weight, hut_A, hut_B))
    return ops.call(ops.weight, weight, hut_A, hut_B, gamma, *spec[:3], dtype, chosen)


def autocast_input(x: Tensor) -> tuple[Tensor, bool]:
    """x, cast where autocast is on, and whether it is on."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x, autocast


def check_frozen(weight: Tensor) -> None:
    """Refuses a base weight that is trained (ValueError)."""
    if weight.requires_grad and weight.grad_fn is not None:
        raise ValueError(
            "weight is computed from what requires grad, as FSDP1 (FullyShardedDataParallel with "
            "use_orig_params=True) hands out frozen weights too, but a HUT layer's base weight is "
            "frozen: shard with FSDP2 (fully_shard; fsdp_version: 2 in accelerate), or pass "
            "weight.detach()"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but a HUT layer's base weight is frozen: "
            "call weight.requires_grad_(False) or pass weight.detach()"
        )


def check_weight(weight: Tensor) -> None:
    """Refuses a base weight that no path of this package can read.

    Raises:
        HUTBackendError: The weight is quantised or sharded.
    """
    kind = type(weight)
    if kind in _PLAIN:
        if weight.is_quantized:
            raise HUTBackendError(
                f"weight is quantised ({weight.dtype}); a HUT layer needs {_FLOAT_NAMES}"
            )
        return
    if hasattr(weight, "_local_tensor"):
        raise HUTBackendError(
            f"weight is sharded ({kind.__name__}); gather it first, e.g. weight.full_tensor()"
        )
    if kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao."):
        raise HUTBackendError(f"weight is quantised ({kind.__name__}); dequantise it first")


def check_number(name: str, value: object) -> float:
    """A real number as a float.

    A tensor is refused too: it would get no gradient, and on a GPU cost a synchronisation.

    Raises:
        TypeError: No real number.
        ValueError: Beyond float32, unless infinite.
    """
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number; got {type(value).__name__}")
    if _LARGEST < abs(value) < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} is beyond the range of float32, in which T is formed")
    return float(value)


def _check_options(spec: Spec) -> None:
    check_choice("transform", spec.transform, TRANSFORMS)
    check_choice("precision", spec.precision, PRECISIONS)
    if spec.transform == "two_sided" and (spec.offset != 1.0 or spec.scaling != 1.0):
        raise ValueError(
            "two_sided has no offset and no scaling: both must be 1; "
            f"got offset={spec.offset}, scaling={spec.scaling}"
        )


_PLAIN = (Tensor, torch.nn.Parameter)
_NAMES = ("x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta")


def check_tensors(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    transform: str,
    names: tuple[str, ...] = _NAMES,
) -> None:
    """Kinds, types, devices and shapes, in this order; nothing is computed."""
    check_weight(weight)
    device = getattr(x, "device", None)
    for index, tensor in enumerate((x, weight, hut_A, hut_B, bias, gamma, beta)):
        if tensor is None and index > 3:
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype not in FLOATS
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.device != device
            or (type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor"))
        ):
            _refuse(names[index], tensor, device)
    _check_shapes(x, weight, hut_A, hut_B, bias, gamma, beta)
    if transform == "two_sided" and hut_A.shape[0] > min(weight.shape):
        raise ValueError(
            f"two_sided needs r <= min(in_features, out_features) = {min(weight.shape)}; "
            f"got r = {hut_A.shape[0]}"
        )


def _refuse(name: str, tensor: object, device: torch.device | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {_FLOAT_NAMES}; got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor; got {kind}")
    if hasattr(tensor, "_local_tensor"):
        raise HUTBackendError(
            f"{name} is sharded ({type(tensor).__name__}) and weight is not: pass what this rank "
            f"computes with (to_local(), full_tensor()), or parallelise the layer by a style of "
            f"hut_kernels.distributed"
        )
    if name == "weight" and tensor.is_meta:
        raise HUTBackendError("weight is on the meta device: it has no data to multiply with")
    raise ValueError(
        f"all tensors must be on one device, x's (or weight's): {device}; "
        f"got {name} on {tensor.device}"
    )


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> None:
    # Each shape is read once: reading one costs a small layer as much host time as a comparison.
    shape, shape_A, shape_B = weight.shape, hut_A.shape, hut_B.shape
    for name, found in (("weight", shape), ("hut_A", shape_A), ("hut_B", shape_B)):
        if len(found) != 2:
            raise ValueError(f"{name} must have 2 dimensions; got shape {tuple(found)}")
    out_features, in_features = shape
    r = shape_A[0]
    if r < 1:
        raise ValueError(f"r must be at least 1; got hut_A of shape {tuple(shape_A)}")
    if x.ndim < 1 or x.shape[-1] != in_features:
        given = x.shape[-1] if x.ndim else "a scalar"
        raise ValueError(
            f"x's last dimension must be weight's in_features = {in_features}; got {given}"
        )
    if shape_A[1] != in_features:
        raise ValueError(
            f"hut_A's second dimension must be weight's in_features = {in_features}; "
            f"got {shape_A[1]}"
        )
    if shape_B[0] != out_features:
        raise ValueError(
            f"hut_B's first dimension must be weight's out_features = {out_features}; "
            f"got {shape_B[0]}"
        )
    if shape_B[1] != r:
        raise ValueError(f"hut_B's second dimension must be hut_A's r = {r}; got {shape_B[1]}")
    for name, vector in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if vector is not None and vector.shape != (out_features,):
            raise ValueError(
                f"{name} must have shape ({out_features},), weight's out_features; "
                f"got {tuple(vector.shape)}"
            )
