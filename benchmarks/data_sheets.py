"""GPUs by their data sheets, for estimates; measured limits are `make gpu`'s."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet.

    Attributes:
        name: As it is called in shops.
        memory: GiB that the driver shows: with ECC on GDDR6 a sixteenth less than is printed.
        bandwidth: GB/s of its memory.
        tflops: Dense 16-bit matrix products with float32 sums, TFLOP/s.
        arch: Its compute capability; the kernels need `sm_80`.
    """

    name: str
    memory: float
    bandwidth: float
    tflops: float
    arch: str

    @property
    def has_kernels(self) -> bool:
        """True if the Triton kernels run on it; else HUT takes the PyTorch path."""
        return int(self.arch.removeprefix("sm_")) >= 80


SHEETS = (
    Sheet("V100", 32, 900, 125, "sm_70"),
    Sheet("T4", 15, 320, 65, "sm_75"),
    Sheet("A100 40GB", 40, 1555, 312, "sm_80"),
    Sheet("A100", 80, 2039, 312, "sm_80"),
    Sheet("A10", 22.5, 600, 125, "sm_86"),
    Sheet("A6000", 48, 768, 155, "sm_86"),
    Sheet("RTX 3060", 12, 360, 25.5, "sm_86"),
    Sheet("RTX 3080", 10, 760, 59.5, "sm_86"),
    Sheet("RTX 3090", 24, 936, 71, "sm_86"),
    Sheet("L4", 22.5, 300, 121, "sm_89"),
    Sheet("L40S", 45, 864, 362, "sm_89"),
    Sheet("RTX 4070", 12, 504, 58.3, "sm_89"),
    Sheet("RTX 4090", 24, 1008, 165, "sm_89"),
    Sheet("H100 PCIe", 80, 2000, 756, "sm_90"),
    Sheet("H100", 80, 3350, 989, "sm_90"),
    Sheet("H200", 140.4, 4800, 989, "sm_90"),
    Sheet("B200", 179, 8000, 2250, "sm_100"),
    Sheet("RTX 5070", 12, 672, 61.7, "sm_120"),
    Sheet("RTX 5080", 16, 960, 112.6, "sm_120"),
    Sheet("RTX 5090", 32, 1792, 209.5, "sm_120"),
)
FORM = "memory=24,bandwidth=1008,tflops=165,arch=sm_89"


def find(text: str) -> Sheet:
    """A GPU by its name, in any case and with or without NVIDIA and RTX, or by its figures.

    Raises:
        ValueError: An unknown name; the message lists the known ones and shows how to describe one.
    """
    if "=" in text:
        return _described(text)
    by_name = {_plain(sheet.name): sheet for sheet in SHEETS}
    if _plain(text) not in by_name:
        names = ", ".join(sheet.name for sheet in SHEETS)
        raise ValueError(
            f"a device is one of {names}; another is described by its GiB, GB/s and dense 16-bit "
            f"TFLOP/s, as in --device {FORM}; got {text!r}"
        )
    return by_name[_plain(text)]


def _described(text: str) -> Sheet:
    try:
        given = dict(part.split("=", 1) for part in text.split(","))
        arch = given.pop("arch", "sm_80")
        figures = {name: float(value) for name, value in given.items()}
        sheet = Sheet(text, **figures, arch=arch)
        usable = sheet.has_kernels is not None and min(figures.values()) > 0
    except (ValueError, TypeError):
        usable = False
    if not usable:
        raise ValueError(f"a device is described as {FORM}, arch is optional; got {text!r}")
    return sheet


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
