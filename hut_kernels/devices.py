"""The devices that plans are for, their limits and break-evens. A new device is added here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .versions import Miscompile, installed, miscompiled


@dataclass(frozen=True)
class Device:
    """The limits a plan depends on.

    Attributes:
        name: As the driver gives it.
        arch: `"sm_90"` and the like; `"cpu"` where there is no GPU.
        sms: Multiprocessors.
        shared_memory: Bytes a program may use.
        l2: Bytes of L2 cache.
        miscompiles: What the Triton at hand compiles wrongly for it.
    """

    name: str
    arch: str
    sms: int
    shared_memory: int
    l2: int
    miscompiles: tuple[Miscompile, ...] = ()

    def denies(self, kernel: str, dtype: str) -> bool:
        """True where a kernel must not run in a compute type."""
        return any(kernel in known.kernels and known.concerns(dtype) for known in self.miscompiles)


_KB, _MB = 1 << 10, 1 << 20
CPU = Device("cpu", "cpu", 1, 0, 0)
DEVICES = (
    Device("NVIDIA A100", "sm_80", 108, 163 * _KB, 40 * _MB),
    Device("NVIDIA GeForce RTX 3090", "sm_86", 82, 99 * _KB, 6 * _MB),
    Device("NVIDIA GeForce RTX 4090", "sm_89", 128, 99 * _KB, 72 * _MB),
    Device("NVIDIA H100", "sm_90", 132, 227 * _KB, 50 * _MB),
    Device("NVIDIA H200", "sm_90", 132, 227 * _KB, 50 * _MB),
    Device("NVIDIA B200", "sm_100", 148, 227 * _KB, 126 * _MB),
    Device("NVIDIA GeForce RTX 5090", "sm_120", 170, 99 * _KB, 96 * _MB),
)


@dataclass(frozen=True)
class BreakEven:
    """The most tokens at which the fused kernel is chosen, for each part of a layer."""

    forward: int
    grad_input: int
    grad_factors: int
    source: str


# By a device's name as in DEVICES where `make gpu` has measured it (the source is then the record's
# name), else by its architecture. None is measured yet: these are estimates of the cost model, at
# the low end of its range, for a fused kernel chosen too late costs less than one chosen too early.
BREAK_EVENS = {
    "sm_80": BreakEven(320, 320, 512, "estimate"),
    "sm_86": BreakEven(512, 512, 512, "estimate"),
    "sm_89": BreakEven(768, 768, 512, "estimate"),
    "sm_90": BreakEven(400, 400, 512, "estimate"),
    "sm_100": BreakEven(400, 400, 512, "estimate"),
    "sm_120": BreakEven(768, 768, 512, "estimate"),
}
_DEFAULT_BREAK_EVEN = BreakEven(256, 256, 256, "estimate for an unknown architecture")


def known_name(device: Device) -> str:
    """The name in DEVICES that the driver's name begins with, or the driver's own."""
    names = (known.name for known in DEVICES if device.name.startswith(known.name))
    return next(names, device.name)


def break_even(device: Device) -> BreakEven:
    """A device's own break-evens where they are measured, else its architecture's."""
    of_architecture = BREAK_EVENS.get(device.arch, _DEFAULT_BREAK_EVEN)
    return BREAK_EVENS.get(known_name(device), of_architecture)


def find_device(name: str) -> Device:
    """A known device by (part of) its name or what its driver calls it, or `"cpu"`.

    Raises:
        ValueError: No such device; the message lists the known ones.
    """
    wanted = name.lower().replace(" ", "")
    if wanted == "cpu":
        return CPU
    for device in DEVICES if wanted else ():
        known_name = device.name.lower().replace(" ", "")
        if wanted in known_name or known_name in wanted or wanted == device.arch:
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise ValueError(f"unknown device {name!r}; known: cpu, {known}")


@functools.cache
def gpu(device: torch.device) -> Device:
    """The limits of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    arch = f"sm_{found.major}{found.minor}"
    return Device(
        found.name,
        arch,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        found.L2_cache_size,
        miscompiled(installed("triton"), arch),
    )
