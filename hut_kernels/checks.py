"""Checks of arguments, before any kernel starts: a message says what is needed, and what came."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import HUTBackendError
from .formats import Stored
from .layer import FLOAT_NAMES, FLOATS, PRECISIONS, TRANSFORMS, Spec

_FLOAT_NAMES = ", ".join(FLOAT_NAMES)
_LARGEST = torch.finfo(torch.float32).max
_PLAIN = (Tensor, torch.nn.Parameter)
OPERANDS = ("x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse an option that is not one of `allowed` (ValueError)."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_number(name: str, value: object) -> float:
    """A real number as a float.

    A tensor is refused too: it would get no gradient, and on a GPU cost a synchronization.

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


def check_size(name: str, size: object) -> None:
    """Refuse what is no integer (TypeError) or is negative (ValueError)."""
    if not isinstance(size, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{name} must not be negative; got {size}")


def check_dtype(name: str, dtype: object) -> None:
    """Refuse a type that no path of this package computes in (TypeError)."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {_FLOAT_NAMES}; got {dtype}")


def checked_spec(transform: str, offset: float, scaling: float, precision: str) -> Spec:
    """The options as a `Spec`, checked once for each of their values.

    Raises:
        TypeError: An offset or scaling that is no real number.
        ValueError: An unknown option, one without effect, or a number beyond float32.
    """
    kinds = type(transform), type(offset), type(scaling), type(precision)
    if kinds == (str, float, float, str) and not torch.compiler.is_compiling():
        return _kept_spec(transform, offset, scaling, precision)
    return _new_spec(transform, offset, scaling, precision)


def _new_spec(transform: str, offset: float, scaling: float, precision: str) -> Spec:
    numbers = check_number("offset", offset), check_number("scaling", scaling)
    spec = Spec(transform, *numbers, precision)
    check_options(spec)
    return spec


_kept_spec = functools.lru_cache(maxsize=1024)(_new_spec)


def check_options(spec: Spec) -> None:
    """Refuse an unknown option, or one without effect in `two_sided` (ValueError)."""
    check_choice("transform", spec.transform, TRANSFORMS)
    check_choice("precision", spec.precision, PRECISIONS)
    if spec.transform == "two_sided" and (spec.offset != 1.0 or spec.scaling != 1.0):
        raise ValueError(
            "two_sided has no offset and no scaling: both must be 1; "
            f"got offset={spec.offset}, scaling={spec.scaling}"
        )


def check_form(transform: str, offset: float, alpha: float | None) -> None:
    """Refuse a transform, offset or alpha that do not go together (ValueError)."""
    check_choice("transform", transform, TRANSFORMS)
    if transform == "two_sided" and offset != 1:
        raise ValueError(f"offset has no part in two_sided and must be left at 1; got {offset}")
    if offset not in (0, 1):
        raise ValueError(f"offset must be 1 (residual form) or 0 (direct form); got {offset}")
    if alpha is None:
        return
    if transform == "two_sided" or offset != 1:
        given = f"transform={transform!r}, offset={offset}"
        raise ValueError(f"alpha belongs to low_rank with offset 1; got alpha={alpha} with {given}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive number; got {alpha}")


def check_scale_by_rms(scale_by_rms: bool, transform: str, offset: float) -> None:
    """Refuse to scale a form that has no scaling (ValueError), or no answer (TypeError)."""
    if not isinstance(scale_by_rms, bool):
        raise TypeError(f"scale_by_rms must be True or False; got {scale_by_rms!r}")
    if scale_by_rms and (transform != "low_rank" or offset != 1):
        given = f"transform={transform!r}, offset={offset}"
        raise ValueError(f"scale_by_rms belongs to low_rank with offset 1; got {given}")


def check_rank(r: int, transform: str, in_features: int, out_features: int) -> None:
    """Refuse a rank that is no rank, or more groups than features (ValueError)."""
    if r < 1:
        raise ValueError(f"r must be at least 1; got {r}")
    least = min(in_features, out_features)
    if transform == "two_sided" and r > least:
        raise ValueError(
            f"two_sided needs r <= min(in_features, out_features) = {least}; got r = {r}"
        )


def check_run_options(precision: str, dropout: float) -> None:
    """Refuse an unknown precision, or dropout outside [0, 1) (ValueError)."""
    check_choice("precision", precision, PRECISIONS)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout}")


def check_frozen(weight: Tensor) -> None:
    """Refuse a base weight that is trained (ValueError)."""
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


def check_weight(weight: Tensor | Stored) -> None:
    """Refuse a base weight that no path of this package can read.

    Raises:
        HUTBackendError: The weight is quantized or sharded.
    """
    if isinstance(weight, Stored):
        return
    kind = type(weight)
    if kind in _PLAIN:
        if weight.is_quantized:
            raise HUTBackendError(
                f"weight is quantized ({weight.dtype}); a HUT layer needs {_FLOAT_NAMES}"
            )
        return
    if hasattr(weight, "_local_tensor"):
        raise HUTBackendError(
            f"weight is sharded ({kind.__name__}); gather it first, e.g. weight.full_tensor()"
        )


def check_tensors(
    x: Tensor | Stored,
    weight: Tensor | Stored,
    hut_A: Tensor,
    hut_B: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    transform: str,
    names: tuple[str, ...] = OPERANDS,
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
        ) and not (isinstance(tensor, Stored) and tensor.device == device):
            _refuse(names[index], tensor, device)
    _check_shapes(x, weight, hut_A, hut_B, bias, gamma, beta)
    if transform == "two_sided":
        out_features, in_features = weight.shape
        check_rank(hut_A.shape[0], transform, in_features, out_features)


def _refuse(name: str, tensor: object, device: torch.device | None) -> None:
    if isinstance(tensor, Stored):
        raise _elsewhere(name, tensor.device, device)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        lost = "; a quantized one loses its class, and what belongs to its codes, by pickle or FSDP"
        hint = lost if name == "weight" and tensor.dtype in (torch.uint8, torch.int8) else ""
        raise TypeError(f"{name} must be one of {_FLOAT_NAMES}; got {tensor.dtype}{hint}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor; got {kind}")
    if hasattr(tensor, "_local_tensor"):
        raise HUTBackendError(
            f"{name} is sharded ({type(tensor).__name__}) and weight is not: pass what this rank "
            f"computes with (to_local(), full_tensor()), or parallelize the layer by a style of "
            f"hut_kernels.distributed"
        )
    if name == "weight" and tensor.is_meta:
        raise HUTBackendError("weight is on the meta device: it has no data to multiply with")
    raise _elsewhere(name, tensor.device, device)


def _elsewhere(name: str, found: torch.device, device: torch.device | None) -> ValueError:
    return ValueError(
        f"all tensors must be on one device, x's (or weight's): {device}; got {name} on {found}"
    )


def _check_shapes(
    x: Tensor | Stored,
    weight: Tensor | Stored,
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
