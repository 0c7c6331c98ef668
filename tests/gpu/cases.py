"""One check on a device: random inputs, the tests' float64 reference, the errors.

The reference runs on the device too, for all rows and columns of W0 where they are few enough and
for a sample of them where they are not.
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

from hut_kernels import ops, planner

from .. import references
from ..references import At, Case, cancelling, expand, lay, poisoned

PARTS = ("forward", "grad_input", "grad_factors")
FUSED = ("fused", "fused", "fused")
STAGED = ("staged", "staged", "chunked")
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
_TF32_LIMIT = 2e-3


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
        return activations + gradients + weights + 12 * 8 * min(references.SAMPLED, self.K * self.O)


def make(case: Check, device: torch.device) -> Case:
    """Normally distributed inputs; W keeps the size of y near that of x, and T is near 1."""
    torch.manual_seed(case.seed + 1)
    factors, dtype = _DTYPES[case.factor_dtype], _DTYPES[case.dtype]

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def vector(name: str, center: float, size: float) -> Tensor | None:
        return (center + size * normal(case.O)).to(factors) if name in case.vectors else None

    A, B = normal(case.r, case.K), normal(case.O, case.r)
    two_sided = case.transform == "two_sided"
    A, B = (1 + 0.5 * A, 1 + 0.5 * B) if two_sided else (A * case.r**-0.5, B)
    weight_dtype = _DTYPES[case.weight_dtype or case.dtype]
    made = Case(
        x=normal(case.N, case.K, dtype=dtype),
        weight=normal(case.O, case.K, dtype=weight_dtype).mul_(case.K**-0.5),
        hut_A=A,
        hut_B=B,
        bias=vector("bias", 0, 1),
        gamma=vector("gamma", 1, 0.3),
        beta=vector("beta", 0, 1),
        grad=normal(case.N, case.O, dtype=dtype),
        **case.spec,
    )
    if case.update is not None:
        made = cancelling(made, case.update)
    made = made.replace(hut_A=made.hut_A.to(factors), hut_B=made.hut_B.to(factors))
    return _laid_out(made, case.layout)


def _laid_out(made: Case, layout: str) -> Case:
    if layout == "transposed":
        return made.replace(weight=lay(made.weight, layout))
    if layout == "expanded":
        return made.replace(grad=expand(made.grad))
    if not layout:
        return made
    how = {"sliced": "offset", "shifted": "shifted"}[layout]  # windows, or an odd address
    return made.replace(**{n: lay(getattr(made, n), how) for n in ("x", "weight", "grad")})


def sample(case: Check, device: torch.device) -> At:
    """The tokens, rows and columns at which results are compared: all, where they are few."""
    return At(
        _sample(case.N, references.SAMPLED // max(1, case.K + case.O), device),
        _sample(case.O, references.SAMPLED // max(1, case.K), device),
        _sample(case.K, references.SAMPLED // max(1, case.O), device),
    )


def _sample(size: int, most: int, device: torch.device) -> Tensor:
    """All indices, or some at random with the first and the last among them."""
    most = max(96, most)
    if size <= most:
        return torch.arange(size, device=device)
    generator = torch.Generator(device).manual_seed(size)
    some = torch.randint(size, (most - 80,), generator=generator, device=device)
    ends = torch.arange(-64, 16, device=device) % size
    return torch.unique(torch.cat([some, ends]))


def limit(case: Check, result: torch.dtype) -> float:
    """The greatest error of a result of this type: "How close is equal" of docs/definition.md."""
    dtype = _DTYPES[case.dtype]
    longest = max(case.N, case.K, case.O)
    allowed = references.limit(dtype, longest, result)
    if not case.tf32:
        return allowed
    return _TF32_LIMIT + (allowed - references.limit(dtype, longest))


# Running


def run(case: Check, inputs: Case) -> dict[str, Tensor]:
    """`y` and the wanted gradients through `hut_linear` and autograd."""
    wanted = references.TRAINABLE if case.wanted is None else case.wanted
    found = references.run(inputs, wanted, backend=case.backend)
    return {name: value.detach() for name, value in found.items()}


def _merged(case: Check, inputs: Case) -> Tensor:
    """The merged weight, in the base weight's type."""
    form = inputs.transform, inputs.offset, inputs.scaling
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
        at = sample(case, device)
        wanted = inputs.exact(at)
        errors = {name: _error(name, out, at, wanted[name]) for name, out in first.items()}
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


def _error(name: str, out: Tensor, at: At, wanted: Tensor) -> float:
    """The error at the sample; infinite for another shape or anything not finite anywhere."""
    if not bool(torch.isfinite(out).all()):
        return math.inf
    try:
        return references.error(at.pick(name, out), wanted)
    except (IndexError, RuntimeError):
        return math.inf


def _update_errors(
    case: Check, inputs: Case, y: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    wanted = references.update_of(inputs)
    if case.update is not None and case.update < 1e-2:
        return {"gain - 1": abs(references.gain(y, wanted) - 1)}, {"gain - 1": 0.02}
    allowed = references.update_limit(_DTYPES[case.dtype], case.transform, case.precision)
    return {"update": references.error(y, wanted)}, {"update": allowed}


def _missing(case: Check, rows: dict[str, Any]) -> list[str]:
    """The kernels that the forced strategies name and that did not run."""
    if case.strategies is None or case.backend != "triton":
        return []
    asked = set(references.TRAINABLE if case.wanted is None else case.wanted)
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
