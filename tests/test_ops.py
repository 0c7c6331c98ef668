"""The operators hut::*: opcheck, new outputs, no gradients, only what is asked for."""

import itertools

import pytest
import torch
from hypothesis import given
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from hut_kernels import ops, rules

from .references import (
    GRADIENTS,
    LAYOUTS,
    Recorder,
    check,
    error,
    laid_out,
    make,
    operators,
    run,
)
from .strategies import cases, examples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("forward", "backward", "weight")
TENSORS = ("x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta", "grad")
FORMS = {"low_rank": {"scaling": 0.5}, "direct": {"offset": 0.0}, "two_sided": {}}


def form(name):
    return FORMS[name] | ({"transform": "two_sided"} if name == "two_sided" else {})


def arguments(name, case, needs=(True,) * 4):
    """The operator's arguments for a case."""
    factors = case.weight, case.hut_A, case.hut_B
    spec = case.transform, case.offset, case.scaling
    vectors = case.bias, case.gamma, case.beta
    return {
        "forward": (case.x, *factors, *vectors, *spec, case.precision, "torch"),
        "backward": (
            case.grad,
            case.x,
            *factors,
            case.gamma,
            *spec,
            case.precision,
            *needs,
            "torch",
        ),
        "weight": (*factors, case.gamma, *spec, torch.float32, "torch"),
    }[name]


def call(name, case, **needs):
    """The operator's outputs, as a list."""
    out = getattr(ops, name)(*arguments(name, case, **needs))
    return [out] if isinstance(out, torch.Tensor) else list(out)


def requiring_grad(case):
    tensors = {name: getattr(case, name) for name in TENSORS}
    return case.replace(
        **{
            name: tensor.detach().requires_grad_()
            for name, tensor in tensors.items()
            if tensor is not None
        }
    )


@given(case=cases(DTYPES))
@examples(80)
def test_the_operators_match_the_reference(case):
    check(case, operators(case, "torch"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["low_rank", "two_sided"])
def test_opcheck(name, layout, requires_grad, kind):
    case = laid_out(make((2, 3), 6, 5, 2, vectors="bias gamma beta", **form(kind)), layout)
    case = requiring_grad(case) if requires_grad else case
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # it takes gradients where it can
        checks.append("test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.hut, name).default
    torch.library.opcheck(operator, arguments(name, case), test_utils=checks)


def direct(name, case):
    """Calls the operator itself, on one of the case's tensors that requires grad."""
    leaf = case.hut_A.detach().requires_grad_()
    op, args = getattr(torch.ops.hut, name), arguments(name, case.replace(hut_A=leaf))
    return leaf, lambda A: op(*(A if arg is leaf else arg for arg in args))


def total(outputs):
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum(out.sum() for out in outputs)


NO_FORWARD_MODE = pytest.raises(RuntimeError, match=r"no forward-mode derivative .* fused=False")
NO_GRADIENTS = pytest.raises(RuntimeError, match=r"no gradients: .* fused=False")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_by_itself_an_operator_refuses_its_backward(name, kind, compiled):
    """Whichever of its inputs is asked about, and also where another way leads to it."""
    torch.compiler.reset()
    leaf, op = direct(name, make(4, 6, 5, 2, vectors="gamma", **form(kind)))
    run = torch.compile(op, backend="aot_eager", fullgraph=True) if compiled else op
    with torch.no_grad():
        without = total(run(leaf))
    with_gradients = total(run(leaf))
    assert torch.equal(without, with_gradients)
    with NO_GRADIENTS:
        torch.autograd.grad(with_gradients + leaf.sum(), leaf)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "derive",
    [
        lambda op, A: torch.func.grad(lambda A: total(op(A)))(A),
        lambda op, A: torch.func.vjp(lambda A: total(op(A)), A)[1](torch.ones(())),
        lambda op, A: torch.func.jacrev(lambda A: total(op(A)))(A),
    ],
    ids=["grad", "vjp", "jacrev"],
)
def test_an_operator_has_no_derivative_under_torch_func(name, derive):
    leaf, op = direct(name, make(4, 6, 5, 2, vectors="gamma"))
    with NO_GRADIENTS:
        derive(op, leaf)


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_under_an_unrelated_transform_is_allowed(name):
    leaf, op = direct(name, make(4, 6, 5, 2, vectors="gamma"))
    plain = total(op(leaf.detach()))
    _, scaled = torch.func.vjp(lambda s: s * total(op(leaf.detach())), torch.ones(()))
    assert torch.equal(scaled(torch.ones(()))[0], plain)
    _, tangent = torch.func.jvp(
        lambda s: s * total(op(leaf.detach())), (torch.ones(()),), (torch.ones(()),)
    )
    assert torch.equal(tangent, plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_operator_has_no_forward_mode_derivative(name, mode):
    leaf, op = direct(name, make(4, 6, 5, 2, vectors="gamma"))
    leaf = leaf.detach()
    with mode(), NO_FORWARD_MODE:
        torch.func.jvp(op, (leaf,), (leaf,))
    with mode(), forward_ad.dual_level(), NO_FORWARD_MODE:
        op(forward_ad.make_dual(leaf, leaf))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
    "types",
    [
        {"dtype": torch.bfloat16, "factor_dtype": torch.bfloat16},
        {"dtype": torch.float16, "factor_dtype": torch.float32},
        {"dtype": torch.float32, "weight_dtype": torch.bfloat16, "factor_dtype": torch.float64},
        {"dtype": torch.float64, "weight_dtype": torch.float32},
    ],
    ids=lambda types: "-".join(str(dtype) for dtype in types.values()),
)
def test_the_fake_has_the_real_shapes_types_and_strides(name, kind, types):
    for layout in LAYOUTS:
        case = laid_out(make((2, 3), 6, 5, 2, vectors="gamma", **types, **form(kind)), layout)
        for needs in ((True,) * 4, (False, True, False, True), (True, False, True, False)):
            op, given = getattr(torch.ops.hut, name).default, arguments(name, case, needs)
            torch.library.opcheck(op, given, test_utils="test_faketensor")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_outputs_are_new_and_inputs_unchanged(name, layout, requires_grad, dtype, precision):
    case = make(4, 6, 5, 2, dtype=dtype, vectors="bias gamma beta", precision=precision)
    case = laid_out(case, layout)
    case = requiring_grad(case) if requires_grad else case
    inputs = [getattr(case, tensor) for tensor in TENSORS]
    before = [tensor.detach().clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    outputs = call(name, case)
    assert [tensor._version for tensor in inputs] == versions
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*inputs, *outputs)]
    assert len(set(storages)) == len(storages)
    for out in outputs:
        assert out.requires_grad == requires_grad  # so that a backward is refused
        assert not out._is_view()


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_is_copied_too(name):
    """T = 1, gamma = 1, one token: nothing to compute is no reason to hand out an input."""
    ones = torch.ones
    case = make(1, 4, 4, 1, vectors="gamma", transform="two_sided")
    case = case.replace(hut_A=ones(1, 4), hut_B=ones(4, 1), gamma=ones(4), weight=torch.eye(4))
    inputs = {getattr(case, t).data_ptr() for t in TENSORS if getattr(case, t) is not None}
    assert inputs.isdisjoint(out.data_ptr() for out in call(name, case))


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=4)], ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_gradients_come_in_order_and_only_where_needed(needs, kind):
    case = make(4, 7, 6, 2, vectors="gamma", **form(kind))
    results = operators(case, "torch", needs)
    assert len(call("backward", case, needs=needs)) == sum(needs)
    assert set(results) == {"y", *itertools.compress(GRADIENTS, needs)}
    check(case, results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_WG_is_accumulated_wide_whatever_the_factors_are(dtype, kind):
    case = make(4, 7, 6, 2, dtype=dtype, factor_dtype=dtype, vectors="gamma", **form(kind))
    out = operators(case, "torch")["WG"]
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_equal_to_the_bit(name):
    case = make(33, 65, 47, 5, dtype=torch.bfloat16, vectors="bias gamma beta")
    for one, two in zip(call(name, case), call(name, case), strict=True):
        assert torch.equal(one, two)


def test_autocast_does_not_change_the_operators():
    case = make(9, 40, 30, 3, vectors="bias gamma beta")
    plain = operators(case, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        same = operators(case, "torch")
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weight_rounds_once_to_the_type_asked_for(dtype):
    case = make(1, 9, 8, 2, dtype=torch.float16, vectors="gamma")
    args = (*arguments("weight", case)[:-2], dtype, "torch")
    out = ops.weight(*args)
    assert out.dtype == dtype
    # Twice rounded, by way of weight's float16, an error of 2e-4 would stay.
    assert error(out, case.merged_weight()) < (2e-3 if dtype == torch.bfloat16 else 1e-6)


def test_shapes_on_the_meta_device():
    case = make((2, 3), 6, 5, 2, vectors="bias gamma beta").to("meta")
    shapes = {name: tuple(out.shape) for name, out in operators(case, "torch").items()}
    assert shapes == {"y": (2, 3, 5), "x": (2, 3, 6), "hut_A": (2, 6), "hut_B": (5, 2), "WG": (5,)}


# Who sees the operators


def events(case):
    """The names of a profile of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run(case)
    return {event.key for event in recorded.key_averages()}


def test_the_operators_are_called_wherever_somebody_looks(monkeypatch):
    """Else their implementations are, of plain tensors on a CPU."""
    case = make(4, 9, 7, 2)
    called = []
    for name, implementation in list(rules.implementations.items()):
        monkeypatch.setitem(
            rules.implementations, name, lambda *a, f=implementation: called.append(f) or f(*a)
        )
    expected = run(case)
    assert [f.__name__ for f in called] == ["forward", "backward"]
    called.clear()
    assert {"hut::forward", "hut::backward"} <= events(case)
    with Recorder() as recorder:
        run(case)
    assert {"hut::forward", "hut::backward"} <= {*recorder.names("hut::")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(case)["y"].dtype == torch.bfloat16
    assert not called
    assert all(torch.equal(value, expected[name]) for name, value in run(case).items())


@pytest.mark.parametrize("kind", ["subclass", "batched"])
def test_other_tensors_than_plain_ones_are_seen_by_the_operators(kind):
    plain = make(4, 9, 7, 2)
    args = (plain.x, plain.weight, plain.hut_A, None, "low_rank", 1.0, torch.float32)
    assert rules._nobody_looks(args)

    class Subclass(torch.Tensor):
        pass

    if kind == "subclass":
        assert not rules._nobody_looks((plain.x.as_subclass(Subclass), *args[1:]))
        return
    seen = []
    torch.vmap(lambda x: seen.append(rules._nobody_looks((x, *args[1:]))) or x)(plain.x)
    assert seen == [False]
