"""Limits, inputs and float64 references that the tests share.

How to read a test:

    case = make_normal(9, 48, 36, 3, dtype=torch.float16, vectors="bias gamma")
    check(case, run(case, backend="triton"))

The first line draws one layer: 9 tokens, in_features 48, out_features 36, r 3. `make` draws values
whose sums never cancel, `make_normal` those of a real layer. `run` computes y and every gradient by
`hut_linear`, `operators` by `torch.ops.hut.*`; both give a dict by name. `check` compares each with
`case.expected()`, float64, as ||out - ref|| / ||ref||, at the limits of docs/definition.md.
`case.layer` is the package's own tuple, `laid_out` changes strides, and `cancelling` with
`update_of` looks at the update on its own. tests/test_example.py needs none of this.

The reference is written from the formulas of docs/definition.md in NumPy, with the groups by
integer arithmetic; it shares no code with the package. Nothing here needs more than NumPy and
PyTorch; strategies.py has Hypothesis's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TRAINABLE = ("x", "hut_A", "hut_B", "gamma", "beta", "bias")

TF32_LIMIT = 2e-3  # of float32 where tf32 is allowed
_LIMITS = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 8e-3}
# The update on its own: (merged, split). bfloat16's first is for low_rank; two_sided has 6e-2.
_UPDATE_LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (8e-3, 1e-3),
    torch.bfloat16: (5e-2, 5e-3),
}


def limit(dtype: torch.dtype, longest: int, result: torch.dtype | None = None) -> float:
    """The greatest error of a result: compute type, longest sum, and the result's own rounding."""
    if dtype == torch.float32:
        allowed = 2e-6 * max(1.0, math.sqrt(longest / 4096))
    else:
        allowed = _LIMITS[dtype]
    if result is None or torch.finfo(result).eps <= torch.finfo(dtype).eps:
        return allowed
    return allowed + torch.finfo(result).eps / 2


def update_limit(dtype: torch.dtype, transform: str, precision: str) -> float:
    """The greatest error of the update, where the base cancels."""
    merged, split = _UPDATE_LIMITS[dtype]
    if precision == "split":
        return split
    return 6e-2 if (dtype, transform) == (torch.bfloat16, "two_sided") else merged


def error(out: Tensor, ref: Any) -> float:
    """`||out - ref|| / ||ref||` in float64; infinite for another shape or anything not finite."""
    out64 = out.detach().cpu().double().numpy()
    ref64 = np.asarray(ref, dtype=np.float64)
    if out64.shape != ref64.shape or not np.isfinite(out64).all():
        return math.inf
    size = np.linalg.norm(ref64)
    difference = np.linalg.norm(out64 - ref64)
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return float(difference / size)


def groups(size: int, r: int) -> list[int]:
    """`floor(i * r / size)` for each i."""
    return [i * r // size for i in range(size)]


@dataclass(repr=False)
class Case:
    """One layer's inputs, its upstream gradient and its options."""

    x: Tensor
    weight: Tensor
    hut_A: Tensor
    hut_B: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    grad: Tensor
    transform: str = "low_rank"
    offset: float = 1.0
    scaling: float = 1.0
    precision: str = "merged"

    def __repr__(self) -> str:
        def short(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            kind = str(value.dtype).removeprefix("torch.")
            return f"{kind}{list(value.shape)} by {value.stride()}"

        fields = (f"{f.name}={short(getattr(self, f.name))}" for f in dataclasses.fields(self))
        return f"Case({', '.join(fields)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what Hypothesis prints

    @property
    def spec(self):
        from hut_kernels.layer import Spec

        return Spec(self.transform, self.offset, self.scaling, self.precision)

    @property
    def layer(self):
        from hut_kernels.layer import Layer

        vectors = self.bias, self.gamma, self.beta
        return Layer(self.weight, self.hut_A, self.hut_B, *vectors, self.spec)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `hut_linear`."""
        names = ("transform", "offset", "scaling", "gamma", "beta", "precision")
        return {name: getattr(self, name) for name in names}

    @property
    def longest(self) -> int:
        """The longest sum behind any result."""
        return max(self.grad.numel() // max(1, len(self.weight)), *self.weight.shape, 1)

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def to(self, device: str) -> Case:
        tensors = {
            f.name: value.to(device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return self.replace(**tensors)

    def multiplier(self) -> np.ndarray:
        """T, `[O, K]`."""
        A, B = _np(self.hut_A), _np(self.hut_B)
        if self.transform == "low_rank":
            return self.offset + self.scaling * np.einsum("ok,ki->oi", B, A)
        r, K = A.shape
        p, q = groups(len(B), r), groups(K, r)
        return np.array([[B[o, q[i]] * A[p[o], i] for i in range(K)] for o in range(len(B))])

    def merged_weight(self) -> np.ndarray:
        """`gamma W0 T`, `[O, K]`."""
        T = self.multiplier().reshape(self.weight.shape)
        return self._gamma()[:, None] * _np(self.weight) * T

    def expected(self) -> dict[str, np.ndarray]:
        """`y`, and the gradient of each input by name."""
        x, W0, g = _np(self.x), _np(self.weight), _np(self.grad)
        O, K = W0.shape
        W = W0 * self.multiplier().reshape(O, K)
        gamma = self._gamma()
        bias = np.zeros(O) if self.bias is None else _np(self.bias)
        beta = np.zeros(O) if self.beta is None else _np(self.beta)
        rows, grads = x.reshape(math.prod(x.shape[:-1]), K), g.reshape(math.prod(g.shape[:-1]), O)
        G = grads.T @ rows
        H0 = G * W0
        d_A, d_B = self._factor_gradients(gamma[:, None] * H0)
        sums = grads.sum(0)
        return {
            "y": gamma * (x @ W.T + bias) + beta,
            "x": (gamma * g) @ W,
            "hut_A": d_A,
            "hut_B": d_B,
            "gamma": (W * G).sum(1) + bias * sums,
            "WG": (W * G).sum(1),
            "beta": sums,
            "bias": gamma * sums,
        }

    def _factor_gradients(self, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        A, B = _np(self.hut_A), _np(self.hut_B)
        if self.transform == "low_rank":
            return self.scaling * B.T @ H, self.scaling * H @ A.T
        d_A, d_B = np.zeros_like(A), np.zeros_like(B)
        (O, K), r = H.shape, len(A)
        p, q = groups(O, r), groups(K, r)
        for o in range(O):
            for i in range(K):
                d_B[o, q[i]] += H[o, i] * A[p[o], i]
                d_A[p[o], i] += H[o, i] * B[o, q[i]]
        return d_A, d_B

    def _gamma(self) -> np.ndarray:
        return np.ones(len(self.weight)) if self.gamma is None else _np(self.gamma)


def _np(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def make(
    N: int | tuple[int, ...],
    K: int,
    O: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    factor_dtype: torch.dtype = torch.float32,
    vectors: str = "",
    seed: int | None = None,
    device: str = "cpu",
    **options: Any,
) -> Case:
    """Random inputs; `vectors` names those of `bias`, `gamma` and `beta` that there are.

    Factors are such that T has the size of 1. No sum of the forward or of a gradient cancels: the
    signs of x, W0 and g are a product of one sign per index, and all else is positive. So a limit
    on the relative error also holds for results of a single element.
    """
    generator = torch.Generator(device).manual_seed(_draw() if seed is None else seed)

    def positive(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator, device=device, dtype=torch.float64)

    def signs(size: int) -> Tensor:
        return 1.0 - 2.0 * torch.randint(2, (size,), generator=generator, device=device)

    leading = (N,) if isinstance(N, int) else N
    s_k, s_o = signs(K), signs(O)
    two_sided = options.get("transform") == "two_sided"
    spread = 1.0 if two_sided else math.sqrt(r)
    direct = 1.0 if two_sided or options.get("offset", 1.0) == 0 else 0.5
    weight_dtype = weight_dtype or dtype
    factors = {"dtype": factor_dtype}

    def vector(name: str, sign: Tensor | float) -> Tensor | None:
        return (sign * positive(O)).to(**factors) if name in vectors.split() else None

    return Case(
        x=(s_k * positive(*leading, K)).to(dtype),
        weight=(s_o[:, None] * s_k * positive(O, K)).to(weight_dtype),
        hut_A=(positive(r, K) * direct / spread).to(**factors),
        hut_B=(positive(O, r) / spread).to(**factors),
        bias=vector("bias", s_o),
        gamma=vector("gamma", 1.0),
        beta=vector("beta", s_o),
        grad=(s_o * positive(*leading, O)).to(dtype),
        **options,
    )


def make_normal(*args: Any, seed: int | None = None, **kwargs: Any) -> Case:
    """As `make`, of normally distributed values: what the sizes of a real layer look like."""
    case = make(*args, seed=seed, **kwargs)
    generator = torch.Generator(case.x.device).manual_seed(_draw() if seed is None else seed)

    def normal(like: Tensor, scale: float) -> Tensor:
        values = torch.randn(like.shape, generator=generator, device=like.device)
        return (values * scale).to(like.dtype)

    return case.replace(
        x=normal(case.x, 1.0),
        weight=normal(case.weight, 1 / math.sqrt(max(1, case.weight.shape[1]))),
        grad=normal(case.grad, 1.0),
    )


def _draw() -> int:
    return int(torch.randint(2**31, ()).item())


# Strides

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "shifted")


def lay(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them is NaN.

    In bfloat16 on a CPU it is 1e30: at odd sizes PyTorch's own product reads one element past the
    end of a row, and multiplies it with 0.
    """
    if tensor.dim() == 0 or layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.contiguous()
    finite = tensor.dtype == torch.bfloat16 and not tensor.is_cuda
    between = 1e30 if finite else math.nan
    if layout == "shifted":  # contiguous, but from an odd address
        view = tensor.new_full((tensor.numel() + 1,), between)[1:].view(tensor.shape)
        return view.copy_(tensor)
    step = 2 if layout == "sliced" else 1
    shape = [size * step + 3 for size in tensor.shape]
    buffer = tensor.new_full(shape, between)
    view = buffer[tuple(slice(1, 1 + size * step, step) for size in tensor.shape)]
    return view.copy_(tensor)


def expand(tensor: Tensor) -> Tensor:
    """The first row for every row, by stride 0."""
    return tensor[:1].expand_as(tensor)


def laid_out(case: Case, layout: str, grad: str | None = None) -> Case:
    """The case with all its tensors in a layout; `grad` may be `"expanded"` or `"constant"`."""
    tensors = {
        name: lay(value, layout)
        for name in ("x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta", "grad")
        if (value := getattr(case, name)) is not None
    }
    if grad == "expanded":
        tensors["grad"] = expand(tensors["grad"])
    elif grad == "constant":  # what .sum().backward() sends
        one = torch.ones((), dtype=case.grad.dtype, device=case.grad.device)
        tensors["grad"] = one.expand_as(case.grad)
    return case.replace(**tensors)


# The update on its own


def cancelling(case: Case, size: float) -> Case:
    """The base cancels exactly (`x W0^T = 0`), and T - 1 has the root mean square `size`."""
    x, weight = case.x.clone(), case.weight.clone()
    x[..., 1::2] = x[..., ::2]
    weight[:, 1::2] = -weight[:, ::2]
    A, B = torch.randn_like(case.hut_A), torch.randn_like(case.hut_B)
    if case.transform == "two_sided":
        # (1 + a)(1 + b) - 1 has the variance of a and b together.
        A, B = 1 + A * size / math.sqrt(2), 1 + B * size / math.sqrt(2)
    elif case.offset == 1:
        A = A * (size / math.sqrt(len(A)) / abs(case.scaling))
    else:  # the first component makes the 1, the others what is left
        A = A * (size / math.sqrt(len(A) - 1) / abs(case.scaling))
        A[0], B[:, 0] = 1.0 / case.scaling, 1.0
    return case.replace(x=x, weight=weight, hut_A=A, hut_B=B)


def update_of(case: Case) -> np.ndarray:
    """`x (W0 * (T - 1))^T` in float64."""
    return _np(case.x) @ (_np(case.weight) * (case.multiplier() - 1.0)).T


def gain(out: Tensor, update: np.ndarray) -> float:
    """The share of the update that arrives: `<y, d> / ||d||^2`."""
    return float((_np(out) * update).sum() / (update * update).sum())


# Running a layer


def run(case: Case, **how: Any) -> dict[str, Tensor]:
    """`y` and every gradient, through `hut_linear` and autograd."""
    from hut_kernels import hut_linear

    leaves = {
        name: value.detach().requires_grad_()
        for name in TRAINABLE
        if (value := getattr(case, name)) is not None
    }
    x, A, B = leaves["x"], leaves["hut_A"], leaves["hut_B"]
    options = {**case.options, "gamma": leaves.get("gamma"), "beta": leaves.get("beta"), **how}
    y = hut_linear(x, case.weight, A, B, leaves.get("bias"), **options)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad)
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


def check(case: Case, results: dict[str, Tensor], longest: int | None = None) -> None:
    """Each result against float64 at its limit, and its type: y and dx x's, others their own."""
    expected = case.expected()
    for name, out in results.items():
        own = {"y": case.x, "WG": None}.get(name, getattr(case, name, None))
        if own is not None:
            assert out.dtype == own.dtype, f"{name} is {out.dtype}, not {own.dtype}"
        allowed = limit(case.x.dtype, longest or case.longest, out.dtype)
        found = error(out, expected[name])
        assert found <= allowed, f"{name}: error {found:.3e} is above {allowed:.1e}"


GRADIENTS = ("x", "hut_A", "hut_B", "WG")


def operators(
    case: Case, backend: str, needs: tuple[bool, bool, bool, bool] = (True,) * 4
) -> dict[str, Tensor]:
    """Results of the operators: `y`, and those needed of dx and the factor gradients."""
    from hut_kernels import ops

    factors = case.weight, case.hut_A, case.hut_B
    form = case.transform, case.offset, case.scaling
    vectors = case.bias, case.gamma, case.beta
    grads = ops.backward(
        case.grad, case.x, *factors, case.gamma, *form, case.precision, *needs, backend
    )
    names = [name for name, needed in zip(GRADIENTS, needs, strict=True) if needed]
    return {
        "y": ops.forward(case.x, *factors, *vectors, *form, case.precision, backend),
        **dict(zip(names, grads, strict=True)),
    }


class Recorder(TorchDispatchMode):
    """Every operator that runs, in order: `(name, arguments)`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.calls.append((func.name(), args))
        return func(*args, **(kwargs or {}))

    def names(self, prefix: str = "") -> list[str]:
        return [name for name, _ in self.calls if name.startswith(prefix)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills memory with NaN as it is handed out, so that an output that nobody wrote shows."""
    with torch.device("meta"):  # torch lists its constructors once, and must list its own
        torch.empty(0)

    def poisoning(allocate: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(math.nan)
            return tensor

        return empty

    places = (
        *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
        *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
    )
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, allocate in kept:
        setattr(owner, name, poisoning(allocate))
    try:
        yield
    finally:
        for owner, name, allocate in kept:
            setattr(owner, name, allocate)
