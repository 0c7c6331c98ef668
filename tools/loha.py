"""LyCORIS's fused LoHa, compiled from its wheel where that is installed: the nearest peer's loops.

LoHa's update is a product of two low-rank ones, element by element. LyCORIS makes it tile by tile
beside a base product that the BLAS does: two thin products a tile and nothing read of W0, where HUT
has one and reads W0. Its backward is one kernel of one pipeline stage, with a loop for G and one
for dx. Nothing of it is in this repository, and nothing runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hut_kernels.triton.launch import LaunchConfig, padded_rank
from tools import gate

VERSION = "4.1.3"
MISSING = (
    f"LyCORIS {VERSION} is not installed: "
    f"pip install lycoris-lora=={VERSION} --no-deps shows its loops beside"
)
_NAME = "_lycoris"


class Tiles(NamedTuple):
    """Its tile of a product, which has `inner` between `rows` and `columns`."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def named(self, kernel: str) -> LaunchConfig:
        """The tile of HUT's `kernel`, by HUT's names of the sizes."""
        BN, BO, BK = {
            "forward": (self.rows, self.columns, self.inner),
            "grad_input": (self.rows, self.inner, self.columns),
            "grad_factors": (self.inner, self.rows, self.columns),
        }[kernel]
        return LaunchConfig(BN, BO, BK, self.warps, self.stages)


# Of all tiles that its plans let through once a device's rates are stored, the leanest by
# `tools.slots` at rank 16 and 4096 tokens, and the next. Some spill, which that does not count.
_BACKWARD = (
    Tiles(128, 128, 32, 8, 1),
    Tiles(128, 128, 64, 4, 1),
    Tiles(64, 128, 64, 4, 1),
)
TILES = {
    "forward": (Tiles(128, 128, 32, 4, 2), Tiles(128, 128, 64, 8, 2)),
    "grad_input": _BACKWARD,
    "grad_factors": _BACKWARD,
}


def installed() -> bool:
    """Tell whether the release that is known here is installed."""
    try:
        return importlib.metadata.version("lycoris-lora") == VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def compile_kernel(arch: str, kernel: str, tiles: Tiles, N: int, size: int, r: int) -> Any:
    """Its kernel that has the loop of HUT's `kernel`, in bf16, factors too."""
    gate._switch_to(arch)
    regen = _kernels()
    x, grad, out = _empty(N, size), _empty(N, size), _empty(N, size)
    factors = [_empty(size, r), _empty(r, size), _empty(size, r), _empty(r, size)]
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "grid": (1,)}
    if kernel == "forward":
        matrices = [x, *factors, out, out]  # one `out` for the base product, which it passes over
        return regen._bypass_regen_kernel.warmup(
            *matrices, N, size, size, r, *_strides(matrices), 1.0,
            has_base=False, prec="tf32", block_r=padded_rank(r),
            block_m=tiles.rows, block_n=tiles.columns, block_k=tiles.inner, **options,
        )  # fmt: skip
    matrices = [grad, x, *factors, out]
    gradients = [torch.empty_like(factor, dtype=torch.float32) for factor in factors]
    programs = (size // tiles.rows) * (size // tiles.columns)
    return regen.bypass._loha_bypass_bwd_kernel.warmup(
        *matrices, *gradients, N, size, size, r, *_strides(matrices), 1.0, programs,
        PREC="tf32", BR=padded_rank(r),
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.inner, **options,
    )  # fmt: skip


def only_loop(code: gate._Code, kernel: str) -> gate._Code:
    """The code with one of its loops: of backward's two, the one for dx has more products."""

    def products(loop: tuple[int, int]) -> int:
        return gate._products(code.lines[loop[0] : loop[1] + 1])

    loops = sorted(filter(products, code.loops), key=products)
    if kernel == "forward":
        (found,) = loops
    else:
        of_g, of_dx = loops
        found = of_g if kernel == "grad_factors" else of_dx
    return dataclasses.replace(code, loops=[found])


def extra_bytes(kernel: str, tiles: Tiles, r: int) -> float:
    """Bytes for each inner index beside a plain product's: two moving factors', less W0's."""
    return 0.0 if kernel == "grad_factors" else 4.0 * r - 2.0 * tiles.columns


def _kernels() -> Any:
    """The module of its forward, which has that of backward in it.

    Under a name of its own: `import lycoris` itself needs packages that these modules do not.
    """
    if _NAME not in sys.modules:
        package = types.ModuleType(_NAME)
        wheel = importlib.metadata.distribution("lycoris-lora")
        package.__path__ = [str(wheel.locate_file("lycoris"))]
        sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.kernels.triton.loha.regen")


def _empty(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16)


def _strides(matrices: list[Tensor]) -> list[int]:
    return [stride for matrix in matrices for stride in matrix.stride()]
