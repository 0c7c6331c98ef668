"""Launch tables: which tiles, warps and pipeline stages, a line for each architecture's kernels.

A cell reads `BNxBOxBK/warps/stages`: tile sizes over tokens, out_features and in_features. `W`
behind it means that the weight tile is the left operand of the product, `A` that the wgmma's must
be kept asynchronous (`tiles.keep_wgmma_async`), `T` that the warps of T's product are arranged by
its own shape (`tiles.unchain`), `R` that a thread may take all 255 registers, where ptxas would
rather spill a few bytes and have more programs at once. The columns are r up to 16, 32, 64 and 128;
the lines are for up to 16 tokens, up to 64, up to 128, and more. `16-bit` is bf16 and fp16, `fp32`
is ieee.

The cells are meant to be the largest tiles that pass the gate (no spills, asynchronous copies, the
right tensor core) with every Triton from 3.6 to 3.9. None is measured on a GPU yet. What surprises:

- sm_90 and sm_100 load through tensor descriptors (TMA), the others through pointers (cp.async).
- sm_90 and sm_100 have no tensor-core product with fewer than 64 rows on its left side. With few
  tokens the weight is put there (`W`); sm_100's dx, whose weight stands on the right, pads to 64.
- `W` is taken elsewhere too: T's accumulator is then the left operand as it lies in registers. On
  sm_80 and sm_89 dx cannot take it: a W0 that is transposed there has no asynchronous copy.
- Without `T` the warps of T's product are arranged as those of the large one, by its rows. Where T
  has fewer (dx with 128 tokens and 32 rows of W), several make the same; the cells are such that
  none does. With it dx takes 256 tokens at a time on mma.sync, in a tile as forward's.
- fp32 (ieee) products run on the CUDA cores, where a large tile only spills.
- fp16 decides many cells of its line: its factors stay float32, twice the memory of bf16's.
- Past r = 64 the tiles shrink because A's, `[r, BK]` in float32, takes most of the shared memory.
- A float32 W0, and the ragged groups of `two_sided`, whose factors are gathered for each weight,
  need more than the plain case: such a call takes its `low_smem` config.
- A transposed W0 has no line: its y is dx's kernel over the transposed layer, and its dx is y's.
- grad_reduce has no tile of tokens: its first number is how many of the r it sums at a time, with
  their d hut_A in registers. It reads G again for each further piece.
- stored_reduce is grad_reduce over a quantized W0: a thread takes 32 codes, or several the same.
- grad_factors sums r in pieces too (`launch.REDUCTION_RANK`), behind its loop; in bf16, whose H0 is
  rounded, up to r = 64 at once.
"""

from __future__ import annotations

import dataclasses
import functools

from ..devices import RANKS, TOKENS
from .launch import LaunchConfig

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

_TABLE = """
sm_80
stored_forward 16   16-bit  16x64x128/4/4/W  16x64x128/4/4/W  16x64x64/4/4/W   16x64x64/4/3/W
forward       16    bf16    16x64x128/4/4/W  16x64x128/4/4/W  16x128x64/4/4/W  16x128x64/4/4/W
forward       16    fp16    16x64x128/4/4/W  16x64x128/4/4/W  16x64x64/4/4/W   16x64x64/4/3/W
forward       64    16-bit  64x64x64/4/4/W   64x64x64/4/4/W   64x64x64/4/3/W   64x64x32/4/4/W
forward       128   bf16    128x128x32/4/3   128x128x32/4/3   128x128x32/4/3   128x128x32/4/3
forward       128+  fp16    128x128x32/8/4/W 128x128x32/8/4/W 128x128x32/8/4/W 128x128x32/8/3/W
forward       more  bf16    256x128x32/8/3   256x128x32/8/3   256x128x32/8/3   256x128x32/8/3
forward       16    tf32    16x64x128/4/4/W  16x64x128/4/3/W  16x64x64/4/4/W   16x64x64/4/3/W
forward       64    tf32    64x64x64/4/4/W   64x64x64/4/4/W   64x64x64/4/3/W   64x64x32/4/4/W
forward       128+  tf32    128x128x32/8/4/W 128x128x32/8/4/W 128x128x32/8/3/W 128x64x32/4/3/W
grad_input    16    16-bit  16x64x128/4/4    16x64x128/4/4    16x64x128/4/4    16x32x128/4/3
grad_input    64    16-bit  64x32x128/4/4    64x32x128/4/4    64x32x128/4/4    64x32x128/4/2
grad_input    128   bf16    128x32x256/8/3   128x32x256/8/3   128x32x256/8/3   128x32x256/8/3
grad_input    128   fp16    128x32x256/8/3   128x32x256/8/3   128x32x256/8/2   64x32x128/4/2
grad_input    more  bf16    256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/3/T
grad_input    more  fp16    256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/2/T
grad_input    16    tf32    16x64x128/4/4    16x64x128/4/3/R  16x32x128/4/4    16x32x128/4/3
grad_input    64+   tf32    64x32x128/4/4    64x32x128/4/4    64x32x128/4/3    64x32x128/4/2
grad_factors  any   16-bit  32x128x128/8/4   32x128x128/8/4   32x128x64/8/4    32x128x64/8/4
grad_factors  any   tf32    32x128x64/8/3    32x128x64/8/3    32x128x64/8/3    32x128x64/8/3
grad_reduce   any   bf16    16x32x64/4/1/R   32x32x64/4/1     64x32x64/4/1     64x32x64/4/1
grad_reduce   any   fp16    16x32x64/4/1     16x32x64/4/1     16x32x64/4/1/R   16x32x64/4/1
grad_reduce   any   tf32    16x32x64/4/1     16x32x64/4/1     16x32x64/4/1     16x32x64/4/1
weight        any   16-bit  16x64x128/8/1    16x64x128/8/1    16x64x128/8/1    16x64x128/8/1

sm_89
stored_forward 16   bf16    16x64x128/4/3/W  16x64x128/4/3/W  16x64x64/4/4/W   16x64x64/4/3/W
stored_forward 16   fp16    16x64x128/4/3/W  16x64x128/4/3/W  16x64x64/4/4/W   16x64x64/4/2/W
forward       16    bf16    16x64x64/4/4/W   16x64x64/4/4/W   16x128x64/4/3/W  16x64x64/4/4/W
forward       16    fp16    16x64x64/4/4/WR  16x64x64/4/4/W   16x64x64/4/4/W   16x64x32/4/4/W
forward       64    16-bit  64x64x64/4/3/W   64x64x64/4/3/W   64x64x64/4/3/W   64x64x32/4/3/W
forward       128   bf16    128x128x32/4/2   128x128x32/4/2   128x128x32/4/2   128x128x32/4/2
forward       128+  fp16    128x128x32/8/4/W 128x128x32/8/4/W 128x128x32/8/3/W 128x64x32/4/3/WR
forward       more  bf16    256x128x32/8/3   256x128x32/8/2   256x128x32/8/2   256x128x32/8/2
forward       16    tf32    16x64x64/4/4/W   16x64x64/4/4/W   16x64x64/4/3/W   16x64x32/4/3/W
forward       64    tf32    64x64x64/4/3/W   64x64x64/4/3/W   64x64x32/4/4/W   64x64x32/4/3/W
forward       128+  tf32    128x128x32/8/3/W 128x128x32/8/3/W 128x64x32/4/3/W  64x64x32/4/3/W
grad_input    16    16-bit  16x32x128/4/4    16x32x128/4/4/R  16x32x128/4/3    16x32x64/4/3
grad_input    64    bf16    64x32x128/4/3    64x32x128/4/3    64x32x128/4/3    64x32x128/4/2/R
grad_input    64    fp16    64x32x128/4/3    64x32x128/4/3    64x32x128/4/3    64x64x64/4/2/R
grad_input    128   bf16    128x32x256/8/2   128x32x256/8/2   128x32x256/8/2   64x32x128/4/2/R
grad_input    128   fp16    128x32x256/8/2   128x32x256/8/2   128x32x256/8/2   64x64x64/4/2/R
grad_input    more  bf16    256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/2/T
grad_input    more  fp16    256x32x128/8/3/T 256x32x128/8/3/T 256x32x128/8/2/T 64x64x64/4/2/R
grad_input    16    tf32    16x32x128/4/4    16x32x128/4/3    16x32x64/4/3     16x32x64/4/3
grad_input    64+   tf32    64x32x128/4/3    64x32x128/4/3    64x32x128/4/2    32x32x64/4/2
grad_factors  any   16-bit  32x128x64/8/4    32x128x64/8/4    32x128x64/8/4    32x128x64/8/4
grad_factors  any   tf32    32x128x64/8/3    32x128x64/8/3    32x128x64/8/3    32x128x64/8/3
grad_reduce   any   bf16    16x32x64/4/1/R   32x32x64/4/1     64x32x64/4/1     64x32x64/4/1
grad_reduce   any   fp16    16x32x64/4/1     16x32x64/4/1     16x32x64/4/1/R   16x32x64/4/1
grad_reduce   any   tf32    16x16x64/8/1     16x16x64/8/1     16x16x64/8/1     16x16x64/8/1
weight        any   16-bit  16x64x128/8/1    16x64x128/8/1    16x64x128/8/1    16x64x128/8/1

sm_90
stored_forward 16   16-bit  16x64x128/4/4/WA 16x64x128/4/4/WA 16x64x128/4/3/WA 16x64x64/4/3/WA
forward       16    bf16    16x64x128/4/4/WA 16x64x128/4/4/WA 16x128x64/4/4/WA 16x128x64/4/3/WA
forward       16    fp16    16x64x128/4/4/WA 16x64x128/4/4/WA 16x64x128/4/3/WA 16x64x64/4/4/WA
forward       64    16-bit  64x64x128/4/3/WA 64x64x128/4/3/WA 64x64x64/4/4/WA  64x64x64/4/3/WA
forward       128   bf16    128x128x64/8/3/WA 128x128x64/8/3/WA 128x128x64/8/3/WA 128x128x64/8/3/WA
forward       128+  fp16    128x128x64/8/3/WA 128x128x64/8/3/WA 128x128x64/8/3/WA 128x128x64/8/2/WA
forward       more  bf16    256x128x64/8/3/WA 256x128x64/8/3/WA 256x128x64/8/2/W 256x128x64/8/2/WA
forward       16    tf32    16x64x128/4/4/WA 16x64x128/4/4/WA 16x64x128/4/3/WA 16x64x64/4/4/WA
forward       64    tf32    64x64x128/4/3/WA 64x64x128/4/3/WA 64x64x64/4/4/WA  64x64x64/4/3/WA
forward       128+  tf32    128x128x64/8/3/WA 128x128x64/8/3/WA 128x128x64/8/2/WA 128x128x32/8/3/WA
grad_input    16    16-bit  16x64x128/4/4/WA 16x64x128/4/4/WA 16x64x128/4/4/WA 16x64x64/4/4/WA
grad_input    64    16-bit  64x64x128/4/3/WA 64x64x128/4/3/WA 64x64x64/4/4/WA  64x64x64/4/3/WA
grad_input    128   bf16    128x64x128/8/3/WA 128x64x128/8/3/WA 128x64x128/8/3/WA 128x64x128/8/3/WA
grad_input    128+  fp16    128x64x128/8/3/WA 128x64x128/8/3/WA 128x64x128/8/3/WA 128x32x128/8/3/WA
grad_input    more  bf16    256x64x128/8/3/WA 256x64x128/8/3/WA 256x64x128/8/2/WA 256x64x128/8/2/WA
grad_input    16    tf32    64x64x64/4/3/A   64x64x64/4/3/A   64x64x64/4/3/A   64x64x64/4/2/A
grad_input    64    tf32    64x64x64/4/3/A   64x64x64/4/3/A   64x64x64/4/3/A   64x64x64/4/2/A
grad_input    128+  tf32    128x32x128/8/3/WA 128x32x128/8/3/WA 128x32x128/8/3/WA 128x32x128/8/2/WA
grad_factors  any   16-bit  64x128x128/8/3   64x128x128/8/3   64x128x64/8/3    64x128x64/8/3
grad_factors  any   tf32    64x128x64/8/3    64x128x64/8/3    64x128x64/8/3    64x128x64/8/3
grad_reduce   any   bf16    16x64x128/4/2    32x64x128/8/2    64x64x128/8/1    128x64x64/8/1
grad_reduce   any   fp16    16x64x64/8/1     16x64x64/8/1     16x64x64/8/1/R   16x64x64/8/1
grad_reduce   any   tf32    16x64x64/8/1     16x64x64/8/1     16x64x64/8/1     16x64x64/8/1
weight        any   16-bit  16x64x64/2/1     16x64x128/8/1    16x64x128/8/1    16x64x128/8/1

sm_100
stored_forward 16   16-bit  16x128x64/4/4/W  16x128x64/4/4/W  16x128x64/4/4/W  16x128x64/4/3/W
forward       16    16-bit  16x128x64/4/4/W  16x128x64/4/4/W  16x128x64/4/4/W  16x128x64/4/3/WR
forward       64    16-bit  64x128x64/4/4/W  64x128x64/4/4/W  64x128x64/4/3/W  64x128x64/4/2/WR
forward       128+  16-bit  128x128x64/8/3/W 128x128x64/8/3/W 128x128x64/8/3/W 128x128x64/8/2/W
forward       16    tf32    16x128x64/4/3/W  16x128x64/4/3/W  16x128x64/4/3/W  16x128x64/4/2/W
forward       64    tf32    64x128x64/4/3/W  64x128x64/4/3/W  64x128x64/4/2/W  64x128x32/4/3/W
forward       128+  tf32    128x128x64/8/2/W 128x128x64/8/2/W 128x128x32/8/3/W 128x128x32/8/2/W
grad_input    16    16-bit  64x64x128/4/3    64x64x128/4/3    64x64x128/4/3    64x64x128/4/2
grad_input    64    16-bit  64x64x128/4/3    64x64x128/4/3    64x64x128/4/3    64x64x128/4/2
grad_input    128+  16-bit  128x64x128/8/3   128x64x128/8/3   128x64x128/8/3   128x64x128/8/2
grad_input    16    tf32    64x64x128/4/2    64x64x128/4/2    64x32x128/4/3    64x32x128/8/2
grad_input    64    tf32    64x64x128/4/2    64x64x128/4/2    64x32x128/4/3    64x32x128/8/2
grad_input    128+  tf32    128x64x128/8/2   128x64x128/8/2   128x32x128/8/3   128x32x128/8/2
grad_factors  any   16-bit  64x128x64/8/3/R  64x128x64/8/3/R  64x128x64/8/3    64x128x64/8/3
grad_factors  any   tf32    32x128x64/8/2/R  32x128x64/8/2/R  32x128x64/8/2    32x128x64/8/2
grad_reduce   any   bf16    16x64x64/8/1     32x64x64/8/1     64x64x64/8/1     64x64x64/8/1
grad_reduce   any   fp16    16x64x64/8/1     16x64x64/8/1     16x64x64/8/1     16x64x64/8/1
grad_reduce   any   tf32    16x64x64/8/1     16x64x64/8/1     16x64x64/8/1     16x64x64/8/1
weight        any   16-bit  16x64x128/8/1    16x64x128/8/1    16x64x128/8/1    16x64x128/8/1

all
forward       16    fp32    16x64x32/8/2     16x64x32/8/2     16x32x32/8/2     16x64x32/8/2
forward       64+   fp32    64x32x32/8/2     64x32x32/8/2     64x32x32/8/2     64x32x32/8/2
grad_input    16    fp32    16x64x32/8/2     16x64x32/8/2     16x64x32/8/2     16x64x32/8/2
grad_input    64+   fp32    64x32x32/8/2     64x32x32/8/2     64x32x32/8/2     64x32x32/8/2
grad_factors  any   fp32    32x32x32/8/2/R   32x32x32/8/2/R   32x32x32/8/1/R   32x32x32/8/1
grad_reduce   any   fp32    16x64x32/8/1     16x64x32/8/1     16x64x32/8/1     16x64x32/8/1
stored        any   16-bit  16x128x128/8/1   16x128x128/8/1   16x128x128/8/1   16x64x128/8/1
stored        any   tf32    16x64x64/8/1     16x64x64/8/1     16x64x64/8/1     16x64x64/8/1
stored        any   fp32    16x32x32/8/1     16x32x32/8/1     16x32x32/8/1     16x32x32/8/1
stored_reduce any   bf16    64x64x64/4/1/R   64x64x64/4/1/R   64x64x64/4/1/R   64x64x64/4/1/R
stored_reduce any   fp16    16x64x64/4/1/R   16x64x64/4/1/R   16x64x64/4/1/R   16x64x64/4/1/R
stored_reduce any   tf32    16x32x32/4/1/R   16x32x32/4/1/R   16x32x32/4/1/R   16x32x32/4/1/R
stored_reduce any   fp32    16x32x32/4/1/R   16x32x32/4/1/R   16x32x32/4/1/R   16x32x32/4/1/R
weight        any   tf32    16x64x64/8/1     16x64x64/8/1     16x64x64/8/1     16x64x64/8/1
weight        any   fp32    16x32x32/8/1     16x32x32/8/1     16x32x32/8/1     16x32x32/8/1
"""


def launch_config(
    kernel: str,
    arch: str,
    N: int,
    r: int,
    dtype: str,
    low_smem: bool = False,
    gathers: bool = False,
) -> LaunchConfig:
    """The launch config of a call; there is one for every architecture.

    Args:
        kernel: `"forward"`, `"grad_input"`, `"grad_factors"`, `"grad_reduce"` or `"weight"`; over a
            stored W0 `"stored_reduce"`, `"stored"`, or for few tokens `"stored_forward"`.
        arch: `"sm_90"` and the like.
        N: Tokens.
        r: The rank, 1 to 128.
        dtype: `"bf16"`, `"fp16"`, `"tf32"` or `"fp32"`.
        low_smem: For a call whose tiles need more than those that the table was made for
            (`launch.is_heavy`).
        gathers: Such a call of `two_sided`: its factors take room, `[BO, BK]` each.
    """
    tokens = next((str(most) for most in TOKENS if N <= most), "128" if low_smem else "more")
    column = next(i for i, most in enumerate(RANKS) if r <= most)
    config = _table()[family(arch), kernel, tokens, dtype][column]
    return _with_low_smem(kernel, config, gathers) if low_smem else config


def _with_low_smem(kernel: str, config: LaunchConfig, gathers: bool) -> LaunchConfig:
    """A config that leaves room in shared memory and registers."""
    if kernel == "stored_reduce":  # codes by bytes, and a tile of G as their product is laid out
        return dataclasses.replace(config, BN=16, BO=32, BK=32, warps=4)
    if kernel == "grad_reduce":
        BO, BK = min(64, config.BO), min(64, config.BK)
        return dataclasses.replace(config, BN=16, BO=BO, BK=BK, warps=8, stages=1, maxnreg=255)
    if kernel == "stored":  # blocks that lie across rows
        return dataclasses.replace(config, BO=min(64, config.BO))
    if kernel == "grad_factors":
        return dataclasses.replace(config, BK=min(config.BK, 64))
    if kernel in ("forward", "grad_input"):
        stages = min(2, config.stages)
        if kernel == "grad_input" and config.W_FIRST:  # its product sums over BO
            return dataclasses.replace(config, BO=config.BO // 2, stages=stages)
        if not gathers and config.BK > 128:  # T's warps by its own shape, or they make the same
            return dataclasses.replace(config, BK=128, stages=stages, unchain=True)
        if not gathers and config.BK > 64:  # in narrower ones warps would make the same tile of T
            return dataclasses.replace(config, stages=stages)
        left = config.BO if config.W_FIRST else config.BN
        warps = 8 if left >= 128 or (gathers and config.BK > 64) else config.warps
        return dataclasses.replace(config, BK=max(32, config.BK // 2), warps=warps, stages=stages)
    return config  # no loop that keeps tiles for its next steps


def family(arch: str) -> str:
    """The architecture whose lines serve `arch`: its own, its generation's, or the smallest's."""
    if arch in ("sm_80", "sm_90", "sm_100"):
        return arch
    return "sm_100" if arch in ("sm_101", "sm_103", "sm_110") else "sm_89"


@functools.cache
def _table() -> dict[tuple[str, str, str, str], tuple[LaunchConfig, ...]]:
    """The table, parsed.

    `all` stands for each family, `any` for each class of tokens, `64+` for 64 and what is beyond,
    `16-bit` for both types.
    """
    table = {}
    archs: tuple[str, ...] = ()
    for line in _TABLE.split("\n"):
        words = line.split()
        if len(words) == 1:
            archs = ("sm_80", "sm_89", "sm_90", "sm_100") if words == ["all"] else tuple(words)
        elif words:
            kernel, tokens, kind, *cells = words
            for arch in archs:
                parsed = tuple(_parse(cell, arch, kind) for cell in cells)
                for each in _CLASSES.get(tokens, (tokens,)):
                    for dtype in ("bf16", "fp16") if kind == "16-bit" else (kind,):
                        table[arch, kernel, each, dtype] = parsed
    return table


_CLASSES = {
    "any": ("16", "64", "128", "more"),
    "64+": ("64", "128", "more"),
    "128+": ("128", "more"),
}


def _parse(cell: str, arch: str, kind: str) -> LaunchConfig:
    tile, warps, stages, *letters = cell.split("/")
    BN, BO, BK = (int(size) for size in tile.split("x"))
    return LaunchConfig(
        BN,
        BO,
        BK,
        int(warps),
        int(stages),
        W_FIRST="W" in "".join(letters),
        TMA=arch in ("sm_90", "sm_100") and kind != "fp32",
        wgmma_async="A" in "".join(letters),
        unchain="T" in "".join(letters),
        maxnreg=255 if "R" in "".join(letters) else None,
    )
