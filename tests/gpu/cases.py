"""One case of the correctness check: random inputs, the float64 reference, the errors.

The reference is docs/definition.md written once more, on the case's own device, for all rows and
columns of W0 where they are few enough and for a sample of them where they are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hut_kernels import hut_linear, ops, planner

from ..references import poisoned

PARTS = ("forward", "grad_input", "grad_factors")
FUSED = ("fused", "fused", "fused")
STAGED = ("staged", "staged", "chunked")
GRADIENTS = ("x", "hut_A", "hut_B", "bias", "gamma", "beta")
# The kernel behind each part, for each of its two strategies.
KERNELS = {
    ("forward", "fused"): "forward",
    ("forward", "staged"): "weight",
    ("grad_input", "fused"): "grad_input",
    ("grad_input", "staged"): "weight",
    ("grad_factors", "fused"): "grad_factors",
    ("grad_factors", "chunked"): "grad_reduce",
}

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LIMITS = {"float16": 2e-3, "bfloat16": 8e-3}
_TF32_LIMIT = 2e-3
# The update on its own, root mean square 5e-2: (merged, merged in two_sided, split).
_UPDATE_LIMITS = {
    "bfloat16": (5e-2, 6e-2, 5e-3),
    "float16": (8e-3, 8e-3, 1e-3),
    "float32": (1e-5, 1e-5, 1e-5),
}
_GAIN = (0.98, 1.02)
_SAMPLED = 1 << 26  # elements of a float64 tensor of the reference, at most


@dataclass(frozen=True)
class Check:
    """One layer, how it is to run, and what is looked at. Plain values: it travels as JSON.

    Attributes:
        N, K, O, r: Tokens, in_features, out_features, rank.
        dtype, weight_dtype, factor_dtype: By name; `weight_dtype` None is the compute type.
        tf32: Whether float32 products may use tf32.
        transform, offset, scaling, precision: As in `hut_linear`.
        vectors: Which of `bias`, `gamma`, `beta` there are.
        layout: `transposed` (the weight), `sliced` (x, weight and gradient are windows of wider
            tensors, at odd addresses), `shifted` (they are contiguous, at odd addresses),
            `expanded` (the gradient has stride 0), or nothing.
        strategies: Of forward, input gradient and factor gradients; None leaves the planner free.
        wanted: The gradients asked for; None is all.
        update: The update's root mean square: the base cancels, and `y` is compared with the
            update alone.
        kernel, row: A kernel whose table row has other values, such as `{"BN": 32}`.
        backend: As in `hut_linear`.
        seed: Of the inputs.
    """

    N: int
    K: int
    O: int
    r: int
    dtype: str = "bfloat16"
    weight_dtype: str | None = None
    factor_dtype: str = "float32"
    tf32: bool = False
    transform: str = "low_rank"
    offset: float = 1.0
    scaling: float = 0.75
    precision: str = "merged"
    vectors: tuple[str, ...] = ()
    layout: str = ""
    strategies: tuple[str, str, str] | None = FUSED
    wanted: tuple[str, ...] | None = None
    update: float | None = None
    kernel: str | None = None
    row: dict[str, Any] | None = None
    backend: str = "triton"
    seed: int = 0

    @classmethod
    def load(cls, fields: dict[str, Any]) -> Check:
        """From what `dataclasses.asdict` gave, also after a way through JSON."""
        lists = {name: tuple(v) for name, v in fields.items() if isinstance(v, list)}
        return cls(**{**fields, **lists})

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else self.dtype
        form = self.transform if self.offset else f"{self.transform} offset 0"
        extras = [*self.vectors, self.layout, self.precision if self.precision == "split" else ""]
        if self.factor_dtype != "float32":
            extras.append(f"{self.factor_dtype} factors")
        if self.weight_dtype:
            extras.append(f"{self.weight_dtype} weight")
        if self.update is not None:
            extras.append(f"update {self.update:g}")
        if self.row:
            extras.append(f"{self.kernel} row {self.row}")
        how = "planned" if self.strategies is None else "/".join(self.strategies)
        if self.backend == "cuda":  # it has one strategy
            how = "compiled"
        words = f"N {self.N} K {self.K} O {self.O} r {self.r} {kind} {form} {how}"
        return " ".join([words, *filter(None, extras)])

    @property
    def spec(self) -> dict[str, Any]:
        """The options of `hut_linear`."""
        two_sided = self.transform == "two_sided"
        return {
            "transform": self.transform,
            "offset": 1.0 if two_sided else self.offset,
            "scaling": 1.0 if two_sided else self.scaling,
            "precision": self.precision,
        }

    @property
    def bytes(self) -> int:
        """About what a check takes at its peak: tensors, twice over, and the reference's."""
        item = _DTYPES[self.dtype].itemsize
        activations = 2 * self.N * (self.K + self.O) * item
        gradients = self.N * (self.K + self.O) * item
        weights = 4 * self.K * self.O * item
        return activations + gradients + weights + 12 * 8 * min(_SAMPLED, self.K * self.O)


@dataclass
class Inputs:
    """The tensors of a case."""

    x: Tensor
    weight: Tensor
    hut_A: Tensor
    hut_B: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    grad: Tensor


def make(case: Check, device: torch.device) -> Inputs:
    """Normally distributed inputs; W keeps the size of y near that of x, and T is near 1."""
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    factors = _DTYPES[case.factor_dtype]

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def vector(name: str, center: float, size: float) -> Tensor | None:
        if name not in case.vectors:
            return None
        return (center + size * normal(case.O, dtype=torch.float32)).to(factors)

    dtype = _DTYPES[case.dtype]
    weight_dtype = _DTYPES[case.weight_dtype or case.dtype]
    x = normal(case.N, case.K, dtype=dtype)
    weight = normal(case.O, case.K, dtype=weight_dtype).mul_(case.K**-0.5)
    grad = normal(case.N, case.O, dtype=dtype)
    A = normal(case.r, case.K, dtype=torch.float32)
    B = normal(case.O, case.r, dtype=torch.float32)
    if case.update is not None:
        x[:, 1::2] = x[:, ::2][:, : case.K // 2]
        weight[:, 1::2] = -weight[:, ::2][:, : case.K // 2]
        A, B = _updating(case, A, B)
    elif case.transform == "two_sided":
        A, B = 1 + 0.5 * A, 1 + 0.5 * B
    else:
        A = A * case.r**-0.5
    inputs = Inputs(
        x, weight, A.to(factors), B.to(factors),
        vector("bias", 0, 1), vector("gamma", 1, 0.3), vector("beta", 0, 1), grad,
    )  # fmt: skip
    return _lay(inputs, case.layout)


def _updating(case: Check, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors under which `T - 1` has the root mean square `case.update`."""
    size = case.update or 0.0
    if case.transform == "two_sided":
        return 1 + A * (size / math.sqrt(2)), 1 + B * (size / math.sqrt(2))
    if case.offset == 1:
        return A * (size / math.sqrt(case.r) / case.scaling), B
    A = A * (size / math.sqrt(max(1, case.r - 1)) / case.scaling)
    A[0], B[:, 0] = 1.0 / case.scaling, 1.0
    return A, B


def _lay(inputs: Inputs, layout: str) -> Inputs:
    if layout == "transposed":
        return dataclasses.replace(inputs, weight=inputs.weight.t().contiguous().t())
    if layout == "expanded":
        return dataclasses.replace(inputs, grad=inputs.grad[:1].expand_as(inputs.grad))
    moved = {"sliced": _window, "shifted": _shifted}.get(layout)
    if moved is None:
        return inputs
    tensors = {name: moved(getattr(inputs, name)) for name in ("x", "weight", "grad")}
    return dataclasses.replace(inputs, **tensors)


def _window(tensor: Tensor) -> Tensor:
    """The same values inside a wider tensor whose other elements are NaN."""
    rows, columns = tensor.shape
    wide = tensor.new_full((rows + 2, columns + 3), math.nan)
    wide[1:-1, 1:-2] = tensor
    return wide[1:-1, 1:-2]


def _shifted(tensor: Tensor) -> Tensor:
    """The same values from the second element of a buffer on."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


# The reference

Picked = tuple[Tensor, tuple[Tensor | None, ...]]  # values, and which indices they belong to


def expected(case: Check, inputs: Inputs) -> dict[str, Picked]:
    """`y` and every gradient in float64, at a sample of tokens, rows and columns."""
    spec = case.spec
    device = inputs.x.device
    rows = _sample(case.O, _SAMPLED // max(1, case.K), device)
    cols = _sample(case.K, _SAMPLED // max(1, case.O), device)
    tokens = _sample(case.N, _SAMPLED // max(1, case.K + case.O), device)
    A, B = inputs.hut_A.double(), inputs.hut_B.double()
    gamma = _double(inputs.gamma, 1.0, case.O, device)
    bias, beta = (_double(v, 0.0, case.O, device) for v in (inputs.bias, inputs.beta))
    p, q = (torch.arange(n, device=device) * case.r // n for n in (case.O, case.K))
    every_row, every_col = (torch.arange(n, device=device) for n in (case.O, case.K))

    def T(o: Tensor, i: Tensor) -> Tensor:
        if case.transform == "two_sided":
            return B[o][:, q[i]] * A[p[o]][:, i]
        return spec["offset"] + spec["scaling"] * (B[o] @ A[:, i])

    W0_rows, W0_cols = inputs.weight[rows].double(), inputs.weight[:, cols].double()
    W_rows = W0_rows * T(rows, every_col)
    W_cols = W0_cols * T(every_row, cols)
    x, g = inputs.x[tokens].double(), inputs.grad[tokens].double()
    G_rows, G_cols = _products(inputs, rows, cols)
    H_rows, H_cols = gamma[rows, None] * G_rows * W0_rows, gamma[:, None] * G_cols * W0_cols
    if case.transform == "two_sided":
        zeros = torch.zeros(len(rows), case.r, dtype=torch.float64, device=device)
        d_B = zeros.index_add_(1, q, H_rows * A[p[rows]])
        zeros = torch.zeros(case.r, len(cols), dtype=torch.float64, device=device)
        d_A = zeros.index_add_(0, p, H_cols * B[:, q[cols]])
    else:
        d_B, d_A = spec["scaling"] * H_rows @ A.t(), spec["scaling"] * B.t() @ H_cols
    sums = inputs.grad.sum(0, dtype=torch.float64)
    return {
        "W": (gamma[rows, None] * W_rows, (rows, None)),
        "y": ((gamma * bias + beta)[rows] + gamma[rows] * (x @ W_rows.t()), (tokens, rows)),
        "x": ((gamma * g) @ W_cols, (tokens, cols)),
        "hut_A": (d_A, (None, cols)),
        "hut_B": (d_B, (rows, None)),
        "gamma": ((W_rows * G_rows).sum(1) + (bias * sums)[rows], (rows,)),
        "beta": (sums[rows], (rows,)),
        "bias": ((gamma * sums)[rows], (rows,)),
    }


def expected_update(case: Check, inputs: Inputs) -> Tensor:
    """`x (W0 * (T - 1))^T` in float64, `[N, O]`; for small layers."""
    A, B, spec = inputs.hut_A.double(), inputs.hut_B.double(), case.spec
    if case.transform == "two_sided":
        p, q = (torch.arange(n, device=A.device) * case.r // n for n in (case.O, case.K))
        update = B[:, q] * A[p] - 1
    else:
        update = spec["offset"] - 1 + spec["scaling"] * (B @ A)
    return inputs.x.double() @ (inputs.weight.double() * update).t()


def _products(inputs: Inputs, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and the columns of `G = g^T x`, a block of tokens at a time."""
    x, g = inputs.x, inputs.grad
    G_rows = torch.zeros(len(rows), x.shape[1], dtype=torch.float64, device=x.device)
    G_cols = torch.zeros(g.shape[1], len(cols), dtype=torch.float64, device=x.device)
    block = max(1, _SAMPLED // max(1, x.shape[1] + g.shape[1]))
    for start in range(0, len(x), block):
        x_n, g_n = x[start : start + block].double(), g[start : start + block].double()
        G_rows += g_n[:, rows].t() @ x_n
        G_cols += g_n.t() @ x_n[:, cols]
    return G_rows, G_cols


def _sample(size: int, most: int, device: torch.device) -> Tensor:
    """All indices, or some at random with the first and the last among them."""
    most = max(96, most)
    if size <= most:
        return torch.arange(size, device=device)
    generator = torch.Generator(device).manual_seed(size)
    some = torch.randint(size, (most - 80,), generator=generator, device=device)
    ends = torch.arange(-64, 16, device=device) % size
    return torch.unique(torch.cat([some, ends]))


def _double(vector: Tensor | None, default: float, size: int, device: torch.device) -> Tensor:
    if vector is None:
        return torch.full((size,), default, dtype=torch.float64, device=device)
    return vector.double()


# Limits and errors


def limit(case: Check, result: torch.dtype) -> float:
    """The greatest error of a result of this type: "How close is equal" of docs/definition.md."""
    dtype = _DTYPES[case.dtype]
    if case.dtype != "float32":
        allowed = _LIMITS[case.dtype]
    elif case.tf32:
        allowed = _TF32_LIMIT
    else:
        longest = max(case.N, case.K, case.O)
        allowed = 2e-6 * max(1.0, math.sqrt(longest / 4096))
    coarser = torch.finfo(result).eps > torch.finfo(dtype).eps
    return allowed + (torch.finfo(result).eps / 2 if coarser else 0.0)


def update_limit(case: Check) -> float:
    """The greatest error of the update where the base cancels."""
    merged, two_sided, split = _UPDATE_LIMITS[case.dtype]
    if case.precision == "split":
        return split
    return two_sided if case.transform == "two_sided" else merged


def error(out: Tensor, picked: Picked) -> float:
    """`||out - ref|| / ||ref||`; infinite where `out` is not finite everywhere."""
    ref, indices = picked
    if not bool(torch.isfinite(out).all()):
        return math.inf
    some = out.detach()
    for dim, index in enumerate(indices):
        if index is not None and len(index) != some.shape[dim]:
            if int(index[-1]) >= some.shape[dim]:
                return math.inf
            some = some.index_select(dim, index)
    if some.shape != ref.shape:
        return math.inf
    size, difference = float(ref.norm()), float((some.double() - ref).norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


# Running


def run(case: Check, inputs: Inputs) -> dict[str, Tensor]:
    """`y` and the wanted gradients through `hut_linear` and autograd."""
    wanted = GRADIENTS if case.wanted is None else case.wanted
    leaves = {
        name: value.detach().requires_grad_()
        for name in wanted
        if (value := getattr(inputs, name)) is not None
    }
    at = {name: leaves.get(name, getattr(inputs, name)) for name in GRADIENTS}
    y = hut_linear(
        at["x"], inputs.weight, at["hut_A"], at["hut_B"], at["bias"],
        gamma=at["gamma"], beta=at["beta"], backend=case.backend, **case.spec,
    )  # fmt: skip
    if not leaves:
        return {"y": y}
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _merged(case: Check, inputs: Inputs) -> Tensor:
    """The merged weight, in the base weight's type."""
    spec = case.spec
    form = spec["transform"], spec["offset"], spec["scaling"]
    factors = inputs.hut_A, inputs.hut_B, inputs.gamma
    return ops.weight(inputs.weight, *factors, *form, inputs.weight.dtype, case.backend)


@contextlib.contextmanager
def forced(case: Check) -> Iterator[None]:
    """The case's strategies, and its float32 precision."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    strategies = {} if case.strategies is None else dict(zip(PARTS, case.strategies, strict=True))
    try:
        with planner.force(**strategies):
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def rows_of(
    kernel: str | None = None, changes: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Notes which table rows are looked up, by kernel; `changes` go into those of `kernel`."""
    from hut_kernels.triton import backend

    found: dict[str, Any] = {}
    original = backend.launch_config

    def look_up(name: str, *rest: Any, **options: Any) -> Any:
        row = original(name, *rest, **options)
        if changes and name == kernel:
            row = dataclasses.replace(row, **changes)
        found[name] = row
        return row

    backend.launch_config = look_up
    try:
        yield found
    finally:
        backend.launch_config = original


def check(case: Check, device: torch.device) -> dict[str, Any]:
    """Runs a case twice and compares; never raises.

    Returns:
        `status` (`passed`, `failed`, `skipped`: no room on the device, `unfit`: a row of other
        values that does not compile or fit), `errors` and `limits` by tensor, `rows` that ran,
        `problems` in words, `seconds`.
    """
    begin = time.perf_counter()
    try:
        result = _no_room(case, device) or _checked(case, device)
    except Exception as failure:
        result = {"status": _status(case, failure), "problems": [_last_words(failure)]}
    if device.type == "cuda" and case.bytes > 1 << 30 and "CUDA error" not in str(result):
        torch.cuda.empty_cache()  # other workers want the room
    return {**result, "seconds": round(time.perf_counter() - begin, 3)}


def _checked(case: Check, device: torch.device) -> dict[str, Any]:
    inputs = make(case, device)
    looked_up = (
        rows_of(case.kernel, case.row)
        if case.backend == "triton"
        else contextlib.nullcontext(dict[str, Any]())
    )
    with forced(case), looked_up as rows, poisoned():
        first = run(case, inputs)
        again = run(case, inputs)
    problems = [
        f"{name}: two runs differ" for name in first if not torch.equal(first[name], again[name])
    ]
    del again
    if case.strategies == STAGED and case.wanted is None:
        with forced(case), poisoned():
            first["W"] = _merged(case, inputs)
    if case.update is not None:
        errors, limits = _update_errors(case, inputs, first["y"])
    else:
        wanted = expected(case, inputs)
        errors = {name: error(out, wanted[name]) for name, out in first.items()}
        limits = {name: limit(case, out.dtype) for name, out in first.items()}
    problems += [
        f"{name}: error {errors[name]:.2e}, limit {limits[name]:.2e}"
        for name in errors
        if not errors[name] <= limits[name]
    ]
    return {
        "status": "failed" if problems else "passed",
        "errors": errors,
        "limits": limits,
        "problems": problems,
        "rows": {name: dataclasses.asdict(row) for name, row in rows.items()},
        "missing": _missing(case, rows),
    }


def _update_errors(
    case: Check, inputs: Inputs, y: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    wanted = expected_update(case, inputs)
    if case.update is not None and case.update < 1e-2:
        gain = float((y.double() * wanted).sum() / (wanted * wanted).sum())
        return {"gain - 1": abs(gain - 1)}, {"gain - 1": _GAIN[1] - 1}
    return {"update": error(y, (wanted, (None, None)))}, {"update": update_limit(case)}


def _missing(case: Check, rows: dict[str, Any]) -> list[str]:
    """The kernels that the forced strategies name and that did not run."""
    if case.strategies is None or case.backend != "triton":
        return []
    asked = set(GRADIENTS if case.wanted is None else case.wanted)
    needed = {
        "forward": True,
        "grad_input": "x" in asked,
        "grad_factors": bool(asked & {"hut_A", "hut_B", "gamma"}),
    }
    forced_parts = zip(PARTS, case.strategies, strict=True)
    return sorted(
        {
            KERNELS[part, strategy]
            for part, strategy in forced_parts
            if needed[part] and KERNELS[part, strategy] not in rows
        }
    )


def _no_room(case: Check, device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    if case.bytes > 1 << 30:
        torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if case.bytes <= free:
        return None
    words = f"takes about {case.bytes / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    return {"status": "skipped", "problems": [words]}


def _status(case: Check, failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        return "skipped"
    return "failed" if case.row is None else "unfit"


def _last_words(failure: Exception) -> str:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    words = f"{type(failure).__name__}: {failure}".strip().splitlines()
    return f"{' '.join(words)[:400]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
