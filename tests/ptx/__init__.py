"""Runs the PTX that Triton compiles, on the CPU: what the code computes, and what it may not do.

`make ptx` runs every kernel of the package here. A kernel of your own, on CPU tensors:

    from tests.ptx import executing

    with executing(90) as log:          # sm_90; 80, 89, 100 and 120 are known, too
        kernel[(8,)](x, y, N, BLOCK=64)  # a launch as on a GPU; no GPU, no ptxas
    print(log.launches)

`y` then holds what the compiled code computes. The launch raises a `Fault` where that code does
what it may not (each with kernel, block, line of PTX and line of Python):

- an access out of a tensor's bounds (each tensor's own), off its alignment, or between the rows of
  a view; a read of memory that nobody wrote (NaN in a tensor counts as that: `torch.full_like(y,
  nan)` makes an output whose every element must be written before it is read);
- two threads at one address, one of them writing, with no barrier between; two blocks at one;
- what is asynchronous (cp.async, TMA, wgmma, tcgen05) used, or its operands overwritten, before the
  wait for it; a missing commit, proxy fence, `wgmma.fence`, `tcgen05.wait`; a wait without end;
- a barrier that not all threads reach, a division by zero.

An `Unsupported` is a form of instruction that the executor does not know. Its handler belongs into
`ampere` (`hopper`, `blackwell` for what only sm_90 or sm_100 has), where each is a few lines:

    @handles("popc.b32")                # all opcodes that begin so; the longest beginning wins
    def _count(b: Block, i: Instruction, mask: Mask) -> None:
        d, x = i.operands
        b.write(d, np.bitwise_count(b.read(x, "u32")).astype(np.uint32), mask)

For the product's operators, `cases.Call` makes inputs, plans for an architecture, runs and compares
with float64: a line in `cases.calls` is a test of `make ptx` on all architectures. Compiled PTX is
kept in `build/ptx` (or `HUT_PTX_CACHE`), by source and options.

Not modeled: ptxas (register allocation, its own scheduling), the rounding inside a tensor core (a
product is exact, its sum rounded to float32 once), branches within a warp, clusters, warp
specialization, atomics, time. docs/reliability.md says what that leaves open.
"""

from .launch import Launch, Log, executing
from .machine import Program, Unsupported
from .memory import Fault
from .parse import parse

__all__ = ["Fault", "Launch", "Log", "Program", "Unsupported", "executing", "parse"]
