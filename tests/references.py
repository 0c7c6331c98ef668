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

The reference is written from the formulas of docs/definition.md in float64, with the groups by
integer arithmetic, on the case's device; it shares no code with the package. Nothing here needs
more than NumPy and PyTorch; strategies.py has Hypothesis's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLED = 1 << 26  # elements of a float64 tensor of the reference, at most
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
    ref64 = torch.as_tensor(ref, dtype=torch.float64, device=out.device)
    if out.shape != ref64.shape or not bool(torch.isfinite(out).all()):
        return math.inf
    size, difference = float(ref64.norm()), float((out.detach().double() - ref64).norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


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

    @torch.no_grad()
    def multiplier(self) -> np.ndarray:
        """T, `[O, K]`."""
        return self._multiplier(*self._indices(At())).cpu().numpy()

    @torch.no_grad()
    def merged_weight(self) -> np.ndarray:
        """`gamma W0 T`, `[O, K]`."""
        return self._gamma().cpu().numpy()[:, None] * _np(self.weight) * self.multiplier()

    def expected(self) -> dict[str, np.ndarray]:
        """`y`, and the gradient of each input by name."""
        return {name: value.cpu().numpy() for name, value in self.exact().items()}

    @torch.no_grad()
    def exact(self, at: At | None = None) -> dict[str, Tensor]:
        """`expected` on the case's device, of a large case only a sample of it."""
        x, grad = self.x, self.grad
        O, K = self.weight.shape
        rows, cols = self._indices(at or At())
        gamma, A, B = self._gamma(), self.hut_A.double(), self.hut_B.double()
        bias, beta = (self._vector(v, 0.0) for v in (self.bias, self.beta))
        W0_rows, W0_cols = self.weight[rows].double(), self.weight[:, cols].double()
        every_row, every_col = self._indices(At())
        W_rows = W0_rows * self._multiplier(rows, every_col)
        W_cols = W0_cols * self._multiplier(every_row, cols)
        tokens = x.reshape(math.prod(x.shape[:-1]), K), grad.reshape(math.prod(grad.shape[:-1]), O)
        G_rows, G_cols = _products(*tokens, rows, cols)
        H_rows, H_cols = gamma[rows, None] * G_rows * W0_rows, gamma[:, None] * G_cols * W0_cols
        if self.transform == "low_rank":
            d_B, d_A = self.scaling * H_rows @ A.T, self.scaling * B.T @ H_cols
        else:
            p, q = self._groups()
            d_B = B.new_zeros(len(rows), len(A)).index_add_(1, q, H_rows * A[p[rows]])
            d_A = A.new_zeros(len(A), len(cols)).index_add_(0, p, H_cols * B[:, q[cols]])
        if at is not None:
            x, grad = x[at.tokens], grad[at.tokens]
        sums = tokens[1].sum(0, dtype=torch.float64)
        return {
            "W": gamma[rows, None] * W_rows,
            "y": gamma[rows] * (x.double() @ W_rows.T + bias[rows]) + beta[rows],
            "x": (gamma * grad.double()) @ W_cols,
            "hut_A": d_A,
            "hut_B": d_B,
            "gamma": (W_rows * G_rows).sum(1) + (bias * sums)[rows],
            "WG": (W_rows * G_rows).sum(1),
            "beta": sums[rows],
            "bias": (gamma * sums)[rows],
        }

    def _multiplier(self, rows: Tensor, cols: Tensor) -> Tensor:
        A, B = self.hut_A.detach().double(), self.hut_B.detach().double()
        if self.transform == "low_rank":
            return self.offset + self.scaling * (B[rows] @ A[:, cols])
        p, q = self._groups()
        return B[rows][:, q[cols]] * A[p[rows]][:, cols]

    def _groups(self) -> tuple[Tensor, Tensor]:
        """The group of each row of W0, and of each column."""
        (O, K), r = self.weight.shape, len(self.hut_A)
        options: Any = {"dtype": torch.int64, "device": self.weight.device}
        return torch.tensor(groups(O, r), **options), torch.tensor(groups(K, r), **options)

    def _indices(self, at: At) -> tuple[Tensor, Tensor]:
        O, K = self.weight.shape
        device = self.weight.device
        rows = torch.arange(O, device=device) if at.rows is None else at.rows
        return rows, torch.arange(K, device=device) if at.cols is None else at.cols

    def _gamma(self) -> Tensor:
        return self._vector(self.gamma, 1.0)

    def _vector(self, vector: Tensor | None, default: float) -> Tensor:
        options: Any = {"dtype": torch.float64, "device": self.weight.device}
        if vector is None:
            return torch.full((len(self.weight),), default, **options)
        return vector.detach().double()


class At(NamedTuple):
    """A sample of tokens, and of the rows and columns of W0; None is all of them."""

    tokens: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None

    def pick(self, name: str, result: Tensor) -> Tensor:
        """The part of a result that `Case.exact` gives at this sample."""
        places = {"y": self[:2], "x": (self.tokens, self.cols), "hut_A": (None, self.cols)}
        for dim, index in enumerate(places.get(name, (self.rows,))):
            result = result if index is None else result.index_select(dim, index)
        return result


def _products(x: Tensor, grad: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and the columns of `G = grad^T x`, a block of tokens at a time."""
    options: Any = {"dtype": torch.float64, "device": x.device}
    G_rows = torch.zeros(len(rows), x.shape[1], **options)
    G_cols = torch.zeros(grad.shape[1], len(cols), **options)
    block = max(1, SAMPLED // max(1, x.shape[1] + grad.shape[1]))
    for start in range(0, len(x), block):
        x_n, g_n = (one[start : start + block].detach().double() for one in (x, grad))
        G_rows += g_n[:, rows].T @ x_n
        G_cols += g_n.T @ x_n[:, cols]
    return G_rows, G_cols


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


def run(case: Case, trained: tuple[str, ...] = TRAINABLE, **how: Any) -> dict[str, Tensor]:
    """`y` and the gradients of what is trained, through `hut_linear` and autograd."""
    from hut_kernels import hut_linear

    leaves = {
        name: value.detach().requires_grad_()
        for name in trained
        if (value := getattr(case, name)) is not None
    }
    x, A, B, bias = (leaves.get(n, getattr(case, n)) for n in ("x", "hut_A", "hut_B", "bias"))
    vectors = {name: leaves.get(name, getattr(case, name)) for name in ("gamma", "beta")}
    y = hut_linear(x, case.weight, A, B, bias, **{**case.options, **vectors, **how})
    if not leaves:
        return {"y": y}
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
