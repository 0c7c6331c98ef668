"""Launch tables: one row a configuration, by architecture, kernel, token class, r class and type."""

from __future__ import annotations

from .launch import Row

# Columns: tokens BN, rows of W0 BO, columns of W0 BK, warps, pipeline stages.
FORWARD = Row(BN=64, BO=64, BK=32, warps=4, stages=3)
GRAD_INPUT = Row(BN=64, BO=32, BK=64, warps=4, stages=3)
GRAD_FACTORS = Row(BN=32, BO=64, BK=64, warps=4, stages=3)
GRAD_REDUCE = Row(BN=16, BO=64, BK=64, warps=4, stages=1)
WEIGHT = Row(BN=16, BO=64, BK=64, warps=4, stages=1)


def row(kernel: str, arch: str, N: int, r: int, dtype: str) -> Row:
    return {
        "forward": FORWARD,
        "grad_input": GRAD_INPUT,
        "grad_factors": GRAD_FACTORS,
        "grad_reduce": GRAD_REDUCE,
        "weight": WEIGHT,
    }[kernel]
