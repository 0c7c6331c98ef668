"""The devices that plans are for, their limits and break-evens. A new device is added here."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .versions import Miscompile, installed, miscompiled

# The rows of the launch tables: ranks, and tokens, up to which each of them serves.
RANKS = (16, 32, 64, 128)
TOKENS = (16, 64, 128)


class Misfit(NamedTuple):
    """A kernel that asked for more than its device has.

    Attributes:
        kernel: Its name in the launch tables.
        row: The calls that launch it so: `planner.Problem.row`.
        lack: What there was too little of, in words.
    """

    kernel: str
    row: tuple[object, ...]
    lack: str

    def __str__(self) -> str:
        return f"{self.kernel} does not fit this device, and is passed by: {self.lack}"


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
        misfits: The kernels that turned out to be too large for it.
    """

    name: str
    arch: str
    sms: int
    shared_memory: int
    l2: int
    miscompiles: tuple[Miscompile, ...] = ()
    misfits: tuple[Misfit, ...] = ()

    def denies(self, kernel: str, dtype: str) -> bool:
        """True where a kernel must not run in a compute type."""
        return any(kernel in known.kernels and known.concerns(dtype) for known in self.miscompiles)

    def holds(self, kernel: str, row: tuple[object, ...]) -> bool:
        """True where no launch of the kernel for these calls has failed for its size."""
        return not any(found.kernel == kernel and found.row == row for found in self.misfits)


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


# Bytes from DRAM in a clock of a multiprocessor, by data sheets: A100 80 GB, RTX 3090, RTX 4090,
# H200, B200, RTX 5090.
DRAM = {
    "sm_80": 2039e9 / 108 / 1.41e9,
    "sm_86": 936e9 / 82 / 1.695e9,
    "sm_89": 1008e9 / 128 / 2.52e9,
    "sm_90": 4800e9 / 132 / 1.755e9,
    "sm_100": 8000e9 / 148 / 1.965e9,
    "sm_120": 1792e9 / 170 / 2.407e9,
}


@dataclass(frozen=True)
class BreakEven:
    """The most tokens at which the fused kernel is chosen, for each part of a layer.

    Attributes:
        forward, grad_input: For every rank.
        grad_factors: Likewise, or for each of `RANKS`.
        source: The name of a record, or that it is an estimate.
    """

    forward: int
    grad_input: int
    grad_factors: int | tuple[int, ...]
    source: str

    def tokens(self, part: str, r: int) -> int:
        """That of a part at a rank."""
        most = getattr(self, part)
        return most if isinstance(most, int) else most[bisect.bisect_left(RANKS, r)]


# By a device's name as in DEVICES where `make gpu` has measured it (the source is then the record's
# name), else by its architecture. None is measured yet: these are estimates of the cost model, at
# the low end of its range, for a fused kernel chosen too late costs less than one chosen too early.
# The factors' lie where the reduction behind the loop takes a quarter of it (`tools.slots`) or
# beyond; 0 where by then the BLAS has long been faster.
BREAK_EVENS = {
    "sm_80": BreakEven(320, 320, (640, 768, 0, 0), "estimate"),
    "sm_86": BreakEven(512, 512, (512, 512, 1024, 0), "estimate"),
    "sm_89": BreakEven(768, 768, (512, 512, 1024, 0), "estimate"),
    "sm_90": BreakEven(400, 400, (512, 640, 0, 0), "estimate"),
    "sm_100": BreakEven(400, 400, (512, 512, 0, 0), "estimate"),
    "sm_120": BreakEven(768, 768, (512, 512, 1024, 0), "estimate"),
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
    """A known device by (whole words of) its name or what its driver calls it, or `"cpu"`.

    Raises:
        ValueError: No such device; the message lists the known ones.
    """
    wanted = name.lower().strip()
    if wanted == "cpu":
        return CPU
    for device in DEVICES if wanted else ():
        known_name = device.name.lower()
        same = wanted.replace(" ", "") == known_name.replace(" ", "") or wanted == device.arch
        if same or _stands_in(wanted, known_name) or _stands_in(known_name, wanted):
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise ValueError(f"unknown device {name!r}; known: cpu, {known}")


def _stands_in(words: str, text: str) -> bool:
    """True of whole words: an A10 is no A100."""
    return re.search(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])", text) is not None


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


_misfits: dict[str, tuple[Misfit, ...]] = {}  # by the name of the device


def as_seen(device: Device) -> Device:
    """A device, with the kernels that turned out to be too large for it in this process."""
    found = _misfits.get(device.name)
    return device if found is None else dataclasses.replace(device, misfits=found)


def note_misfit(device: Device, misfit: Misfit) -> None:
    """Has later plans pass a kernel by, and says so once."""
    _misfits[device.name] = (*_misfits.get(device.name, ()), misfit)
    warnings.warn(f"on {device.name} {misfit}", stacklevel=2)
