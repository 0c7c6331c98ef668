"""The product's kernels through the executor: which calls, at which shapes, compared with what.

The calls are those of the operators; the planner is told which strategy to take, and which device
it plans for. Shapes are such that every mask matters, but in a few calls of whole tiles: no size is
a multiple of its tile, all but the tokens are multiples of 16, so that loads are the vectors and
asynchronous copies of the plain case, and every matrix has rows longer than it, so that whatever is
read or written past a row's end is nobody's memory. Loops run for more passes than their pipelines
have stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hut_kernels import auto, devices, ops, planner

from .. import references
from .launch import Log, executing

ARCHITECTURES = (80, 89, 90, 100, 120)
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
FUSED = {"forward": "fused", "grad_input": "fused", "grad_factors": "fused"}
STAGED = {"forward": "staged", "grad_input": "staged", "grad_factors": "chunked"}
# What runs, and the strategies that it is told: a kernel of the fused path, the two of the staged
# one, the merged weight, or a whole forward and backward.
STRATEGIES = {
    "forward": FUSED,
    "grad_input": FUSED,
    "grad_factors": FUSED,
    "fused": FUSED,
    "staged": STAGED,
    "grad_reduce": STAGED,
    "weight": STAGED,
}


@dataclass(frozen=True)
class Call:
    """One call of the operators.

    Attributes:
        what: A key of `STRATEGIES`.
        dtype: A key of `TYPES`.
        N, K, O, r: Sizes.
        sms: Multiprocessors of the device that is planned for; more of them split reductions.
        layout: `"padded"`, or one of `references.LAYOUTS`.
        quick: Whether CI runs it.
        options: Of `references.make_normal`.
    """

    what: str
    dtype: str
    N: int
    K: int
    O: int
    r: int = 16
    sms: int = 1
    layout: str = "padded"
    quick: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = [str(value).removeprefix("torch.") for value in self.options.values()]
        marks = [f"sms{self.sms}"] * (self.sms > 1) + [self.layout] * (self.layout != "padded")
        sizes = f"{self.N}x{self.K}x{self.O}-r{self.r}"
        return "-".join([self.what, self.dtype, sizes, *options, *marks]).replace(" ", "+")

    def make(self) -> references.Case:
        """The inputs, the same in every run: normally distributed, the factors too.

        So two elements that change places are seen in the norm of a result. The factors of `split`
        are positive, or its two products would cancel.
        """
        case = references.make_normal(
            self.N, self.K, self.O, self.r, dtype=TYPES[self.dtype], seed=0, **self.options
        )
        if case.precision != "split":
            draw = torch.Generator().manual_seed(1)
            factors = case.hut_A, case.hut_B
            A, B = (torch.randn(f.shape, generator=draw).to(f.dtype) for f in factors)
            case = case.replace(hut_A=A, hut_B=B / self.r**0.5)
        if self.layout == "transposed":  # the weight alone, as Conv1D's
            return pad(case).replace(weight=references.lay(case.weight, "transposed"))
        return pad(case) if self.layout == "padded" else references.laid_out(case, self.layout)


def pad(case: references.Case) -> references.Case:
    """The same values in rows that are at least 16 elements longer, of NaN."""

    def longer(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        buffer = tensor.new_full((rows, columns // 16 * 16 + 32), float("nan"))
        return buffer[:, :columns].copy_(tensor)

    names = "x", "weight", "hut_A", "hut_B", "grad"
    return case.replace(**{name: longer(getattr(case, name)) for name in names})


@contextlib.contextmanager
def planning_for(arch: int, sms: int) -> Iterator[None]:
    """Within, the planner takes CPU tensors for those of a device."""
    device = dataclasses.replace(devices.find_device(f"sm_{arch}"), sms=sms, l2=1 << 16)
    with mock.patch.object(auto, "_device", return_value=device):
        yield


@contextlib.contextmanager
def precision_of(dtype: str) -> Iterator[None]:
    """Within, float32 products are tf32 or not."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def run(
    call: Call, arch: int, case: references.Case | None = None, **how: Any
) -> tuple[dict[str, Tensor], Log]:
    """The results of a call by name, and what was launched; `how` is for `executing`.

    Memory that nobody has written is NaN.
    """
    case = case or call.make()
    with (
        references.poisoned(),
        planning_for(arch, call.sms),
        precision_of(call.dtype),
        planner.force(**STRATEGIES[call.what]),
        executing(arch, **how) as log,
    ):
        return _results(call, case), log


def _results(call: Call, case: references.Case) -> dict[str, Tensor]:
    factors = case.weight, case.hut_A, case.hut_B
    form = case.transform, case.offset, case.scaling
    if call.what == "weight":
        return {"weight": ops.weight(*factors, case.gamma, *form, case.x.dtype, "triton")}
    needs = {
        "forward": (False, False, False, False),
        "grad_input": (True, False, False, False),
        "grad_factors": (False, True, True, True),
        "grad_reduce": (False, True, True, True),
    }.get(call.what, (True, True, True, True))
    results = {}
    if any(needs):
        grads = ops.backward(
            case.grad, case.x, *factors, case.gamma, *form, case.precision, *needs, "triton"
        )
        names = [n for n, needed in zip(references.GRADIENTS, needs, strict=True) if needed]
        results = dict(zip(names, grads, strict=True))
    if call.what in ("forward", "fused", "staged"):
        vectors = case.bias, case.gamma, case.beta
        results["y"] = ops.forward(case.x, *factors, *vectors, *form, case.precision, "triton")
    return results


def errors(
    call: Call, case: references.Case, results: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """For each result its error against float64, and the limit of docs/definition.md."""
    expected = {**case.expected(), "weight": case.merged_weight()}
    found = {}
    for name, out in results.items():
        limit = references.limit(case.x.dtype, case.longest, out.dtype)
        limit = references.TF32_LIMIT if call.dtype == "tf32" else limit
        found[name] = references.error(out, expected[name]), limit
    return found


# The shapes of each kernel, for the tokens of each class in the tables: N, K, O.
_SHAPES = {
    "forward": ((13, 720, 112), (45, 400, 112), (150, 400, 112)),
    "grad_input": ((13, 240, 368), (45, 240, 368), (150, 240, 368)),
    "grad_factors": ((300, 240, 240), (75, 240, 240)),
    "grad_reduce": ((20, 240, 240),),
    "weight": ((1, 240, 112),),
}
_EVEN = (45, 512, 512)  # groups of two_sided, with r 4, fill whole tiles
_LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fused", {"vectors": "bias gamma beta"}),
    ("fused", {"transform": "two_sided", "vectors": "bias gamma beta"}),
    ("staged", {"vectors": "bias gamma beta"}),
    ("staged", {"precision": "split"}),
    ("staged", {"precision": "split", "transform": "two_sided", "vectors": "gamma"}),
)


def calls() -> list[Call]:
    """All calls; CI runs the `quick` ones."""
    found = []
    for what, shapes in _SHAPES.items():
        for shape in shapes:
            for dtype in TYPES:
                quick = dtype == "bf16" or (shape == shapes[0] and dtype != "fp32")
                found.append(Call(what, dtype, *shape, quick=quick))
        N, K, O = shapes[len(shapes) // 2]
        found += _variants(Call(what, "bf16", N, K, O))
    found += [
        Call("forward", "bf16", 13, 1040, 112, sms=8, quick=True, options={"vectors": "bias"}),
        Call("grad_input", "bf16", 13, 240, 1040, sms=8, quick=True),
        Call("forward", "bf16", 1, 240, 16),
        Call("grad_factors", "bf16", 1, 240, 240, sms=4),
        # Whole tiles, whose loads have no masks, and tokens that wrap.
        *(Call(what, "bf16", 150, 256, 256, quick=True) for what in FUSED),
    ]
    for what, options in _LAYERS:
        for dtype in ("bf16", "fp16"):
            found.append(Call(what, dtype, 45, 240, 208, quick=dtype == "bf16", options=options))
    return found


def _variants(plain: Call) -> list[Call]:
    """Options of a call, next to the plain case."""

    def also(**changes: Any) -> Call:
        return dataclasses.replace(plain, **changes)

    found = [also(r=r, quick=r == 13) for r in (1, 3, 13, 40, 64, 128)]
    found += [also(dtype=dtype, r=128) for dtype in ("fp16", "tf32")]
    for dtype in ("bf16", "fp16"):
        found.append(also(dtype=dtype, options={"offset": 0.0, "scaling": 0.75}))
        ragged = {"transform": "two_sided"}
        found.append(also(dtype=dtype, options=ragged, quick=dtype == "bf16"))
    N, K, O = _EVEN
    even = {"transform": "two_sided", "vectors": "gamma"}
    found.append(also(N=N, K=K, O=O, r=4, options=even))
    found.append(also(options={"vectors": "bias gamma beta"}, quick=True))
    found.append(also(options={"weight_dtype": torch.float32}, quick=True))
    found.append(also(options={"factor_dtype": torch.bfloat16}))
    found.append(also(layout="transposed", quick=True))
    odd = {"K": plain.K - 7, "O": plain.O - 11, "layout": "shifted"}
    return [*found, also(**odd, quick=True), also(**odd, dtype="tf32")]
