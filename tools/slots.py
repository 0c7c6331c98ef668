"""The slot model: what each kernel's machine code must cost, beside a plain product's of its tiles.

`python -m tools.slots [--arch ARCH ...] [--kernel NAME ...] [--rank R ...] [--tokens N ...]`

Nothing runs. Counted for one pass of a loop by one program, on one of a multiprocessor's four parts
where a unit belongs to it: issue slots; cycles of tensor cores and of the other pipes; wavefronts
of shared memory; bytes from L2. The largest is the bound: no pass is faster, however well latencies
hide. So a bound is a floor, not a time: bank conflicts, latencies, barriers and clocks are left
out, and the ratio of two kernels' floors is what this says. It exits with 1 where a target is
missed. sm_100 is left out: its tensor cores' instructions do not tell their shapes. Where LyCORIS
is installed, a last table has the loops of its LoHa (`tools.loha`) beside.

Rates and sources. Tensor cores: NVIDIA's white papers, dense rates over multiprocessors and clock
(A100 256, H100 512, 4090 64 multiply-adds a clock and part; mma.sync on Hopper reaches 62 % of
wgmma's rate: Luo et al. 2024). Other pipes: CUDA C++ Programming Guide, throughput of native
arithmetic instructions. L2: 5120 bytes a clock on A100 (white paper), taken for Hopper too; 5 TB/s
on a 4090, as measured by others. DRAM: data sheets (A100 80 GB, 4090, H200).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from hut_kernels import devices, planner
from hut_kernels.dispatch import interpreting
from hut_kernels.triton.launch import LaunchConfig
from hut_kernels.triton.tables import launch_config
from tools import gate, loha, plain

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
SIZE = 4096  # in_features and out_features

# Bytes a clock and multiprocessor.
L2 = {"sm_80": 5120 / 108, "sm_89": 15.5, "sm_90": 5120 / 132}
DRAM = {
    "sm_80": 2039e9 / 108 / 1.41e9,
    "sm_89": 1008e9 / 128 / 2.52e9,
    "sm_90": 4800e9 / 132 / 1.755e9,
}
# Cycles of a warp's instruction on its part of a multiprocessor.
_HMMA = {"sm_80": 8.0, "sm_89": 32.0, "sm_90": 6.4}  # 16x8x16 of 16 bits, 16x8x8 of tf32
_HALF = {"sm_80": 2, "sm_89": 2, "sm_90": 1}  # packed bf16
_SINGLE = {"sm_80": 2, "sm_89": 1, "sm_90": 1}
_ALU = frozenset(
    """IADD3 LOP3 ISETP SEL PRMT SHF LEA VIADD IMNMX VIMNMX FSEL FMNMX FSETP PLOP3 MOV P2R R2P IABS
    VABSDIFF BMSK SGXT LOP IADD F2FP VOTE VOTEU PSETP I2FP FCHK HSETP2 HMNMX2 FLO""".split()  # noqa: SIM905
)
_FP32 = frozenset(("FFMA", "FADD", "FMUL"))
_FP16 = frozenset(("HFMA2", "HADD2", "HMUL2"))
_SPECIAL = frozenset(("MUFU", "F2F", "F2I", "I2F", "POPC", "FRND"))


@dataclass(frozen=True)
class Cost:
    """One pass of a program: clocks of each pipe, and bytes from L2.

    Attributes:
        pipes: Clocks by pipe, `l2` and `serial` among them.
        useful: Tensor cycles of the product itself, without T's.
        work: What `slots` and `clocks` are counted for: 16x8x16's of the product itself on a part
            of a multiprocessor, or thousands of weights.
        bytes: Bytes from L2.
        floor: Bytes that none can avoid: W0's (for few tokens, and where bytes bind).
        registers, stack: A thread's.
        resident: Programs on a multiprocessor.
    """

    pipes: dict[str, float]
    useful: float
    work: float
    bytes: float
    floor: float
    registers: int
    stack: int
    resident: int

    @property
    def bound(self) -> float:
        """Clocks of the busiest pipe."""
        return max(self.pipes.values())

    @property
    def by(self) -> str:
        """The busiest pipe."""
        return max(self.pipes, key=lambda pipe: self.pipes[pipe])

    @property
    def slots(self) -> float:
        """Warp instructions for each unit of work."""
        return self.pipes["issue"] / self.work

    @property
    def clocks(self) -> float:
        """The bound for each unit of work, which compares tiles of different sizes."""
        return self.bound / self.work


# Counting


def count(lines: Sequence[str], arch: str, warps: int) -> dict[str, float]:
    """Clocks of each pipe for one pass of `lines`, by a program of `warps` warps."""
    pipes: dict[str, float] = collections.defaultdict(float)
    for line in lines:
        opcode = gate._opcode(line)
        pipes["issue"] += 1
        pipes["tensor"] += _tensor_cycles(line, arch)
        pipes["shared"] += 4 * _wavefronts(line)
        if opcode in _ALU:
            pipes["alu"] += 2
        elif opcode in _FP32:
            pipes["fp32"] += _SINGLE[arch]
        elif opcode == "IMAD":
            pipes["fp32"] += 2
        elif opcode in _FP16:
            pipes["fp16"] += _HALF[arch]
        elif opcode in _SPECIAL:
            pipes["special"] += 8
    return collections.defaultdict(
        float, {pipe: clocks * warps / 4 for pipe, clocks in pipes.items()}
    )


def _bare(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line)


def _tensor_cycles(line: str, arch: str) -> float:
    name = _bare(line).split()[0]
    if shape := re.match(r"HGMMA\.64x(\d+)x\d+", name):
        return int(shape[1]) / 2
    if shape := re.match(r"HMMA\.(16816|1688|1684)", name):
        whole = shape[1] == ("1688" if "TF32" in name else "16816")
        return _HMMA[arch] if whole else _HMMA[arch] / 2
    return 0.0


def _wavefronts(line: str) -> float:
    """128-byte wavefronts of a warp's access, a quarter of them of its warp group's product."""
    if line.startswith("@!PT"):
        return 0.0  # never runs: ptxas fills a slot behind asynchronous copies
    bare = _bare(line)
    name = bare.split()[0]
    opcode = name.split(".")[0]
    if opcode in ("LDSM", "STSM"):
        several = re.search(r"\.(2|4)(\.|$)", name)
        return int(several[1]) if several else 1
    if opcode in ("LDS", "STS", "LDGSTS", "ATOMS"):
        bits = re.search(r"\.(32|64|128)(\.|$)", name)
        return int(bits[1]) // 32 if bits else 1
    if shape := re.match(r"HGMMA\.64x(\d+)x\d+\S*\s+\S+\s+(\S+)", bare):
        left = 16 if shape[2].startswith("gdesc") else 0
        return (int(shape[1]) / 4 + left) / 4
    return 0.0


def _exposed(lines: Sequence[str]) -> int:
    """Instructions issued while none of a warp group's products is under way."""
    flying, exposed = False, 0
    for _ in range(2):  # twice, so that the state at the loop's head is known
        exposed = 0
        for line in lines:
            if gate._opcode(line) == "HGMMA":
                flying = True
            elif re.search(r"WARPGROUP\.DEPBAR.*gsb0, 0x0", line):
                flying = False
            elif not flying:
                exposed += 1
    return exposed


@dataclass(frozen=True)
class Compiled:
    """Machine code, and what it takes of a multiprocessor."""

    code: gate._Code
    registers: int
    stack: int
    resident: int


def read(compiled: Any, arch: str, warps: int) -> Compiled:
    """Disassembles what Triton compiled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        usage = gate._run("cuobjdump", "--dump-resource-usage", file)
        code = gate._instructions(gate._run("nvdisasm", "-c", file))
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    memory = gate.shared_memory_limit(arch) + 1024
    most = {"sm_80": 64, "sm_90": 64}.get(arch, 48) // warps
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = memory // (compiled.metadata.shared + 1024)
    resident = max(1, min(by_registers, by_memory, most))
    return Compiled(code, registers, stack, resident)


def loop_cost(
    compiled: Compiled, arch: str, kernel: str, tiles: LaunchConfig, factor: float
) -> Cost:
    """The main loop of a product, with `factor` bytes beside its operands' for each inner index."""
    lines = gate._main_loop(compiled.code)
    rows, columns, inner = {
        "forward": (tiles.BN, tiles.BO, tiles.BK),
        "grad_input": (tiles.BN, tiles.BK, tiles.BO),
        "grad_factors": (tiles.BO, tiles.BK, tiles.BN),
    }[kernel]
    steps = 1
    products = rows * columns * inner
    done = gate._multiplications(lines, tiles.warps)
    if not factor:  # a plain loop may be unrolled
        steps = max(1, round(done / products))
    pipes = count(lines, arch, tiles.warps)
    operands = 2 * (rows + columns) * inner
    if any("UTMALDG" in line for line in lines):
        pipes["shared"] += steps * operands / 128
    if any(gate._opcode(line) == "HGMMA" for line in lines):
        exposed = _exposed(lines) * tiles.warps / 4
        pipes["serial"] = (pipes["tensor"] + exposed) / compiled.resident
    kinds: dict[bool, float] = collections.defaultdict(float)
    for line in lines:
        if cycles := _tensor_cycles(line, arch):
            kinds["TF32" in line] += cycles * tiles.warps / 4
    share = steps * products / done if done else 0.0
    useful = kinds[False] if kinds[True] and kinds[False] else pipes["tensor"] * min(1.0, share)
    per_pass = {pipe: clocks / steps for pipe, clocks in pipes.items()}
    moved = operands + factor * inner
    per_pass["l2"] = moved / L2[arch]
    return Cost(
        per_pass,
        useful / steps,
        products / (4 * 2048),
        moved,
        2 * columns * inner,
        compiled.registers,
        compiled.stack,
        compiled.resident,
    )


def epilogue_cost(compiled: Compiled, arch: str, tiles: LaunchConfig, r: int) -> float:
    """Clocks of what follows the tokens' loop of `grad_factors`, for a tile of G, in bf16.

    It is what the loop over tiles holds beside that one. Bytes: W0's, the factors', and P's, which
    are read again where a program comes back to its rows. Q's stay in registers.
    """
    code = compiled.code
    main = gate._main_loop(code)
    first = next(a for a, b in code.loops if code.lines[a : b + 1] == main)
    last = first + len(main) - 1
    around = [(b - a, a, b) for a, b in code.loops if a <= first and last <= b]
    _, start, end = sorted(around)[1]
    pipes = count(code.lines[start:first] + code.lines[last + 1 : end + 1], arch, tiles.warps)
    config = gate.Config(arch, "grad_factors", "bf16", r, SIZE, tiles)
    k_splits = gate._splits(config, gate._layer("grad_factors", "plain", "bf16", r, "meta"))[1]
    visits = 1 if k_splits == SIZE // tiles.BK else 2
    moved = 2 * tiles.BO * tiles.BK + 2 * r * (tiles.BO + tiles.BK) + 4 * r * tiles.BO * visits
    return max(*pipes.values(), moved / L2[arch])


def compile_hut(arch: str, kernel: str, r: int, N: int, tiles: LaunchConfig) -> Compiled:
    """A kernel of the package in bf16."""
    config = gate.Config(arch, kernel, "bf16", r, N, tiles)
    return read(gate.compile_config(config), arch, tiles.warps)


@functools.cache
def plain_cost(arch: str, kernel: str, N: int, tiles: LaunchConfig) -> Cost:
    """The better operand order of the plain product of these tiles."""
    gate._switch_to(arch)
    costs = []
    for w_first in (True, False) if kernel != "grad_factors" else (False,):
        columns = tiles.BO if kernel == "forward" else tiles.BK
        if arch == "sm_90" and (columns if w_first else tiles.BN) < 64 and kernel != "grad_factors":
            continue  # wgmma takes no left operand of fewer rows
        compiled = plain.compile_product(kernel, tiles, N, SIZE, w_first)
        costs.append(loop_cost(read(compiled, arch, tiles.warps), arch, kernel, tiles, 0))
    return min(costs, key=lambda cost: cost.bound)


@dataclass(frozen=True)
class Bytes:
    """A kernel that bytes bind: the cost of a tile, and bytes from L2 and to it for each weight.

    Attributes:
        cost: The tile's cost.
        moved: Bytes for each weight of a tile.
        least: Those that none can avoid: a copy's, or G's and W0's.
        around: Bytes for each weight that a program moves once a block of G: its tile of d hut_A's
            partial sums, added to in memory and read by their sum, and of hut_A.
    """

    cost: Cost
    moved: float
    least: float
    around: float = 0.0


def bytes_cost(arch: str, kernel: str, r: int) -> Bytes:
    """The kernels that bytes bind, for a tile: the weight's, and the reduction of G.

    A pass of the reduction's loop moves G, W0, a tile of hut_B, and one of P, which is written and
    read again by the sum of partials.
    """
    config = gate.Config(
        arch, kernel, "bf16", r, SIZE, launch_config(kernel, arch, SIZE, r, "bf16")
    )
    tiles, compiled = config.row, gate.compile_config(config)
    item = 2 if compiled.src.signature["p_a"] == "*bf16" else 4
    code = read(compiled, arch, tiles.warps)
    elements = tiles.BO * tiles.BK
    around = 0.0
    if kernel == "weight":
        end = max(n for n, line in enumerate(code.code.lines) if gate._opcode(line) == "EXIT")
        lines, least = code.code.lines[: end + 1], 4.0
        moved = least + item * r * (1 / tiles.BO + 1 / tiles.BK)
    else:
        loops = [code.code.lines[a : b + 1] for a, b in code.code.loops]
        most = max(map(gate._products, loops))
        lines, least = min((one for one in loops if gate._products(one) == most), key=len), 6.0
        device = next(d for d in devices.DEVICES if d.arch == arch)
        rows = min(SIZE, planner._chunk_rows(SIZE, device))
        layer = gate._layer(kernel, "plain", "bf16", r, "meta")
        o_splits, k_splits = gate._splits(config, layer, rows)
        visits = 1 if k_splits == SIZE // tiles.BK else 2
        moved = least + item * r / tiles.BK + 4 * r * (visits / tiles.BK + k_splits / SIZE)
        down = rows // o_splits  # the rows of a block that a program goes down
        around = (item + 8) * r / down + 4 * r * o_splits / SIZE
    pipes = count(lines, arch, tiles.warps)
    pipes["l2"] = moved * elements / L2[arch]
    left = code.registers, code.stack, code.resident
    cost = Cost(dict(pipes), 0.0, elements / 4000, moved * elements, least * elements, *left)
    return Bytes(cost, moved, least, around)


# The table


@dataclass(frozen=True)
class Line:
    """A cell of the launch tables: its loop beside the plain product's.

    Attributes:
        name: Architecture, kernel, rank, tokens.
        tiles: The launch config.
        hut, plain: The two loops.
        missed: Targets that it misses, in words.
        epilogue: Clocks behind the loop of `grad_factors`, over the loop's at its break-even.
    """

    name: str
    tiles: LaunchConfig
    hut: Cost
    plain: Cost
    missed: tuple[str, ...]
    epilogue: float = 0.0


def line(arch: str, kernel: str, r: int, N: int) -> Line:
    """Compiles a cell of the launch tables and its plain product, and judges it."""
    tiles = launch_config(kernel, arch, N, r, "bf16")
    moves = kernel != "grad_factors"
    rounded = N > 16 or r > 16  # as `launch.moving_factor` has it
    compiled = compile_hut(arch, kernel, r, N, tiles)
    hut = loop_cost(compiled, arch, kernel, tiles, moves * r * (2.0 if rounded else 4.0))
    peer = plain_cost(arch, kernel, N, tiles)
    missed = list(_missed(arch, kernel, r, N, hut, peer))
    epilogue = 0.0
    even = devices.BREAK_EVENS[arch].tokens(kernel, r)
    if kernel == "grad_factors" and even:
        epilogue = epilogue_cost(compiled, arch, tiles, r) / (hut.bound * even / tiles.BN)
        if epilogue > EPILOGUE:
            missed.append(f"epilogue {epilogue:.2f} of the loop, at most {EPILOGUE}")
    return Line(f"{arch} {kernel} r{r} N{N}", tiles, hut, peer, tuple(missed), epilogue)


# The largest ratio of bounds, HUT's over plain's, beyond 128 tokens; by rank.
BOUND = {
    "sm_80": {16: 1.13, 64: 1.6},
    "sm_89": {16: 1.13, 64: 1.6},
    "sm_90": {16: 1.05, 64: 1.2},
}
SLOTS = {"sm_80": 1.25, "sm_89": 1.25}  # the largest ratio of issue slots, at rank 16
EPILOGUE = 0.25  # the largest part of the loop of `grad_factors`, at its break-even
FEW = 1.0  # the largest ratio of the bound to W0's time from DRAM, up to 16 tokens and rank 64


def _missed(arch: str, kernel: str, r: int, N: int, hut: Cost, peer: Cost) -> Iterator[str]:
    if kernel == "grad_factors":
        return
    ratio = hut.bound / peer.bound
    if N > 128 and ratio > (most := BOUND[arch].get(r, float("inf"))):
        yield f"bound {ratio:.2f} of a plain product's, at most {most}"
    slots = hut.slots / peer.slots
    if N > 128 and r == 16 and slots > (most := SLOTS.get(arch, float("inf"))):
        yield f"issue slots {slots:.2f} of a plain product's, at most {most}"
    dram = hut.bound / (hut.floor / DRAM[arch])
    if N <= 16 and r <= 64 and dram > FEW:
        yield f"bound {dram:.2f} of W0's time from DRAM, at most {FEW}"


# The most bytes of the weight kernel over a copy's; of a pass of the reduction's loop, the most of
# its bound over its floor's, and bytes.
COPY = {16: 1.25, 64: 1.8}
REDUCE = {16: 1.25, 64: 1.9}
REDUCE_BYTES = {16: 7.5, 64: 12.0}


def bytes_line(arch: str, kernel: str, r: int) -> tuple[str, list[str]]:
    """A line of the second table, and the targets that it misses."""
    found = bytes_cost(arch, kernel, r)
    cost, ratio = found.cost, found.moved / found.least
    bound = cost.bound / (cost.floor / L2[arch])
    name = f"{arch} {kernel} r{r}"
    missed = []
    if kernel == "weight" and ratio > (most := COPY.get(r, float("inf"))):
        missed.append(f"{ratio:.2f} of a copy's bytes, at most {most}")
    if kernel == "grad_reduce" and arch == "sm_90":
        if bound > (most := REDUCE.get(r, float("inf"))):
            missed.append(f"bound {bound:.2f} of its floor, at most {most}")
        if found.moved > (most := REDUCE_BYTES.get(r, float("inf"))):
            missed.append(f"{found.moved:.2f} bytes a weight, at most {most}")
    text = (
        f"{name:31}{cost.slots:8.0f} slots a thousand, {found.moved:5.2f} bytes a weight "
        f"({ratio:.2f} of the least), bound {bound:.2f} of the floor by {cost.by}"
        + (f"; {found.around:.2f} bytes a weight around the loop" if found.around else "")
    )
    return text, [f"MISSED {name}: {one}" for one in missed]


# The largest ratio of clocks, HUT's loop over LyCORIS's, at rank 16 and 4096 tokens.
LOHA = {"sm_80": 1.0, "sm_90": 1.0}


def loha_line(found: Line, arch: str, kernel: str) -> tuple[str, list[str]]:
    """A line of the last table, beside the leanest of LyCORIS's tiles, and the target it misses."""
    costs = []
    for its in loha.TILES[kernel]:
        tiles = its.named(kernel)
        whole = read(loha.compile_kernel(arch, kernel, its, 4096, SIZE, 16), arch, its.warps)
        compiled = dataclasses.replace(whole, code=loha.only_loop(whole.code, kernel))
        extra = loha.extra_bytes(kernel, its, 16)
        costs.append((loop_cost(compiled, arch, kernel, tiles, extra), tiles))
    peer, tiles = min(costs, key=lambda one: one[0].clocks)
    hut, ratio = found.hut, found.hut.clocks / peer.clocks
    text = (
        f"{found.name:31}{_cell(found.tiles):>20}{_cell(tiles):>20}{peer.stack:7} |"
        f"{hut.slots:6.2f}{peer.slots:6.2f} |{hut.clocks:7.2f} {hut.by:7}{peer.clocks:6.2f} "
        f"{peer.by:7}{ratio:6.2f}"
    )
    missed = []
    if ratio > (most := LOHA[arch]):
        missed.append(f"MISSED {found.name}: {ratio:.2f} of LyCORIS's clocks, at most {most}")
    return text, missed


LOHA_HEADER = (
    f"{f'beside LyCORIS {loha.VERSION}':31}{'tile/warps/stages':>20}{'its':>20}{'stack':>7} |"
    f"{'slots':>6}{'its':>6} |{'clocks':>7} {'by':7}{'its':>6} {'by':7}{'ratio':>6}"
)
HEADER = (
    f"{'cell':31}{'tile/warps/stages':>20} {'progs':>5} |{'slots':>6}{'plain':>7}{'ratio':>6} |"
    f"{'tensor':>7}{'issue':>6}{'shared':>7}{'L2':>6}{'serial':>7} |{'bound':>6} {'by':7}"
    f"{'plain':>6}{'ratio':>6}{'DRAM':>6}"
)


def show(line: Line, arch: str) -> str:
    """A line of the table."""
    hut, peer, pipes = line.hut, line.plain, line.hut.pipes
    return (
        f"{line.name:31}{_cell(line.tiles):>20} {hut.resident:5} |{hut.slots:6.2f}{peer.slots:7.2f}"
        f"{hut.slots / peer.slots:6.2f} |{pipes['tensor']:7.0f}{pipes['issue']:6.0f}"
        f"{pipes['shared']:7.0f}{pipes['l2']:6.0f}{pipes.get('serial', 0.0):7.0f} |"
        f"{hut.bound:6.0f} {hut.by:7}{peer.bound:6.0f}{hut.bound / peer.bound:6.2f}"
        f"{hut.bound / (hut.floor / DRAM[arch]):6.2f}"
        + (f"  epilogue {line.epilogue:.2f}" if line.epilogue else "")
    )


def _cell(tiles: LaunchConfig) -> str:
    return f"{tiles.BN}x{tiles.BO}x{tiles.BK}/{tiles.warps}/{tiles.stages}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tools.slots")
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--arch", choices=ARCHITECTURES, **several)
    bound_by_bytes = ("weight", "grad_reduce")
    parser.add_argument("--kernel", choices=(*gate.PRODUCTS, *bound_by_bytes), **several)
    parser.add_argument("--rank", type=int, choices=gate.RANKS, **several)
    parser.add_argument("--tokens", type=int, choices=gate.TOKENS, **several)
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: there is no machine code to read under the interpreter")
        return 2
    print(HEADER)
    missed, beside = [], []
    for arch in options.arch or ARCHITECTURES:
        for kernel in options.kernel or (*gate.PRODUCTS, *bound_by_bytes):
            if kernel in bound_by_bytes:
                for r in options.rank or (16, 64):
                    text, found_missed = bytes_line(arch, kernel, r)
                    print(text, flush=True)
                    missed += found_missed
                continue
            for N in options.tokens or (16, 4096):
                if kernel == "grad_factors" and N != 4096:
                    continue  # it has the same tiles for any number of tokens
                for r in options.rank or (16, 64):
                    found = line(arch, kernel, r, N)
                    print(show(found, arch), flush=True)
                    missed += [f"MISSED {found.name}: {what}" for what in found.missed]
                    if arch in LOHA and r == 16 and N == 4096:
                        beside.append((found, arch, kernel))
    if beside and not loha.installed():
        print(loha.MISSING)
    elif beside:
        print(LOHA_HEADER)
        for cell in beside:
            text, found_missed = loha_line(*cell)
            print(text, flush=True)
            missed += found_missed
    print("\n".join([*missed, f"Triton {triton.__version__}: {len(missed)} targets missed"]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
