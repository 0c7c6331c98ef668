"""The backends that can run here, why the others cannot, and which of them runs a call."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_choice
from .devices import CPU, Device, as_seen, gpu
from .errors import HUTBackendError
from .formats import Stored
from .versions import installed, lost_fallback, miscompiled, release

BACKENDS = ("auto", "torch", "triton", "cuda")


def backends() -> dict[str, dict[str, object]]:
    """Lists the backends that can run here, for bug reports.

    Returns:
        For each of `torch`, `triton` and `cuda`: `available` (bool), `reason` (why not, or on what
        it runs) and, where there is one, `version`.

    Examples:
        >>> from hut_kernels import backends
        >>> backends()["torch"]["reason"]
        'runs on every device of PyTorch'
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
            "version": installed("triton"),
        },
        "cuda": {
            "available": extension is None,
            "reason": extension or f"CUDA device; compiled for {architectures()}",
            "version": None,
        },
    }


def choose(name: str, tensors: Sequence[Tensor | Stored]) -> str:
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
    if name == "auto" and device.type != "cuda":
        return "torch"
    if name == "auto":
        chosen = "torch" if _any_float64(tensors) else auto_backend(device)
        return "torch" if chosen == "cuda" and _any_stored(tensors) else chosen
    if name == "torch":
        return name
    check_choice("backend", name, BACKENDS)
    if _any_float64(tensors):
        raise TypeError(f'backend="{name}" has no float64; use backend="torch" or float32')
    missing = _extension_unusable(device) if name == "cuda" else _triton_unusable(device)
    if name == "cuda" and _any_stored(tensors):
        missing = "the compiled extension reads dense weights only, and this one is quantized"
    if missing:
        raise HUTBackendError(f'backend="{name}" cannot run here: {missing}')
    if interpreting() and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise HUTBackendError(
            "Triton's interpreter computes wrongly in bfloat16: use float32 or float16 under "
            "TRITON_INTERPRET=1"
        )
    return name


def auto_backend(device: torch.device) -> str:
    """The backend that "auto" means on a device, but for float64."""
    if device.type != "cuda":
        return "torch"
    with_triton = _triton_missing() is None and _device_missing(device.index) is None
    with_extension = _extension_unusable(device) is None
    if with_triton and with_extension:
        return "auto"
    return "triton" if with_triton else "cuda" if with_extension else "torch"


def own_device() -> Device:
    """This machine's device: its current GPU where Triton can run on it, else its CPU."""
    if torch.cuda.is_available() and not _no_device():
        return as_seen(gpu(torch.device("cuda", torch.cuda.current_device())))
    return CPU


def _any_stored(tensors: Sequence[Tensor | Stored]) -> bool:
    return any(isinstance(tensor, Stored) for tensor in tensors)


def _any_float64(tensors: Sequence[Tensor | Stored]) -> bool:
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
    found = installed("triton") or "0"
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
    lost = lost_fallback(miscompiled(installed("triton"), f"sm_{capability[0]}{capability[1]}"))
    return None if lost is None else str(lost)


def _triton_runs_on() -> str:
    if interpreting():
        return "interpreter, on the CPU"
    return "; ".join(["CUDA device", *map(str, own_device().miscompiles)])


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
    """The targets of the compiled extension, which must be there: `"80 90 120+PTX"`."""
    return _extension().architectures


def _cuda_version(number: int) -> str:
    """`"12.8"` for 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _extension_idle() -> str | None:
    """Give the reason why the extension, though loaded, has nothing to run on, or None."""
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
    """True where a build for `"80 90 120+PTX"` runs on a device.

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
