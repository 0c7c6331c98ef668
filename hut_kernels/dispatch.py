"""Which backend runs a call: what is available here, and why the rest is not."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import numbers
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import planner
from .errors import HUTBackendError, check_choice
from .layer import FLOAT_NAMES, FLOATS, PRECISIONS, TRANSFORMS
from .planner import Plan
from .versions import FALLBACKS, Miscompile, miscompiled, release

BACKENDS = ("auto", "torch", "triton", "cuda")


def backends() -> dict[str, dict[str, object]]:
    """What can run here, for bug reports.

    Returns:
        For each of `torch`, `triton` and `cuda`: `available` (bool), `reason` (why not, or on what
        it runs) and, where there is one, `version`.
    """
    missing = _triton_missing() or _no_device()
    extension = _extension_missing() or _extension_idle()
    return {
        "torch": {
            "available": True,
            "reason": "runs on every device of PyTorch",
            "version": torch.__version__,
        },
        "triton": {
            "available": missing is None,
            "reason": missing or _triton_runs_on(),
            "version": _version("triton"),
        },
        "cuda": {
            "available": extension is None,
            "reason": extension or f"CUDA device; compiled for {architectures()}",
            "version": None,
        },
    }


def choose(name: str, tensors: Sequence[Tensor]) -> str:
    """The backend that runs a call, by its name in `ops`: `torch`, `triton`, `cuda` or `auto`.

    `auto` is left where both Triton and the compiled extension run.

    Args:
        name: One of `BACKENDS`.
        tensors: The arguments, all on one device.

    Raises:
        ValueError: An unknown name.
        HUTBackendError: An explicit backend that cannot run here.
        TypeError: float64 on an explicit backend other than torch.
    """
    device = tensors[0].device
    if name == "auto":
        return "torch" if _any_float64(tensors) else _auto(device)
    if name == "torch":
        return name
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if _any_float64(tensors):
        raise TypeError(f'backend="{name}" has no float64; use backend="torch" or float32')
    missing = _extension_unusable(device) if name == "cuda" else _triton_unusable(device)
    if missing:
        raise HUTBackendError(f'backend="{name}" cannot run here: {missing}')
    if interpreting() and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise HUTBackendError(
            "Triton's interpreter computes wrongly in bfloat16: use float32 or float16 under "
            "TRITON_INTERPRET=1"
        )
    return name


def _auto(device: torch.device) -> str:
    """What "auto" means on a device, but for float64."""
    if device.type != "cuda":
        return "torch"
    with_triton = _triton_missing() is None and _device_missing(device.index) is None
    with_extension = _extension_unusable(device) is None
    if with_triton and with_extension:
        return "auto"
    return "triton" if with_triton else "cuda" if with_extension else "torch"


def explain(
    N: int,
    in_features: int,
    out_features: int,
    r: int,
    *,
    dtype: torch.dtype,
    device_name: str | None = None,
    weight_dtype: torch.dtype | None = None,
    transform: str = "low_rank",
    precision: str = "merged",
) -> Plan:
    """The strategy that would run, with its operations, bytes and workspace; needs no GPU.

    Args:
        N: Tokens.
        in_features, out_features, r: The layer.
        dtype: The compute type.
        device_name: A known GPU by (part of) its name, such as `"A100"` or `"RTX 4090"`, or
            `"cpu"`; None means this machine's own device, with the compiled extension where it is
            loaded.
        weight_dtype: W0's type; None means `dtype`.
        transform, precision: As in `hut_linear`.

    Returns:
        A `Plan`; `str(plan)` is a readable table.

    Raises:
        ValueError: A size below 0, r below 1 or not possible with `two_sided`, an unknown option,
            an unknown device.
        TypeError: A size that is no integer, a type that `hut_linear` does not take.
    """
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    sizes = {"N": N, "in_features": in_features, "out_features": out_features, "r": r}
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral):
            raise TypeError(f"{name} must be an integer; got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name} must not be negative; got {size}")
    if r < 1:
        raise ValueError(f"r must be at least 1; got {r}")
    for name, given in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if given not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOAT_NAMES)}; got {given}")
    check_choice("transform", transform, TRANSFORMS)
    check_choice("precision", precision, PRECISIONS)
    if transform == "two_sided" and r > min(in_features, out_features):
        raise ValueError(
            "two_sided needs r <= min(in_features, out_features) = "
            f"{min(in_features, out_features)}; got r = {r}"
        )
    device = _own_device() if device_name is None else _named_device(device_name)
    problem = planner.Problem(
        N,
        in_features,
        out_features,
        r,
        dtype_name(dtype),
        dtype_name(weight_dtype),
        aligned=in_features % 16 == 0 and out_features % 16 == 0,
        transform=transform,
        precision=precision,
    )
    if device == planner.CPU or torch.float64 in (dtype, weight_dtype):
        backend = "torch"
    elif device_name is None:
        backend = _auto(torch.device("cuda", torch.cuda.current_device()))
    else:
        backend = "triton" if _fallback_lost(device.miscompiles) is None else "torch"
    return planner.plan(problem, device, backend)


def _named_device(name: str) -> planner.Device:
    """A known device, under the Triton that is installed here."""
    device = planner.find_device(name)
    return dataclasses.replace(device, miscompiles=miscompiled(_version("triton"), device.arch))


def _own_device() -> planner.Device:
    if torch.cuda.is_available() and not _no_device():
        return gpu(torch.device("cuda", torch.cuda.current_device()))
    return planner.CPU


@functools.cache
def gpu(device: torch.device) -> planner.Device:
    """The limits of a CUDA device, as the planner wants them."""
    found = torch.cuda.get_device_properties(device)
    arch = f"sm_{found.major}{found.minor}"
    return planner.Device(
        found.name,
        arch,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        found.L2_cache_size,
        miscompiled(_version("triton"), arch),
    )


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _any_float64(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def interpreting() -> bool:
    """True where `TRITON_INTERPRET=1` lets the kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_unusable(device: torch.device) -> str | None:
    missing = _triton_missing()
    if missing:
        return missing
    if interpreting():
        return None if device.type in ("cpu", "cuda") else f"tensors are on {device.type}"
    if device.type != "cuda":
        return (
            f"the tensors are on {device.type}, and Triton needs a CUDA device "
            "(or TRITON_INTERPRET=1 in the environment, to interpret the kernels on the CPU)"
        )
    return _device_missing(device.index)


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = _version("triton") or "0"
    if release(found) < (3, 6):
        return f"triton {found} is too old: 3.6 or newer is needed"
    return None


def _no_device() -> str | None:
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    return _device_missing(None)


@functools.cache
def _device_missing(index: int | None) -> str | None:
    if torch.version.hip:
        return "the kernels are not tested on ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    lost = _fallback_lost(miscompiled(_version("triton"), f"sm_{capability[0]}{capability[1]}"))
    return None if lost is None else str(lost)


def _fallback_lost(miscompiles: Sequence[Miscompile]) -> Miscompile | None:
    """What leaves nothing of Triton, for the staged path needs kernels too."""
    return next((known for known in miscompiles if {*FALLBACKS} & {*known.kernels}), None)


def _triton_runs_on() -> str:
    if interpreting():
        return "interpreter, on the CPU"
    return "; ".join(["CUDA device", *map(str, _own_device().miscompiles)])


@functools.cache
def _extension_missing() -> str | None:
    if importlib.util.find_spec("hut_kernels._C") is None:
        return (
            "the compiled extension is not built (with nvcc at hand: "
            "HUT_KERNELS_CUDA=1 pip install --no-build-isolation .)"
        )
    try:
        importlib.import_module("hut_kernels._C")
    except ImportError as error:
        return f"the compiled extension does not load: {error}"
    return None


def _extension() -> Any:
    """The compiled extension, which must be there."""
    return importlib.import_module("hut_kernels._C")


def architectures() -> str:
    """What the compiled extension, which must be there, is compiled for: `"80 90 120+PTX"`."""
    return _extension().architectures


def _cuda_version(number: int) -> str:
    """`"12.8"` for 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _extension_idle() -> str | None:
    """Why the extension, though loaded, has nothing to run on."""
    if not torch.cuda.is_available():
        return f"the compiled extension is loaded, for {architectures()}, but no CUDA device found"
    return _device_uncovered(None)


def _extension_unusable(device: torch.device) -> str | None:
    missing = _extension_missing()
    if missing:
        return missing
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the compiled extension needs a CUDA device"
    return _device_uncovered(device.index)


@functools.cache
def _device_uncovered(index: int | None) -> str | None:
    if torch.version.hip:
        return "the compiled extension has no kernels for ROCm"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    toolkit = _extension().toolkit
    if driver // 1000 < toolkit // 1000:  # within a major version any driver runs any toolkit's
        return (
            f"the compiled extension is built by CUDA {_cuda_version(toolkit)}, and the driver is "
            f"for CUDA {_cuda_version(driver)}: a newer driver is needed, or an older nvcc"
        )
    capability = torch.cuda.get_device_capability(index)
    if covers(architectures(), capability):
        return None
    return (
        f"the compiled extension is built for {architectures()}, and the device has compute "
        f"capability {capability[0]}.{capability[1]} (TORCH_CUDA_ARCH_LIST chooses others)"
    )


def covers(compiled: str, capability: tuple[int, int]) -> bool:
    """Whether a build for `"80 90 120+PTX"` runs on a device.

    Machine code runs on later devices of the same major version, PTX on all later ones. What is
    compiled for `"100f"` stays in its family, the major version, and for `"90a"` on that device.
    """
    for target in compiled.split():
        number, variant, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", target).groups()  # type: ignore[union-attr]
        built = int(number[:-1]), int(number[-1])
        latest = {"a": built, "f": (built[0], 9), "": (99, 9) if ptx else (built[0], 9)}[variant]
        if built <= capability <= latest:
            return True
    return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
