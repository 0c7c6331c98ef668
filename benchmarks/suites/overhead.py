"""The overhead suite: host time of a call on tensors so small that nothing else counts.

On a GPU it is the time until a call returns, with the device idle before it: what a training loop
whose kernels are short waits for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure import host_time
from ..shapes import Shape
from . import layer

TINY = Shape(16, 16, 16)
Row = dict[str, Any]


def measure(
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
    baselines: Sequence[str],
    on_round: Callable[[float], object] = lambda share: None,
) -> list[Row]:
    """One row per provider; the arguments are those of `layer.measure`."""
    rows = layer.measure(
        TINY,
        r,
        dtype,
        device,
        seconds,
        names,
        baselines,
        on_round,
        rounds=20_000,
        timer=lambda case: host_time(case.run, device, wait=False),
    )
    without = ("operations", "floor_share", "bytes")  # nothing is computed here to speak of
    return [
        {**{key: value for key, value in row.items() if key not in without}, "suite": "overhead"}
        for row in rows
    ]
