"""The gate: every row of the launch tables compiled for its architecture, its machine code checked.

`python -m tools.gate [--arch ARCH ...] [--kernel NAME ...] [--json F] [--dump DIR]`

No GPU is needed: Triton compiles for any architecture, given a driver that says which. The gate
calls the launchers themselves with CPU tensors and stops each launch after compilation, so what it
reads is what a real launch runs. It exits with 1 and names each broken rule.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from hut_kernels import devices, planner, versions
from hut_kernels.dispatch import interpreting
from hut_kernels.formats import FourBit, Layout, Stored
from hut_kernels.formats.int8 import Int8Rows
from hut_kernels.layer import Layer, Needs, Spec
from hut_kernels.triton import (
    backend,
    forward,
    grad_factors,
    grad_input,
    grad_reduce,
    stored_weight,
    weight,
)
from hut_kernels.triton.launch import (
    LaunchConfig,
    is_heavy,
    padded_rank,
)
from hut_kernels.triton.tables import ARCHITECTURES, launch_config

KERNELS = {
    "forward": forward.hut_forward_kernel,
    "grad_input": grad_input.hut_grad_input_kernel,
    "grad_factors": grad_factors.hut_grad_factors_kernel,
    "grad_reduce": grad_reduce.hut_grad_reduce_kernel,
    "weight": weight.hut_weight_kernel,
    "stored": stored_weight.hut_stored_weight_kernel,
    "stored_reduce": grad_reduce.hut_grad_reduce_kernel,
    "stored_forward": forward.hut_forward_kernel,
}
OVER_STORED = ("stored", "stored_reduce", "stored_forward")
PRODUCTS = ("forward", "grad_input", "grad_factors")  # the kernels with a main loop
DECODE = "stored_forward"  # has one too: for few tokens, over four bits, in 16-bit types
RANKS = (16, 32, 64, 128)
TOKENS = (16, 64, 128, 4096)  # one number of tokens of each class in the tables
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
# What a launch may have beside the plain case: strides and pointers that are no multiples of 16
# elements; groups of `two_sided` that fill whole tiles, and such as do not; bias, gamma, beta and
# the sums for d gamma; a float32 W0 under 16 bits; a W0 stored transposed, as Conv1D's is; a stack
# of experts, for the two kernels that take one.
VARIANTS = (
    *("plain", "unaligned", "two_sided", "ragged", "vectors", "wide", "transposed"),
    "experts",
)
OF_EXPERTS = ("weight", "grad_reduce")
# What W0 is stored as, for the kernels of that: NF4, doubly quantized, in blocks across rows; int8.
STORED = ("nf4", "nested", "across", "int8")
# Instructions a weight of NF4 at most, by rank; doubly quantized it may be 0.4 more. bitsandbytes'
# own dequantization and then the weight kernel take 36 to 43 at r 16.
MOST_INSTRUCTIONS = {16: 11.5, 64: 15.5}
# Above that: sm_100, where 12.2 are seen at r 16; probably T's way out of tensor memory.
_MORE_BY_ARCH = {"sm_100": 1.0}
HEAVY = ("ragged", "wide", "transposed")  # what needs more than the plain case
_TENSOR_CORES = {"sm_90": "HGMMA", "sm_100": "UTC*MMA"}  # HMMA elsewhere
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Config:
    """One compilation: a row of the tables, and the variant of the kernel.

    Attributes:
        arch: `"sm_90"` and the like.
        kernel: A key of `KERNELS`.
        dtype: A key of `TYPES`.
        r: The rank.
        N: Tokens, for the class of the row.
        row: The launch row.
        variant: One of `VARIANTS`.
    """

    arch: str
    kernel: str
    dtype: str
    r: int
    N: int
    row: LaunchConfig
    variant: str = "plain"

    @property
    def name(self) -> str:
        """As the dumped files are called."""
        tail = "" if self.variant == "plain" else f"-{self.variant}"
        arch = self.arch.replace("_", "")
        return f"{arch}-{self.kernel}-{self.dtype}-r{self.r}-n{self.N}{tail}"


@dataclass(frozen=True)
class Report:
    """The machine code of a configuration in figures, and the rules it breaks."""

    config: Config
    registers: int
    stack: int
    shared: int
    spills: int
    loop: dict[str, int]
    occupancy: int
    broken: tuple[str, ...]


def configurations(
    archs: Sequence[str] = ARCHITECTURES, kernels: Sequence[str] = tuple(KERNELS)
) -> list[Config]:
    """Every row in use, by r, tokens and type, and its variants."""
    found: dict[Config, Config] = {}
    for arch in archs:
        for kernel in kernels:
            for config in _of_kernel(arch, kernel):
                # A row that serves several classes of tokens is compiled once.
                found.setdefault(dataclasses.replace(config, N=0), config)
    return list(found.values())


def _of_kernel(arch: str, kernel: str) -> Iterator[Config]:
    tokens = TOKENS if kernel in PRODUCTS else TOKENS[:1] if kernel == DECODE else TOKENS[-1:]
    variants = STORED if kernel in OVER_STORED else VARIANTS
    for dtype in TYPES:
        for r in RANKS:
            for N in tokens:
                for variant in variants:
                    if _stands_for_others(variant, kernel, dtype, r, last=N == tokens[-1]):
                        tiles = launch_config(kernel, arch, N, r, dtype)
                        layer = _layer(kernel, variant, dtype, r, "meta")
                        if is_heavy(kernel, layer, TYPES[dtype], tiles):
                            gathers = layer.spec.transform == "two_sided"
                            tiles = launch_config(kernel, arch, N, r, dtype, True, gathers)
                        yield Config(arch, kernel, dtype, r, N, tiles, variant)


def _stands_for_others(variant: str, kernel: str, dtype: str, r: int, last: bool) -> bool:
    """Tell the variants to compile: those of 16 bits, which are what the planner mostly runs."""
    if kernel == DECODE:
        return variant == "nf4" and dtype in ("bf16", "fp16")
    if variant in ("plain", "nf4"):
        return True
    if variant in STORED:
        return dtype == "bf16" and r in (16, 64)
    if variant == "experts":
        return kernel in OF_EXPERTS and dtype != "fp32" and r in (16, 128)
    if dtype == "fp32" or (variant == "wide" and dtype == "tf32"):
        return False
    if variant in ("unaligned", "two_sided"):
        return last and dtype != "tf32"
    return r in (16, 128) and kernel in PRODUCTS


def inspect(config: Config, dump: Path | None = None) -> Report:
    """Compiles one configuration and reads its machine code."""
    try:
        compiled = compile_config(config)
    except Exception as error:  # whatever the compiler raises is the finding
        message = f"does not compile: {type(error).__name__}: {str(error).strip()[:200]}"
        return Report(config, 0, 0, 0, 0, {}, 0, (message,))
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    if dump is not None:
        (dump / f"{config.name}.cubin").write_bytes(cubin)
        (dump / f"{config.name}.ptx").write_text(ptx)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", file)
        code = _instructions(_run("nvdisasm", "-c", file))
        warnings = _serialized(ptx, Path(folder)) if config.arch == "sm_90" else []
    if config.arch == "sm_100" and not _passed_by(config):
        ttgir = compiled.asm["ttgir"]
        unfenced = unfenced_copies(ptx) if has_copied_operands(ttgir) else []
        warnings = [*unfenced, *refilled_operands(ttgir)]
    registers, stack = (
        int(re.search(rf"{key}:(\d+)", usage).group(1))  # type: ignore[union-attr]
        for key in ("REG", "STACK")
    )
    shared = compiled.metadata.shared
    spills = sum(_opcode(line) in ("STL", "LDL") for line in code.lines)
    lines = _main_loop(code)
    loop = collections.Counter(_opcode(line) for line in lines)
    broken = _broken_rules(config, stack, shared, spills, lines, warnings, code.lines)
    occupancy = _occupancy(config, registers, shared)
    return Report(config, registers, stack, shared, spills, dict(loop), occupancy, broken)


def compile_config(config: Config) -> Any:
    """The compiled kernel of the launch that `config` describes."""
    _switch_to(config.arch)
    kernel = KERNELS[config.kernel]
    compiled: list[Any] = []
    run = kernel.run

    def stop_after_compiling(*args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(*args, grid=grid, warmup=True, **options))

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if config.dtype == "tf32" else "ieee"
    kernel.run = stop_after_compiling
    try:
        _launch(config)
    finally:
        del kernel.run
        torch.backends.cuda.matmul.fp32_precision = before
    return compiled[0]


def _launch(config: Config) -> None:
    """Calls the launcher with tensors of one real layer's size and strides."""
    dtype, N, tiles = TYPES[config.dtype], config.N, config.row
    layer = _layer(config.kernel, config.variant, config.dtype, config.r)
    size = layer.sizes[0]
    x, grad = torch.empty(N, size, dtype=dtype), torch.empty(N, size, dtype=dtype)
    needs = Needs(True, True, layer.gamma is not None)
    if config.variant == "experts":
        _launch_experts(config, layer, needs)
    elif config.kernel in ("forward", DECODE):
        forward.launch_forward(x, layer, tiles)
    elif config.kernel == "grad_input":
        if config.variant != "transposed":  # as which it gives y
            grad, layer = grad_input.join_gamma(grad, layer)
        grad_input.launch_grad_input(grad, layer, tiles)
    elif config.kernel == "grad_factors":
        splits = _splits(config, layer)
        grad_factors.launch_grad_factors(grad, x, layer, needs, tiles, splits)
    elif config.kernel in ("grad_reduce", "stored_reduce"):
        splits = _splits(config, layer)
        grad_reduce.launch_grad_reduce(grad[:1], x[:1], layer, needs, tiles, splits, size)
    elif config.kernel == "stored":
        stored_weight.launch_stored_weight(layer, dtype, tiles)
    else:
        weight.launch_weight(layer, dtype, tiles)


def _launch_experts(config: Config, layer: Layer, needs: Needs) -> None:
    """Calls the launcher of a group of experts: both of a stack of two."""
    dtype, (O, K, _), tiles = TYPES[config.dtype], layer.sizes, config.row
    experts = torch.arange(2)
    if config.kernel == "weight":
        weight.launch_weight(layer, dtype, tiles, experts=experts)
    else:
        G = torch.empty(2, O, K, dtype=dtype if config.dtype == "bf16" else torch.float32)
        reduction = grad_reduce.ExpertsReduction(layer, dtype, needs, tiles, (8, 8))
        reduction.add(G, experts)


def _splits(config: Config, layer: Layer, rows: int | None = None) -> tuple[int, int]:
    """The splits of O (of `rows` of it) and K of a call on the architecture's own device."""
    (O, K, r), tiles = layer.sizes, config.row
    device = next(d for d in devices.DEVICES if d.arch == config.arch)
    stored = isinstance(layer.weight, Stored)
    kept = "nf4" if stored else str(layer.weight.dtype).removeprefix("torch.")
    problem = planner.Problem(config.N, K, O, r, _dtype_name(config), kept)
    return backend._splits(rows or O, tiles, planner.plan(problem, device))


def _layer(kernel: str, variant: str, dtype: str, r: int, device: str = "cpu") -> Layer:
    size = {"unaligned": 4099, "ragged": 768, "across": 4304}.get(variant, 4096)
    W0_dtype = torch.float32 if variant == "wide" else TYPES[dtype]
    W0: Any = torch.empty(size, size, dtype=W0_dtype, device=device)
    if variant in STORED:
        W0 = _stored(variant, size, W0_dtype, device)
    if variant == "transposed":
        W0 = W0.t()
    has_vectors = variant == "vectors" or (variant, kernel) == ("transposed", "grad_input")
    vector = torch.empty(size, device=device) if has_vectors else None
    hut_A, hut_B = torch.empty(r, size, device=device), torch.empty(size, r, device=device)
    spec = Spec("two_sided" if variant in ("two_sided", "ragged") else "low_rank")
    if variant == "experts":
        W0, hut_A, hut_B = (operand.expand(2, *operand.shape) for operand in (W0, hut_A, hut_B))
    layer = Layer(W0, hut_A, hut_B, vector, vector, vector, spec)
    swapped = variant == "transposed" and kernel in ("forward", "grad_input")
    return (
        layer.transposed if swapped else layer
    )  # as `backend` has it: y of one is dx of the other


def _stored(variant: str, size: int, dtype: torch.dtype, device: str) -> Stored:
    def empty(length: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(length, dtype=kind, device=device)

    if variant == "int8":
        form = Layout("int8", (size, size, 1), torch.float32)
        return Int8Rows(empty(size * size, torch.int8), (empty(size),), form)
    blocks, nested = size * size // 64, 256 if variant == "nested" else 0
    scales: tuple[torch.Tensor, ...] = (empty(blocks),)
    if nested:
        scales = empty(blocks, torch.uint8), empty(256), empty(blocks // nested), empty(1)
    form = Layout("nf4", (size, size, 64, nested), dtype)
    return FourBit(empty(size * size // 2, torch.uint8), scales, form)


class _StandIn:
    """A driver without a GPU: it only says which architecture is the current device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # a device of its own, so that the JIT's caches stay apart

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


def _switch_to(arch: str) -> None:
    triton.runtime.driver.set_active(_StandIn(int(arch.removeprefix("sm_"))))


# Reading machine code


@dataclass(frozen=True)
class _Code:
    lines: list[str]
    loops: list[tuple[int, int]]  # first and last line of each, by backward branches


def _instructions(listing: str) -> _Code:
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label.group(1)] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction.group(1))
    loops = []
    for number, line in enumerate(lines):
        branch = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
        if branch and labels.get(branch.group(1), number + 1) <= number:
            loops.append((labels[branch.group(1)], number))
    return _Code(lines, loops)


def _opcode(line: str, parts: int = 1) -> str:
    """`HMMA` of `@P0 HMMA.16816.F32.BF16 R4, ...`."""
    return ".".join(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[:parts])


def _is_product(opcode: str) -> bool:
    return opcode in ("HMMA", "HGMMA", "FFMA") or re.fullmatch(r"UTC\w*MMA", opcode) is not None


def _main_loop(code: _Code) -> list[str]:
    """The loop over tokens or features: an innermost one with the most products.

    The loops of the reduction multiply too, but they write, or copy nothing that is to be waited
    for; the main loop does not write.
    """
    best: list[str] = []
    most = (False, 0)
    for first, last in code.loops:
        lines = code.lines[first : last + 1]
        if any(first <= a and b < last and _products(code.lines[a : b + 1]) for a, b in code.loops):
            continue  # an outer loop: what matters is within
        writes = any(_opcode(line) in ("STG", "RED") for line in lines)
        copies = any(_opcode(line) in ("LDGSTS", "UTMALDG") for line in lines)
        if not writes and _products(lines) and (copies, _products(lines)) > most:
            best, most = lines, (copies, _products(lines))
    return best


def _products(lines: list[str]) -> int:
    return sum(_is_product(_opcode(line)) for line in lines)


def _multiplications(lines: list[str], warps: int) -> int:
    """Multiplications of the warps' `HMMA.16816` and warp groups' `HGMMA.64x128x16` together."""
    total = 0
    for line in lines:
        if shape := re.search(r"\bHMMA\.(16)(8)(\d+)\.", line):
            groups = warps
        elif shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\.", line):
            groups = warps // 4
        else:
            continue
        total += groups * math.prod(int(size) for size in shape.groups())
    return total


def _serialized(ptx: str, folder: Path) -> list[str]:
    """Ptxas' own words where it gave up overlapping wgmma's (C75xx)."""
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    options = ["--gpu-name=sm_90a", "-v", "-o", os.devnull]
    log = subprocess.run([_BIN / "ptxas", *options, file], capture_output=True, text=True)
    found = sorted(set(re.findall(r"C75\d\d", log.stderr + log.stdout)))
    return [f"serialized wgmma: ptxas {warning}" for warning in found]


# Races by PTX's rules for tcgen05.mma (9.7.16.6), which is asynchronous and reads shared memory in
# the async proxy; docs/reliability.md tells in which versions of Triton they are.

_SHARED_PRODUCT = re.compile(r"tcgen05\.mma\S* +\[[^]]*\], *%rd\d+, *%rd\d+")


def unfenced_copies(ptx: str) -> list[str]:
    """Products of shared operands that cp.async may have filled, and no proxy fence has shown them.

    What cp.async writes is visible to the thread after its wait, to a product after a fence too.
    """
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.startswith("$L")}
    unfenced, seen = set(), set()
    paths = [n for n, line in enumerate(lines) if line.startswith("cp.async.wait_group")]
    while paths:
        number = paths.pop()
        if number in seen or number >= len(lines):
            continue
        seen.add(number)
        line = lines[number]
        if "fence.proxy.async" in line or line == "ret;":
            continue
        if _SHARED_PRODUCT.search(line):
            unfenced.add(number)
        if branch := re.search(r"\bbra\S*\s+(\$L\w+)", line):
            paths.append(labels[branch[1]])
        if not line.startswith("bra"):
            paths.append(number + 1)
    return [f"race: no fence between cp.async and {lines[number]}" for number in sorted(unfenced)]


def has_copied_operands(ttgir: str) -> bool:
    """Tell a product that may read what cp.async fills: its operands are traced to buffers."""
    views = re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir)
    for arguments in re.findall(r"iter_args\(([^\n]*?)\) ->", ttgir):
        views += re.findall(r"(%\w+) = (%\w+)", arguments)
    parents = dict(views)

    def buffer(name: str) -> str:
        while name in parents:
            name = parents[name]
        return name

    filled = re.findall(r"async_copy_global_to_local %\w+, (%\w+)", ttgir)
    allocated = set(re.findall(r"(%\w+) = tt\w+\.(?:local|tmem)_alloc\b", ttgir))
    others = allocated - {buffer(name) for name in filled}
    operands = re.findall(r"tc_gen5_mma\w* (%[\w#]+), (%[\w#]+)", ttgir)
    return any(buffer(name) not in others for pair in operands for name in pair)


def refilled_operands(ttgir: str) -> list[str]:
    """Operands in one buffer that a loop fills again before the product that reads it is done.

    So it is where a pass through a loop fills a product's buffer from registers, and only then
    waits for the product of the pass before, whose operands the loop hands on.
    """
    found = []
    for loop in re.finditer(
        r"^( *)[^\n]*scf\.for [^\n]*iter_args\(([^\n]*?)\) ->.*\n", ttgir, re.M
    ):
        lines = ttgir[loop.end() :].split(f"\n{loop[1]}}}")[0].splitlines()
        yielded = re.findall(r"[%\w#]+", lines[-1].split("yield")[1].split(" : ")[0])
        handed_on = dict(zip(re.findall(r"(%\w+) = ", loop[2]), yielded, strict=True))
        filled: set[str] = set()  # this pass's buffers, by the names of all their views
        for line in lines:
            if fill := re.search(r"(%\w+) = ttg\.local_alloc %\w+ :", line):
                filled.add(fill[1])
            elif view := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
                filled |= {view[1]} if view[2] in filled else set()
            elif wait := re.search(r"wait_barrier .* deps ([^:]*):", line):
                awaited = re.findall(r"%\w+", wait[1])
                found += [name for name in awaited if handed_on.get(name) in filled]
    return [
        f"race: {name} is filled again before the product that reads it is done" for name in found
    ]


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([_BIN / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


# The rules


# Bytes of stack that a variant of a row may take: a few registers. The plain case has none.
_SPARE = 16


def _broken_rules(
    config: Config,
    stack: int,
    shared: int,
    spills: int,
    loop: list[str],
    warnings: list[str],
    code: list[str],
) -> tuple[str, ...]:
    broken = []
    limit = shared_memory_limit(config.arch)
    if shared > limit:
        broken.append(f"shared memory: {shared} bytes, the device has {limit}")
    if not _planned(config):
        return tuple(broken)  # slow would be no harm: the planner never chooses it
    if stack > (_SPARE if config.variant in (*HEAVY, "vectors") else 0):
        broken.append(f"spills: {spills} local loads and stores, {stack} bytes of stack")
    broken += warnings
    if config.kernel == "stored":
        broken += _broken_stored_rules(config, code)
    if config.kernel == "stored_reduce":
        broken += _broken_reduction_rules(config, code)
    if config.dtype != "fp32" and config.kernel in (*PRODUCTS, DECODE):
        broken += _broken_loop_rules(config, loop)
    return tuple(broken)


def _broken_stored_rules(config: Config, lines: list[str]) -> Iterator[str]:
    """16 bytes of codes a load, 16 bytes of W a store, and few instructions a weight between."""
    most = MOST_INSTRUCTIONS.get(config.r)
    if config.variant not in ("nf4", "nested") or config.dtype != "bf16" or most is None:
        return
    for access in ("LDG.E.128", "STG.E.128"):
        if not any(_opcode(line, 3) == access for line in lines):
            yield f"no {access}"
    tiles = config.row
    straight = [line for line in lines if _opcode(line) not in ("NOP", "BRA")]
    found = len(straight) * tiles.warps * 32 / (tiles.BO * tiles.BK)
    allowed = most + 0.4 * (config.variant == "nested") + _MORE_BY_ARCH.get(config.arch, 0.0)
    if found > allowed:
        yield f"{found:.1f} instructions a weight, at most {allowed:.1f}"


def _broken_reduction_rules(config: Config, lines: list[str]) -> Iterator[str]:
    """16 bytes a load of NF4's codes, as of all else but the absmax of each 32."""
    tiles = config.row
    if config.variant != "nf4" or config.dtype not in ("bf16", "fp16"):
        return
    loads = [_opcode(line, 3) for line in lines if _opcode(line) == "LDG"]
    narrow = sum(load != "LDG.E.128" for load in loads)
    allowed = math.ceil(tiles.BO * tiles.BK / (tiles.warps * 32) / 32)
    if narrow > allowed:
        yield f"{narrow} loads of less than 16 bytes, of {allowed} that read an absmax"


def _broken_loop_rules(config: Config, lines: list[str]) -> Iterator[str]:
    loop = collections.Counter(_opcode(line) for line in lines)
    wanted = _TENSOR_CORES.get(config.arch, "HMMA")
    products = [line for line in lines if re.fullmatch(wanted.replace("*", r"\w*"), _opcode(line))]
    # T's own product, of rank BR, is on the tensor cores too; the gradient's T is not in the loop,
    # and that of `two_sided` no product.
    thin = config.kernel != "grad_factors" and config.variant not in ("two_sided", "ragged")
    tiles = config.row
    needed = tiles.BO * tiles.BK * (tiles.BN + thin * padded_rank(config.r))
    done = _multiplications(products, tiles.warps)
    if not products:
        yield f"no {wanted} in the main loop"
    elif config.arch == "sm_100":  # its instructions don't tell their shape
        if len(products) < 1 + thin:
            yield f"one {wanted} in the main loop, for two products"
    elif done != needed:  # more: warps that share a tile of T each make it for themselves
        yield f"{done} multiplications by {wanted} in the main loop, of {needed} in its products"
    if not (loop["LDGSTS"] or loop["UTMALDG"]):
        yield "no asynchronous copy in the main loop"
    if loop["LDG"]:
        yield f"{loop['LDG']} plain global loads in the main loop"


def _planned(config: Config) -> bool:
    """Tell a row that the planner ever chooses: unaligned products it leaves to the BLAS."""
    if config.kernel not in (*PRODUCTS, DECODE):
        return True
    device = next(d for d in devices.DEVICES if d.arch == config.arch)
    dtype, aligned = _dtype_name(config), config.variant != "unaligned"
    of_four_bits = config.kernel == DECODE
    kept, part = ("nf4", "forward") if of_four_bits else (dtype, config.kernel)
    problem = planner.Problem(1, 4096, 4096, config.r, dtype, kept, aligned)
    return getattr(planner.plan(problem, device), part) == planner.FUSED


def _passed_by(config: Config) -> bool:
    """Tell a kernel that the planner passes by, since this Triton miscompiles it."""
    kernel = "forward" if config.kernel == DECODE else config.kernel
    return any(
        kernel in known.kernels and known.concerns(_dtype_name(config))
        for known in versions.miscompiled(triton.__version__, config.arch)
    )


def _dtype_name(config: Config) -> str:
    return str(TYPES[config.dtype]).removeprefix("torch.")


def shared_memory_limit(arch: str) -> int:
    """Bytes a program may use, by the planner's table of devices."""
    return min(d.shared_memory for d in devices.DEVICES if d.arch == arch)


def _occupancy(config: Config, registers: int, shared: int) -> int:
    """Warps a multiprocessor holds at once, by registers and shared memory."""
    limit = shared_memory_limit(config.arch) + 1024
    by_registers = 65536 // (32 * config.row.warps * max(registers, 1))
    by_shared = limit // (shared + 1024)
    most = {"sm_80": 64, "sm_90": 64, "sm_100": 64}.get(config.arch, 48)
    return min(by_registers, by_shared, most // config.row.warps) * config.row.warps


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the gate; 0 where no rule is broken."""
    options = _parse(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: there is no machine code to read under the interpreter")
        return 2
    configs = configurations(options.arch, options.kernel)
    if options.dump is not None:
        options.dump.mkdir(parents=True, exist_ok=True)
    reports = _inspect_all(configs, options.dump, options.jobs)
    print(_table(reports))
    failed = [report for report in reports if report.broken]
    for report in failed:
        for rule in report.broken:
            print(f"BROKEN {report.config.name}: {rule}")
    print(
        f"{len(reports)} configurations on Triton {triton.__version__}: "
        f"{len(reports) - len(failed)} passed, {len(failed)} failed"
    )
    if options.json is not None:
        options.json.write_text(json.dumps([_as_dict(r) for r in reports], indent=1) + "\n")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gate")
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    add("--arch", choices=ARCHITECTURES, help="architectures (all)", **several)
    add("--kernel", choices=tuple(KERNELS), help="kernels (all)", **several)
    add("--json", type=Path, help="write the findings there")
    add("--dump", type=Path, help="write each cubin and ptx into this folder")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    options = parser.parse_args(arguments)
    options.arch = options.arch or ARCHITECTURES
    options.kernel = options.kernel or tuple(KERNELS)
    return options


def _inspect_all(configs: list[Config], dump: Path | None, jobs: int) -> list[Report]:
    work = [(config, dump) for config in configs]
    # Fresh processes: a fork of one that has torch's threads running may hang.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(work))) as pool:
        reports = []
        for report in pool.imap(_inspect_one, work, chunksize=4):
            reports.append(report)
            if sys.stderr.isatty():
                print(f"\r{len(reports)}/{len(work)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return reports


def _inspect_one(work: tuple[Config, Path | None]) -> Report:
    return inspect(*work)


def _table(reports: list[Report]) -> str:
    lines = [
        f"{'configuration':46}{'tile':>13}{'w':>3}{'st':>3}{'reg':>5}{'smem':>8}{'warps':>6}  loop"
    ]
    for report in reports:
        tiles = report.config.row
        loop = {op: n for op, n in report.loop.items() if _is_product(op) or op in _SHOWN}
        mix = " ".join(f"{op}:{n}" for op, n in sorted(loop.items()))
        lines.append(
            f"{report.config.name:46}{f'{tiles.BN}x{tiles.BO}x{tiles.BK}':>13}{tiles.warps:3}"
            f"{tiles.stages:3}{report.registers:5}{report.shared:8}{report.occupancy:5}  {mix}"
        )
    return "\n".join(lines)


_SHOWN = ("LDGSTS", "UTMALDG", "LDG", "LDSM", "LDS", "STS", "STSM", "BAR")


def _as_dict(report: Report) -> dict[str, Any]:
    return {
        "name": report.config.name,
        "triton": triton.__version__,
        "BR": padded_rank(report.config.r),
        **dataclasses.asdict(report),
    }


if __name__ == "__main__":
    sys.exit(main())
