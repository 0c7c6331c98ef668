"""`explain`: the plan of a call on any known device, without running it."""

from __future__ import annotations

import dataclasses

import torch

from .checks import check_choice, check_dtype, check_rank, check_size
from .devices import CPU, Device, find_device
from .dispatch import auto_backend, own_device
from .layer import PRECISIONS, TRANSFORMS, dtype_name
from .planner import STORED_BYTES, Plan, Problem, plan
from .versions import installed, lost_fallback, miscompiled


def explain(
    N: int,
    in_features: int,
    out_features: int,
    r: int,
    *,
    dtype: torch.dtype,
    device_name: str | None = None,
    weight_dtype: torch.dtype | str | None = None,
    transform: str = "low_rank",
    precision: str = "merged",
    experts: int = 0,
) -> Plan:
    """Plans a call without running it: strategies, operations, bytes, workspace; needs no GPU.

    Args:
        N: Tokens.
        in_features: The layer's inputs.
        out_features: The layer's outputs.
        r: The layer's rank.
        dtype: The compute type.
        device_name: A known GPU by (part of) its name, such as `"A100"` or `"RTX 4090"`, or
            `"cpu"`; None means this machine's own device, with the compiled extension where it is
            loaded.
        weight_dtype: W0's type, or `"nf4"`, `"fp4"` or `"int8"`; None means `dtype`.
        transform: As in `hut_linear`.
        precision: As in `hut_linear`.
        experts: The experts of `hut_grouped_linear`, N rows in all; 0 means a layer.

    Returns:
        A `Plan`; `str(plan)` is a readable table.

    Raises:
        ValueError: A size below 0, r below 1 or not possible with `two_sided`, an unknown option,
            an unknown device.
        TypeError: A size that is no integer, a type that `hut_linear` does not take.

    Examples:
        >>> import torch
        >>> from hut_kernels import explain
        >>> print(explain(512, 4096, 4096, 16, dtype=torch.bfloat16, device_name="A100"))
        HUT low_rank, r = 16, merged, bfloat16 over bfloat16: 512 tokens, 4096 -> 4096
        on NVIDIA A100 (sm_80), backend triton; break-evens: ...
        ...
    """
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    sizes = {"N": N, "in_features": in_features, "out_features": out_features, "r": r}
    sizes["experts"] = experts
    for name, size in sizes.items():
        check_size(name, size)
    check_choice("transform", transform, TRANSFORMS)
    check_choice("precision", precision, PRECISIONS)
    check_rank(r, transform, in_features, out_features)
    check_dtype("dtype", dtype)
    if weight_dtype not in STORED_BYTES:
        check_dtype("weight_dtype", weight_dtype)
    four_bit = weight_dtype in ("nf4", "fp4")  # in blocks of 64, not doubly quantized
    device = own_device() if device_name is None else _named_device(device_name)
    problem = Problem(
        N,
        in_features,
        out_features,
        r,
        dtype_name(dtype),
        str(weight_dtype).removeprefix("torch."),
        aligned=in_features % (64 if four_bit else 16) == 0 and out_features % 16 == 0,
        transform=transform,
        precision=precision,
        experts=experts,
    )
    if device == CPU or torch.float64 in (dtype, weight_dtype):
        backend = "torch"
    elif device_name is None:
        backend = auto_backend(torch.device("cuda", torch.cuda.current_device()))
    else:
        backend = "triton" if lost_fallback(device.miscompiles) is None else "torch"
    return plan(problem, device, backend)


def _named_device(name: str) -> Device:
    """A known device, under the Triton that is installed here."""
    device = find_device(name)
    return dataclasses.replace(device, miscompiles=miscompiled(installed("triton"), device.arch))
