"""The CPU fallback: blocks of rows, number formats, and no work beyond the products."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hut_kernels import multiplier, onednn, torch_backend
from hut_kernels.layer import Needs

from .references import (
    cancelling,
    check,
    error,
    laid_out,
    make,
    make_normal,
    operators,
    run,
    update_limit,
    update_of,
)

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0},
    "two_sided": {"transform": "two_sided"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)


def set_tile(monkeypatch, elements):
    """Makes a tile so small, in every type."""
    monkeypatch.setattr(multiplier, "_TILE", elements)
    monkeypatch.setattr(multiplier, "_ROUNDED_TILE", elements)


# Blocks of rows


@every_form
@every_dtype
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_any_row_block_gives_the_same(form, dtype, rows, precision, monkeypatch):
    """13 rows in blocks and tiles with and without a remainder, and in one."""
    monkeypatch.setattr(torch_backend, "_BLOCK", rows * 21)
    set_tile(monkeypatch, rows // 2 * 21)
    options = {"precision": precision, **form}
    case = make_normal(9, 21, 13, 3, dtype=dtype, vectors="bias gamma beta", **options)
    check(case, run(case))
    plain = case.replace(gamma=None)
    check(plain, run(plain))


@every_form
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_row_blocks_of_views(form, layout, monkeypatch):
    monkeypatch.setattr(torch_backend, "_BLOCK", 4 * 21)
    set_tile(monkeypatch, 2 * 21)
    case = laid_out(make_normal(9, 21, 13, 3, vectors="bias gamma", **form), layout)
    check(case, operators(case, "torch"))


def test_a_row_longer_than_a_block_is_a_block(monkeypatch):
    monkeypatch.setattr(torch_backend, "_BLOCK", 8)
    set_tile(monkeypatch, 8)
    case = make_normal(5, 21, 13, 3, vectors="gamma")
    check(case, operators(case, "torch"))


def test_no_temporary_is_larger_than_a_block(monkeypatch):
    """Beside W, and in the factor gradients beside nothing."""
    monkeypatch.setattr(torch_backend, "_BLOCK", 2 * 64)
    set_tile(monkeypatch, 2 * 64)
    case = make_normal(4, 64, 50, 3, vectors="gamma", offset=0.0)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
            sizes.extend(t.untyped_storage().nbytes() // t.element_size() for t in tensors)
            return out

    own = {case.weight.numel(), case.x.numel(), case.grad.numel()}
    with Sizes():
        grad_factors(case, True, True, True)
    gradients = max(case.hut_A.numel(), case.hut_B.numel())
    assert max(size for size in sizes if size not in own) <= max(2 * 64, gradients)


# Few tokens

# Tokens, in, out and r: groups of one size, of two, and more tokens than a group has rows.
FEW = [(1, 24, 12, 3), (4, 24, 12, 3), (5, 24, 12, 3), (9, 21, 13, 3), (3, 8, 8, 8), (3, 8, 8, 1)]


@pytest.fixture
def few(monkeypatch):
    """Every weight is large enough to be multiplied tile by tile."""
    monkeypatch.setattr(torch_backend, "_LARGE", 1)


@every_form
@every_dtype
@pytest.mark.parametrize("sizes", FEW, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_few_tokens_take_the_weight_tile_by_tile(form, dtype, sizes, rows, few, monkeypatch):
    set_tile(monkeypatch, rows * sizes[1])
    case = make_normal(*sizes, dtype=dtype, vectors="bias gamma beta", **form)
    check(case, run(case))
    plain = case.replace(gamma=None, bias=None, beta=None)
    check(plain, run(plain))


@every_form
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "offset"])
@pytest.mark.parametrize("grad", [None, "expanded", "constant"])
def test_few_tokens_in_any_layout(form, layout, grad, few):
    weight = {"weight_dtype": torch.bfloat16, "factor_dtype": torch.bfloat16}
    for types in ({}, weight):
        case = make_normal((2, 2), 24, 12, 3, vectors="bias gamma", **types, **form)
        case = laid_out(case, layout, grad)
        if case.weight.stride()[1] == 1:
            check(case, operators(case, "torch"))


@every_form
@pytest.mark.parametrize("needs", [(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 1)], ids=str)
def test_few_tokens_cost_what_is_asked_for(form, needs, few):
    case = make_normal(4, 24, 12, 3, vectors="gamma", **form)
    need_x, *factors = map(bool, needs)
    found = torch_backend.linear_backward(case.grad, case.x, case.layer, need_x, Needs(*factors))
    names = [n for n, need in zip(("x", "hut_A", "hut_B", "gamma"), needs, strict=True) if need]
    check(case, dict(zip(names, found, strict=True)))


def test_many_tokens_or_a_small_weight_are_taken_as_a_whole():
    weight = torch.empty(256, 256)
    x = torch.empty(torch_backend._FEW + 1, 256)
    assert torch_backend._are_few(x[1:], weight)
    assert not torch_backend._are_few(x, weight)
    assert not torch_backend._are_few(x[:0], weight)
    assert not torch_backend._are_few(x[1:], weight[1:])
    assert not torch_backend._are_few(x[1:], weight.t())


# A CPU that multiplies bfloat16


@pytest.fixture
def native(monkeypatch, few):
    """This CPU is one, or is taken for one; where oneDNN has no bfloat16, PyTorch stands in."""
    monkeypatch.setattr(onednn, "emulates_bf16", lambda: False)
    if not onednn._multiplies_bf16():
        monkeypatch.setattr(onednn, "_multiplies_bf16", lambda: True)
        monkeypatch.setattr(onednn, "linear_mul", linear_mul)


def linear_mul(x, weight, other):
    product = x.float() @ weight.float().t() + 1.0
    return (product * other.float()).to(x.dtype)


def test_the_stand_in_for_onednn_is_its_like():
    x, weight, other = (torch.randn(*size).bfloat16() for size in ((5, 3), (7, 3), (5, 7)))
    exact = (x.double() @ weight.double().t() + 1.0) * other.double()
    assert error(linear_mul(x, weight, other), exact) < 2**-8
    if onednn._multiplies_bf16():
        assert error(onednn.linear_mul(x, weight, other), exact) < 2**-8


@every_form
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("vectors", ["", "bias gamma beta"], ids=["plain", "vectors"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("rows", [5, 100])
def test_bfloat16_is_right_where_the_cpu_multiplies_it(
    form, layout, vectors, tokens, rows, native, monkeypatch
):
    set_tile(monkeypatch, rows * 21)
    case = make_normal(tokens, 21, 13, 3, dtype=torch.bfloat16, vectors=vectors, **form)
    for weight_dtype in (torch.bfloat16, torch.float32):
        typed = case.replace(weight=case.weight.to(weight_dtype))
        typed = laid_out(typed, layout)
        check(typed, run(typed))


@pytest.mark.parametrize("form", [FORMS["residual"], FORMS["direct"]], ids=["residual", "direct"])
def test_every_product_of_the_reduction_is_of_bfloat16_there(form, native):
    case = make_normal(9, 21, 13, 3, dtype=torch.bfloat16, **form)
    assert types_of_products(grad_factors, case, True, True, False) == {torch.bfloat16}


def test_an_update_arrives_through_a_rounded_increment(native):
    """At the limit of every other W: the increment's rounding is an error of the update alone."""
    case = cancelling(make_normal(32, 256, 192, 4, dtype=torch.bfloat16), 5e-2)
    assert torch_backend._rounds_increment(case.layer, torch.bfloat16)
    limit = update_limit(torch.bfloat16, "low_rank", "merged")
    assert error(forward(case), update_of(case)) < limit


def test_few_tokens_are_fewer_where_the_cpu_multiplies_bfloat16(native):
    weight = torch.empty(256, 256, dtype=torch.bfloat16)
    assert torch_backend._are_few(torch.empty(1, 256, dtype=torch.bfloat16), weight)
    assert not torch_backend._are_few(torch.empty(2, 256, dtype=torch.bfloat16), weight)
    assert torch_backend._are_few(torch.empty(2, 256), weight)


# W as a whole


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("gamma", ["", "gamma"])
def test_the_weight_of_any_layout_is_made_in_tiles(form, dtype, layout, gamma, monkeypatch):
    set_tile(monkeypatch, 3 * 20)
    case = laid_out(make_normal(4, 20, 14, 2, dtype=dtype, vectors=gamma, **form), layout)
    check(case, {"y": forward(case), "x": grad_input(case)})
    W = torch_backend.merged_weight(case.layer, dtype)
    assert error(W, case.merged_weight()) < {torch.float32: 2e-6, torch.bfloat16: 3e-3}[dtype]
    if layout in ("contiguous", "transposed"):
        assert W.stride() == case.weight.stride()


def forward(case):
    return torch_backend.linear_forward(case.x, case.layer)


def grad_input(case):
    return torch_backend.grad_input(case.grad, case.layer)


def grad_factors(case, *needs):
    return torch_backend.grad_factors(case.grad, case.x, case.layer, Needs(*needs))


# Number formats


def test_G_does_not_overflow_in_float16():
    """Loss-scaled gradients: each g is finite in float16, their sum over the tokens is not."""
    case = make(64, 12, 10, 2, dtype=torch.float16)
    case = case.replace(grad=case.grad * 2e4, x=case.x * 100)
    assert case.grad.isfinite().all()
    d_A, d_B, _ = grad_factors(case, True, True, False)
    check(case, {"hut_A": d_A, "hut_B": d_B})


@pytest.mark.parametrize("precision", ["merged", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_beyond_the_range_of_float16_still_count(dtype, precision):
    """Factors of 1e-9 and 1e7, with a product of 5e-2: in float16 they would be 0 and infinite."""
    case = cancelling(make_normal(16, 64, 48, 4, dtype=dtype, precision=precision), 5e-2)
    case = case.replace(hut_A=case.hut_A * 1e9, hut_B=case.hut_B * 1e-9)
    assert error(forward(case), update_of(case)) < update_limit(dtype, "low_rank", precision)


@every_form
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_float32_activations_are_exact_over_any_weight(form, weight_dtype, factor_dtype, precision):
    """16-bit weights, factors and vectors are multiplied in float32, not in their own type."""
    types = {"weight_dtype": weight_dtype, "factor_dtype": factor_dtype}
    case = make_normal(
        8, 22, 15, 3, vectors="bias gamma beta", precision=precision, **types, **form
    )
    check(case, run(case))


@every_form
def test_float64_activations_are_exact_over_float32_parameters(form):
    case = make_normal(
        8, 22, 15, 3, dtype=torch.float64, weight_dtype=torch.float32, vectors="bias gamma beta"
    ).replace(**form)
    for precision in ("merged", "split"):
        y = forward(case.replace(precision=precision))
        assert error(y, case.expected()["y"]) < 1e-12


@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
def test_W_is_rounded_once(transform):
    """Formed in float32, W is the nearest bfloat16 but for cases on the edge; T never is."""
    case = make(1, 200, 150, 3, dtype=torch.bfloat16, transform=transform, offset=1.0)
    if transform == "low_rank":
        case = case.replace(offset=0.0)
    W = torch_backend.merged_weight(case.layer, torch.bfloat16)
    nearest = torch.from_numpy(case.merged_weight()).bfloat16()
    assert (W == nearest).double().mean() > 0.99
    T = torch.from_numpy(case.multiplier()).bfloat16()
    assert (case.weight * T == nearest).double().mean() < 0.9  # what rounding T first would give


def test_the_sums_of_a_bfloat16_layer_are_wide():
    """Equal tokens: in bfloat16 a sum of 4096 of them stops growing at 256."""
    case = make(1, 8, 6, 2, dtype=torch.bfloat16, vectors="bias gamma beta", transform="two_sided")
    many = case.replace(x=case.x.expand(4096, 8), grad=case.grad.expand(4096, 6))
    check(many, run(many))


@every_form
@pytest.mark.parametrize("precision", ["merged", "split"])
@pytest.mark.parametrize("emulates", [False, True])
def test_gradients_of_bfloat16_are_multiplied_where_the_cpu_is_fast(
    form, precision, emulates, monkeypatch
):
    """In float32 where it has no instructions for bfloat16, some columns of W at a time."""
    monkeypatch.setattr(onednn, "emulates_bf16", lambda: emulates)
    monkeypatch.setattr(onednn, "_WIDENED", 4 * 13)
    calls, multiply = [], onednn.multiply_widened
    monkeypatch.setattr(
        onednn, "multiply_widened", lambda *args: calls.append(args) or multiply(*args)
    )
    options = {"vectors": "bias gamma", "precision": precision, **form}
    case = make_normal(9, 21, 13, 3, dtype=torch.bfloat16, **options)
    check(case, run(case))
    products = {"merged": 1, "split": 2}[precision]
    assert len(calls) == (products if emulates else 0)
    assert (torch.bfloat16 in types_of_products(grad_factors, case, True, True, False)) != emulates
    del calls[:]
    fresh = {"transform": "low_rank", "offset": 1.0, "hut_B": torch.zeros_like(case.hut_B)}
    y = forward(case.replace(gamma=None, **fresh))
    assert not calls
    base = F.linear(case.x, case.weight, case.bias.bfloat16())
    assert torch.equal(y, base)  # by the base layer's own product


@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)]
)
def test_gradients_of_nothing_are_multiplied_too(tokens, rows, columns, monkeypatch):
    monkeypatch.setattr(onednn, "emulates_bf16", lambda: True)
    grad, W = (torch.ones(size, dtype=torch.bfloat16) for size in ((tokens, rows), (rows, columns)))
    assert torch.equal(torch_backend._multiplied(grad, W), grad @ W)


def types_of_products(function, *args):
    """The types whose matrices a function multiplies."""
    types = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operator, _, args=(), kwargs=None):
            if operator.overloadpacket is torch.ops.aten.mm:
                types.add(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    with Products():
        function(*args)
    return types


# No work beyond the products


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def test_the_operations_are_the_floors():
    """One full product each, and thin ones: what docs/definition.md and the planner count."""
    N, K, O, r = 24, 40, 30, 3
    case = make(N, K, O, r, vectors="gamma")
    full, thin = 2 * N * K * O, 2 * K * O * r
    assert flops(forward, case) == full + thin
    assert flops(grad_input, case) == full + thin
    assert flops(grad_factors, case, True, True, True) == full + 2 * thin
    assert flops(grad_factors, case, True, False, False) == full + thin
    assert flops(grad_factors, case, False, True, False) == full + thin
    assert flops(grad_factors, case, False, False, True) == full + thin
    split = case.replace(precision="split")
    assert flops(forward, split) == 2 * full + thin
    two_sided = case.replace(transform="two_sided")
    assert flops(forward, two_sided) == full
    assert flops(grad_factors, two_sided, True, True, True) == full + 2 * thin
    equal = make(N, 42, O, r, vectors="gamma", transform="two_sided")
    assert flops(grad_factors, equal, True, True, True) == 2 * N * 42 * O


@every_form
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
def test_unneeded_gradients_are_none(form, needs):
    case = make(5, 9, 8, 2, vectors="gamma", **form)
    grads = grad_factors(case, *map(bool, needs))
    assert tuple(grad is not None for grad in grads) == tuple(map(bool, needs))


def test_split_gives_the_update_at_its_own_precision():
    """The second matrix of split has the update's relative error, not that of W."""
    case = make_normal(1, 64, 48, 4, dtype=torch.bfloat16)
    case = case.replace(hut_B=case.hut_B * 1e-4)
    update = torch_backend._stage(case.layer, torch.bfloat16)(True)
    exact = case.weight.double().numpy() * (case.multiplier() - 1.0)
    assert error(update, exact) < update_limit(torch.bfloat16, "low_rank", "split")
