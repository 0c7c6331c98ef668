"""From shape, types and device limits to a plan: which strategy runs each part. Pure, printable.

The cost model is that of docs/performance.md: a full product is `2 N O K` operations; forward is
one, backward two. `fused` makes W tile by tile inside the product and stores nothing; `staged`
materializes W for cuBLAS; `chunked` takes G from cuBLAS a block of rows at a time.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .devices import DRAM, RANKS, TOKENS, Device, break_even

FUSED, STAGED, CHUNKED = "fused", "staged", "chunked"
PARTS = ("forward", "grad_input", "grad_factors")

MAX_RANK = 128  # the largest r with kernels of its own
# Kernels count tokens, and index * r for the groups, in int32; a last tile may reach over the end.
_MAX_INDEX = 2**31 - 1024
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Bytes a weight of the stored formats (of four bits, in blocks of 64 with a float32 absmax each).
STORED_BYTES = {"nf4": 0.5625, "fp4": 0.5625, "int8": 1.0}
# Machine instructions a weight of four bits in the loop of the fused forward, as `make gate` counts
# them at r 16 (7.4 on sm_90), and how many a multiprocessor issues in a clock, a thread's each.
_DECODING, _ISSUE = 10.3, 128


class Problem(NamedTuple):
    """One call: sizes, types, options.

    Attributes:
        N, K, O, r: Tokens, in_features, out_features, rank.
        dtype: The compute type, `"bfloat16"` and the like.
        weight_dtype: W0's type, or the format in which it is stored.
        aligned: Whether pointers and strides are multiples of 16 elements, so that loads can be
            asynchronous copies; of a quantized W0, whether a thread's codes share one absmax.
        transform: `"low_rank"` or `"two_sided"`.
        precision: `"merged"` or `"split"`.
        experts: The experts of a stack, N rows in all; 0 for a layer.
    """

    N: int
    K: int
    O: int
    r: int
    dtype: str
    weight_dtype: str
    aligned: bool = True
    transform: str = "low_rank"
    precision: str = "merged"
    experts: int = 0

    @property
    def row(self) -> tuple[object, ...]:
        """The types, transform and classes of N and r, by which launch configs are chosen."""
        tokens, rank = bisect.bisect_left(TOKENS, self.N), bisect.bisect_left(RANKS, self.r)
        return self.dtype, self.weight_dtype, self.transform, tokens, rank

    @property
    def stored(self) -> bool:
        """True where W0 is quantized: the kernels that write W, and reduce G, read it as it is."""
        return self.weight_dtype not in _BYTES

    @property
    def weight_bytes(self) -> int:
        """Bytes of W0."""
        format_ = self.weight_dtype.removesuffix("_repacked")
        return round(self.layers * self.O * self.K * (_BYTES | STORED_BYTES)[format_])

    @property
    def partial_bytes(self) -> int:
        """Bytes that partial sums of a weight's factor gradients may take: a quarter over W0's.

        W0 dense; a staged W takes as much. In W0's own bytes a bf16 weight of rank 64 would have no
        room for one of d hut_B for each tile of columns, and more than two of d hut_A.
        """
        return self.O * self.K * _BYTES[self.dtype if self.stored else self.weight_dtype] * 5 // 4

    @property
    def layers(self) -> int:
        """Weights that the call has: one for each expert."""
        return max(1, self.experts)


@dataclass(frozen=True)
class Plan:
    """A plan: the strategy and backend of each part, and its costs.

    Attributes:
        problem: What was asked.
        device: Where.
        backend: `"torch"`, `"triton"` or `"cuda"`: of the parts that are not `compiled`.
        forward: `"fused"` or `"staged"`.
        grad_input: `"fused"` or `"staged"`.
        grad_factors: `"fused"` or `"chunked"`.
        chunk: Rows of G made at a time by `chunked`.
        source: Whether the break-evens behind the choice are measured.
        compiled: The parts that go to the extension, beside a backend of another name.
    """

    problem: Problem
    device: Device
    backend: str
    forward: str
    grad_input: str
    grad_factors: str
    chunk: int
    source: str
    compiled: tuple[str, ...] = ()

    def backend_of(self, part: str) -> str:
        """The backend that runs a part: `"torch"`, `"triton"` or `"cuda"`."""
        return "cuda" if part in self.compiled else self.backend

    @property
    def operations(self) -> dict[str, int]:
        """Operations of each part's matrix products, thin ones included, as FlopCounterMode counts.

        The multiplications that form a `two_sided` T are elementwise, and not among them.
        """
        p = self.problem
        product = 2 * p.N * p.O * p.K
        multiplier = 2 * p.layers * p.O * p.K * (p.r if p.transform == "low_rank" else 0)
        products = 2 if p.precision == "split" else 1
        return {
            "forward": products * product + multiplier,
            "grad_input": products * product + multiplier,
            "grad_factors": product + 2 * multiplier,
        }

    @property
    def bytes(self) -> dict[str, int]:
        """The fewest bytes each part moves: everything read once and written once."""
        p, item = self.problem, _BYTES[self.problem.dtype]
        weight = p.weight_bytes
        factors = 4 * p.layers * p.r * (p.O + p.K)
        activations = p.N * (p.O + p.K) * item
        staging = (
            2 * p.layers * p.O * p.K * item
        )  # written by the weight kernel, read by the product
        twice = weight if p.precision == "split" else 0
        forward = grad_input = weight + twice + factors + activations
        return {
            "forward": forward + (staging if self.forward == STAGED else 0),
            "grad_input": grad_input + (staging if self.grad_input == STAGED else 0),
            "grad_factors": weight + 2 * factors + activations,
        }

    @property
    def workspace(self) -> dict[str, int]:
        """Bytes alive during each part beyond inputs and outputs."""
        p = self.problem
        staged = group_size(p.experts, self.device.arch) if p.experts else 1
        staging = staged * p.O * p.K * _BYTES[p.dtype]
        partials = staged * p.partial_bytes if self.backend != "torch" else 0
        chunk = min(self.chunk, p.O) * p.K * 4 if self.grad_factors == CHUNKED else 0
        if p.experts and self.backend == "triton":
            chunk = staging  # of fewer experts where G is wider than W
        return {
            "forward": staging if self.forward == STAGED else 0,
            "grad_input": staging if self.grad_input == STAGED else 0,
            "grad_factors": chunk + partials,
        }

    @property
    def reason(self) -> str:
        """The reason why a quantized W0 is fused or staged in forward; empty of a dense one."""
        p = self.problem
        if not p.stored or p.experts or self.backend != "triton":
            return ""
        if self.forward == STAGED:
            return f"staged, for {_why_staged(p, self.device) or 'it is forced'}"
        codes = STORED_BYTES[p.weight_dtype]
        moved = f"fused, {codes:.2f} bytes a weight instead of {codes + 4:.2f}"
        rate = DRAM.get(self.device.arch)
        if rate is None:
            return moved
        if codes / rate >= _DECODING / _ISSUE:
            return f"{moved}; bound by memory (estimate)"
        return f"{moved}; bound by instructions (estimate): beside 16 bits it saves memory only"

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"HUT {p.transform}, r = {p.r}, {p.precision}, {p.dtype} over {p.weight_dtype}: "
            f"{p.N} tokens, {p.K} -> {p.O}" + (f", {p.experts} experts" if p.experts else ""),
            f"on {self.device.name} ({self.device.arch}), backend {self.backend}; "
            f"break-evens: {self.source}",
            *(str(one) for one in self.device.miscompiles if one.concerns(self.problem.dtype)),
            *(str(one) for one in self.device.misfits if one.row == self.problem.row),
            *([f"over {p.weight_dtype}: forward {self.reason}"] if self.reason else []),
            f"{'':14}{'backend':9}{'strategy':10}{'GFLOP':>10}{'MB moved':>10}{'MB workspace':>14}",
        ]  # fmt: skip
        operations, moved, workspace = self.operations, self.bytes, self.workspace
        for part in PARTS:
            bound = "up to " if part == "grad_factors" and self.backend != "torch" else ""
            space = f"{bound}{workspace[part] / 1e6:.2f}"
            lines.append(
                f"{part:14}{self.backend_of(part):9}{getattr(self, part):10}"
                f"{operations[part] / 1e9:10.3f}{moved[part] / 1e6:10.2f}{space:>14}"
            )
        return "\n".join(lines)


_forced: dict[str, str] = {}


@contextlib.contextmanager
def force(**strategies: str) -> Iterator[None]:
    """Within the block, every plan takes these strategies where they are possible at all.

    For benchmarks and tests: `with force(forward="fused", grad_factors="chunked"): ...`. A kernel
    that is denied runs too: how else would one see that Triton compiles it rightly again?
    """
    allowed = {"forward": STAGED, "grad_input": STAGED, "grad_factors": CHUNKED}
    for part, strategy in strategies.items():
        if part not in allowed or strategy not in (FUSED, allowed[part]):
            raise ValueError(
                f"cannot force {part}={strategy!r}; parts and strategies: {allowed} or fused"
            )
    before = dict(_forced)
    _forced.update(strategies)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def plan(problem: Problem, device: Device, backend: str = "triton") -> Plan:
    """The plan for a problem on a device; the same arguments always give the same plan.

    Args:
        problem: What is asked.
        device: Where.
        backend: As in `dispatch.choose`.
    """
    if _forced:
        made = _plan(problem, device, "triton" if backend == "auto" else backend)
        return _with_forced(made, tuple(_forced.items()))
    return _plan(problem, device, backend)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, device: Device, backend: str) -> Plan:
    if backend == "auto":
        made = _plan(problem, device, "triton")
        return made if problem.stored or problem.experts else _with_extension(made)
    empty = 0 in (problem.N, problem.K, problem.O)
    if backend == "cuda" and not (empty or problem.experts):
        rows = _chunk_rows(problem.K, device)
        return Plan(problem, device, "cuda", STAGED, STAGED, CHUNKED, rows, "not needed")
    index = max(problem.N, max(problem.K, problem.O) * problem.r)
    # What a CPU's evaluation made of a weight is read by PyTorch only, wherever it is moved to.
    repacked = problem.weight_dtype.endswith("_repacked")
    unsupported = problem.r > MAX_RANK or index >= _MAX_INDEX or repacked
    # What the staged parts run on: without these nothing of Triton is left.
    staging = ("stored", "stored_reduce") if problem.stored else ("weight", "grad_reduce")
    for kernel in staging:
        unsupported |= not device.holds(kernel, problem.row)
    one_by_one = problem.experts and backend != "triton"
    if backend == "torch" or unsupported or empty or one_by_one:
        rows = max(1, (1 << 22) // max(1, problem.K))
        return Plan(problem, device, "torch", STAGED, STAGED, CHUNKED, rows, "not needed")
    if problem.experts:  # the grouped GEMM's, with W and G of a group at a time
        return Plan(problem, device, backend, STAGED, STAGED, CHUNKED, problem.O, "not needed")
    even = break_even(device)
    # Unaligned loads are not asynchronous, and split is two products: both go to cuBLAS.
    # For few tokens a stored W0 is read in the product's loop; more would look it up for each tile.
    decodes = problem.stored and not _why_staged(problem, device)
    whole = problem.aligned and not problem.stored
    fusible = whole and problem.precision == "merged"

    def fuses(part: str, possible: bool) -> bool:
        runs = device.holds(part, problem.row) and not device.denies(part, problem.dtype)
        return possible and runs and problem.N <= even.tokens(part, problem.r)

    return Plan(
        problem,
        device,
        backend,
        FUSED if decodes or fuses("forward", fusible) else STAGED,
        FUSED if fuses("grad_input", fusible) else STAGED,
        FUSED if fuses("grad_factors", whole) else CHUNKED,
        _chunk_rows(problem.K, device),
        even.source,
    )


def _why_staged(problem: Problem, device: Device) -> str:
    """The reason against a fused forward over a quantized W0, in words; empty where none is."""
    if problem.weight_dtype not in ("nf4", "fp4"):
        return "only four bits are looked up in the product's loop"
    if problem.N > TOKENS[0]:
        return f"it is more than {TOKENS[0]} tokens"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"weights are looked up in pairs of 16 bits, not in {problem.dtype}"
    if problem.precision == "split":
        return "split is two products"
    if not problem.aligned:
        return "loads are not asynchronous (double quantization, blocks across rows, addresses)"
    if device.denies("forward", problem.dtype):
        return "this Triton is not trusted with the fused kernel"
    if not device.holds("stored_forward", problem.row):
        return "the fused kernel does not fit this device"
    return ""


@functools.lru_cache(maxsize=4096)
def _with_forced(made: Plan, forced: tuple[tuple[str, str], ...]) -> Plan:
    if made.backend != "triton":
        return made
    if made.problem.stored:  # it has a choice in forward only, and not to be fused where it cannot
        staged = dict(forced).get("forward") == STAGED
        return dataclasses.replace(made, forward=STAGED, source="forced") if staged else made
    held = made.device.holds
    wanted = {part: how for part, how in forced if how != FUSED or held(part, made.problem.row)}
    split = made.problem.precision == "split"
    return dataclasses.replace(
        made,
        forward=made.forward if split else wanted.get("forward", made.forward),
        grad_input=made.grad_input if split else wanted.get("grad_input", made.grad_input),
        grad_factors=wanted.get("grad_factors", made.grad_factors),
        source="forced",
    )


def _with_extension(made: Plan) -> Plan:
    """Triton's plan, except for the parts that the extension is faster at."""
    compiled = tuple(part for part in PARTS if extension_wins(part, made))
    of_extension = _plan(made.problem, made.device, "cuda")
    if compiled == PARTS:
        return of_extension
    strategies = {part: getattr(of_extension, part) for part in compiled}
    return dataclasses.replace(made, compiled=compiled, **strategies)


def group_size(experts: int, arch: str) -> int:
    """Experts that are staged together: one on a CPU, a quarter of the stack on a GPU."""
    return 1 if arch == "cpu" else max(1, experts // 4)


def _chunk_rows(columns: int, device: Device) -> int:
    """Rows of G, float32, that take at most half of L2, and whole waves of the BLAS's tiles.

    Its tiles are taken to be 128 x 256; a wave is one for each multiprocessor.
    """
    most = device.l2 // 2 // max(1, 4 * columns) // 128
    across = max(1, -(-columns // 256))
    waves = most * across // device.sms
    return 128 * max(1, waves * device.sms // across if waves else most)


# Weights of a layer up to which a call takes longer to launch than to run, so that the extension's
# short way to the device decides. An estimate: about 10 us on an H100 at 512 tokens.
LAUNCH_BOUND = 1 << 21


def launch_bound(O: int, K: int) -> bool:
    """True where a layer is so small that the extension gets it, whatever Triton's plan is."""
    return not _forced and O * K <= LAUNCH_BOUND  # strategies by name are Triton's


def extension_wins(part: str, made: Plan) -> bool:
    """True where the extension is expected to be faster at a part than Triton's plan.

    Where Triton too would go through a workspace and cuBLAS, or has no kernel, the extension does
    the same with less to launch; where Triton's fused kernels save device time, they keep the
    layers that are large enough to show it.
    """
    bound = launch_bound(made.problem.O, made.problem.K)
    return bound or (not _forced and getattr(made, part) != FUSED)


_REDUCED_TILE = 64  # rows or columns of G whose sums a block of the extension's reduction makes
_RESIDENT = 3  # of its blocks on a multiprocessor at once


def reduction_splits(
    rows: int, columns: int, r: int, weight_item: int, device: Device
) -> tuple[int, int, int]:
    """Divides the extension's reduction of G, `[rows, columns]` as W0 is stored.

    A block sums a tile of rows (of columns) over one split of the columns (of the rows). As many
    splits as fill the device, while the partial sums stay within a quarter of W0's bytes.

    Returns:
        Rows of G at a time; splits for the sums of rows; splits for the sums of columns.
    """
    chunk = _chunk_rows(columns, device)
    row_tiles, column_tiles = -(-min(chunk, rows) // _REDUCED_TILE), -(-columns // _REDUCED_TILE)
    filling = -(-_RESIDENT * device.sms // max(1, row_tiles + column_tiles))
    affordable = 1 + rows * columns * weight_item // 4 // (4 * r * max(1, rows + columns))
    splits = max(1, min(filling, affordable))
    return chunk, max(1, min(splits, column_tiles)), max(1, min(splits, row_tiles))
