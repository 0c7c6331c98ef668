"""Takes the launches of Triton kernels: they compile as for a GPU, and the PTX runs here."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from . import blackwell  # noqa: F401  its instructions, and those of the modules below it
from .hopper import TensorMap
from .machine import Access, Array, Program, Unsupported
from .memory import Region, Space
from .parse import Kernel, parse

# What has been compiled is kept, by source and options, in a cache of Triton's that no GPU reads.
CACHE = Path(__file__).resolve().parents[2] / "build" / "ptx"


@dataclass
class Launch:
    """One launch that ran here: the kernel, its PTX, blocks, instructions, lines that ran."""

    kernel: str
    ptx: str
    blocks: int
    instructions: int
    executed: set[int]


@dataclass
class Log:
    """The launches, in order, and the number of kernels compiled for them."""

    launches: list[Launch] = field(default_factory=list)
    compiled: int = 0


class _StandIn:
    """A driver that only says which GPU is the current device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability  # the JIT's caches of other devices stay apart

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


@contextlib.contextmanager
def executing(
    arch: int,
    edit: Callable[[str], str] | None = None,
    watch: Callable[[Access], None] | None = None,
) -> Iterator[Log]:
    """Within, a launch of any Triton kernel on CPU tensors runs its PTX for sm_`arch`.

    NaN in a tensor counts as memory that nobody has written.

    Args:
        arch: 80, 90 and the like.
        edit: Changes the PTX before it runs, to plant a fault.
        watch: See `machine.Program`.

    Raises:
        Fault: The code does what it may not.
        Unsupported: The code does what the executor does not know.
    """
    log = Log()
    run, cubin = JITFunction.run, CUDABackend.make_cubin

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        given = {**dict(zip(self.arg_names, args, strict=False)), **options}
        _execute(compiled, given, grid(given) if callable(grid) else grid, log, edit, watch)

    def assemble(self: Any, *args: Any, **options: Any) -> bytes:
        log.compiled += 1
        return b"not assembled"

    JITFunction.run, CUDABackend.make_cubin = launch, assemble
    try:
        with _driver(_StandIn(arch)), _cache(Path(os.environ.get("HUT_PTX_CACHE", CACHE))):
            yield log
    finally:
        JITFunction.run, CUDABackend.make_cubin = run, cubin


@contextlib.contextmanager
def _driver(stand_in: _StandIn) -> Iterator[None]:
    driver = triton.runtime.driver
    active = getattr(driver, "_active", None)
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = active


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        yield


@functools.lru_cache(maxsize=64)
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


def _execute(
    compiled: Any,
    given: dict[str, Any],
    grid: tuple[int, ...],
    log: Log,
    edit: Callable[[str], str] | None,
    watch: Callable[[Access], None] | None,
) -> None:
    """Runs a compiled kernel for each block of the grid, on copies of its tensors."""
    ptx = compiled.asm["ptx"]
    program = Program(_parsed(edit(ptx) if edit else ptx), compiled.metadata.shared, watch)
    memory = Space()
    tensors: list[tuple[torch.Tensor, Region]] = []
    values: list[Any] = []
    metas = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for name, kind in compiled.src.signature.items():
        value: Any = given.get(name)
        if kind == "constexpr":
            continue
        if str(kind).startswith("tensordesc"):
            values += _describe(memory, name, value, next(metas), tensors)
        elif isinstance(value, torch.Tensor):
            values.append(_add(memory, name, value, tensors))
        elif str(kind).startswith("fp"):
            values.append(np.float32(value))
        else:
            values.append(np.int64(value))
    names = program.kernel.parameters
    values += [np.int64(0)] * (len(names) - len(values))  # scratch memory: none
    parameters = dict(zip(names, values, strict=True))
    blocks = int(np.prod(grid))
    if len(grid) > 1 and blocks != grid[0]:
        raise Unsupported("a grid of more than one dimension")
    for block in range(blocks):
        program.run(block, blocks, parameters, memory)
    for tensor, region in tensors:
        _give_back(tensor, region)
    log.launches.append(
        Launch(program.kernel.name, ptx, blocks, program.instructions, program.executed)
    )


def _describe(memory: Space, name: str, value: Any, meta: Any, tensors: Any) -> list[Any]:
    """A tensor map, with shape and strides behind it."""
    base = _add(memory, name, value.base, tensors)
    meta = meta if isinstance(meta, dict) else meta._asdict()
    if value.padding == "nan" or meta["fp4_padded"]:
        raise Unsupported(f"a tensor map of the form {meta}")
    number = 0x7F000000 + 128 * len(memory.maps)  # in 32 bits, as parameters' addresses are
    memory.maps[number] = TensorMap(
        memory.at(int(base)),
        tuple(value.shape),
        int(value.strides[0]),
        tuple(meta["block_size"]),
        meta["elem_size"],
        (0, 32, 64, 128)[meta["swizzle"]],
    )
    return [np.int64(number), *map(np.int64, (*value.shape, *value.strides))]


def _add(memory: Space, name: str, tensor: torch.Tensor, tensors: Any) -> np.int64:
    """A region for the tensor; what lies between its elements is nobody's."""
    index, values = _elements(tensor)
    words = np.zeros(int(index.max()) + 1 if index.size else 0, values.dtype)
    region = memory.add(name, words, tensor.data_ptr() % 16)
    region.words[index] = values
    region.valid[index] = ~torch.isnan(tensor.detach()).numpy()
    tensors.append((tensor, region))
    return np.int64(region.base)


def _elements(tensor: torch.Tensor) -> tuple[Array, Array]:
    """The place in memory and the bits of each element, in the tensor's shape."""
    index = np.zeros(tuple(tensor.shape), np.int64)
    for axis, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        index += (np.arange(n) * stride).reshape([n if a == axis else 1 for a in range(index.ndim)])
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(bits).numpy()
    return index, values.view(f"u{tensor.element_size()}")


def _give_back(tensor: torch.Tensor, region: Region) -> None:
    index, _ = _elements(tensor)
    values = region.words[index]
    signed = values if values.itemsize == 1 else values.view(f"i{values.itemsize}")
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(signed).contiguous().view(tensor.dtype))
