"""hut_grouped_linear: equal to float64 per expert, tail and idle experts, strategies, refusals."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hut_kernels import (
    HUTBackendError,
    explain,
    hut_grouped_linear,
    onednn,
    planner,
    torch_backend,
)
from hut_kernels.layer import Layer, acc_dtype

from .references import (
    Case,
    cancelling,
    check,
    error,
    lay,
    limit,
    make,
    make_normal,
    update_limit,
    update_of,
)

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0, "scaling": -1.25},
    "two_sided": {"transform": "two_sided"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
STACKS = ("weight", "hut_A", "hut_B", "bias", "gamma", "beta")
ALL = "bias gamma beta"
COUNTS = (0, 1, 17, 0, 5)
TAIL = 3
DOUBLE = {"dtype": torch.float64, "factor_dtype": torch.float64}


class Stack:
    """Several experts' cases as one call: x and grad end in rows of NaN that no expert has."""

    def __init__(self, cases: list[Case], tail: int = TAIL) -> None:
        self.cases = cases
        first = cases[0]
        rest = {"x": first.x, "grad": first.grad}
        for name, like in rest.items():
            rows = [getattr(case, name) for case in cases]
            padding = like.new_full((tail, like.shape[1]), math.nan)
            setattr(self, name, torch.cat([*rows, padding]))
        for name in STACKS:
            parts = [getattr(case, name) for case in cases]
            setattr(self, name, None if parts[0] is None else torch.stack(parts))
        ends = torch.tensor([len(case.x) for case in cases]).cumsum(0)
        self.offsets = ends.to(torch.int32)
        names = ("transform", "offset", "scaling")
        self.options = {name: getattr(first, name) for name in names}

    def leaves(self) -> dict[str, torch.Tensor]:
        """The trainable tensors, requiring grad."""
        names = ("x", *STACKS[1:])
        found = {name: getattr(self, name) for name in names}
        return {n: t.detach().requires_grad_() for n, t in found.items() if t is not None}

    def call(self, leaves: dict[str, torch.Tensor], **how) -> torch.Tensor:
        vectors = {name: leaves.get(name) for name in ("bias", "gamma", "beta")}
        weight = self.weight.mT.contiguous() if how.get("transposed") else self.weight
        return hut_grouped_linear(
            leaves["x"], weight, leaves["hut_A"], leaves["hut_B"], self.offsets,
            **vectors, **self.options, **how,
        )  # fmt: skip

    def run(self, **how) -> dict[str, torch.Tensor]:
        """`y` and every gradient."""
        leaves = self.leaves()
        y = self.call(leaves, **how)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"y": y, **dict(zip(leaves, grads, strict=True))}

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """Each expert's part against its own float64 reference; zeros in the tail."""
        start = 0
        for expert, case in enumerate(self.cases):
            rows = slice(start, start + len(case.x))
            of_rows = {name: results[name][rows] for name in ("y", "x")}
            of_expert = {n: t[expert] for n, t in results.items() if n not in of_rows}
            check(case, of_rows | of_expert)
            start = rows.stop
        for name in ("y", "x"):
            assert len(results[name]) == len(self.x)
            assert not results[name][start:].any(), name


def stack(K, O, r, counts=COUNTS, maker=make, tail=TAIL, **options) -> Stack:
    return Stack([maker(count, K, O, r, **options) for count in counts], tail)


# Values


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", ["", "bias", ALL])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_equals_float64(form, dtype, vectors, transposed):
    experts = stack(37, 29, 3, dtype=dtype, vectors=vectors, **form)
    experts.check(experts.run(transposed=transposed))


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_the_fused_cpu_passes_equal_float64(form, dtype, transposed):
    """Large enough for oneDNN's products and epilogues."""
    experts = stack(264, 256, 3, (0, 1, 33), maker=make_normal, dtype=dtype, **form)
    experts.check(experts.run(transposed=transposed))


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_arrives_where_the_base_cancels(form, dtype, transposed):
    """`y` as a whole would hide a dead adapter, and T's own rounding."""
    form = {name: value for name, value in form.items() if name != "scaling"}
    cases = [
        cancelling(make_normal(count, 264, 256, 3, dtype=dtype, **form), 0.05)
        for count in (7, 0, 19)
    ]
    experts = Stack(cases, tail=0)
    y = experts.call(experts.leaves(), transposed=transposed)
    update = np.concatenate([update_of(case) for case in cases])
    assert error(y, update) <= update_limit(dtype, cases[0].transform, "merged")


@every_form
@pytest.mark.parametrize("vectors", ["", ALL])
def test_the_definition_equals_float64(form, vectors):
    experts = stack(13, 11, 2, dtype=torch.float32, vectors=vectors, **form)
    experts.check(experts.run(fused=False))


@every_form
def test_without_a_row_everything_is_zero(form):
    for fused in (True, False):
        experts = stack(7, 5, 2, (0, 0), vectors=ALL, **form)
        assert not any(result.any() for result in experts.run(fused=fused).values())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    experts = stack(24, 16, 2, dtype=dtype, vectors=ALL)
    for name in ("x", "grad", *STACKS):
        setattr(experts, name, lay(getattr(experts, name), layout))
    experts.check(experts.run())


def test_an_expanded_gradient():
    """The gradient of `.sum()`: expanded from one element."""
    experts = stack(24, 16, 2, tail=0)
    experts.grad = torch.ones(()).expand(experts.grad.shape)
    cases = [case.replace(grad=torch.ones_like(case.grad)) for case in experts.cases]
    experts.cases = cases
    experts.check(experts.run())


@every_form
@pytest.mark.parametrize("vectors", ["", ALL])
def test_gradcheck(form, vectors):
    experts = stack(5, 4, 2, (2, 0, 3), make_normal, tail=0, vectors=vectors, **DOUBLE, **form)
    leaves = experts.leaves()

    def function(*values):
        return experts.call(dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("name", ["x", "hut_A", "hut_B", "gamma", "beta", "bias"])
def test_only_the_gradient_asked_for(name):
    experts = stack(9, 8, 2, vectors=ALL)
    leaves = {key: value.requires_grad_(key == name) for key, value in experts.leaves().items()}
    y = experts.call(leaves)
    (grad,) = torch.autograd.grad(y, leaves[name], experts.grad)
    assert error(grad, experts.run()[name].detach().numpy()) == 0


def test_autocast_casts_x_only():
    experts = stack(24, 16, 2, dtype=torch.float32, weight_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts.call(experts.leaves())
    assert y.dtype == torch.bfloat16
    cases = [case.replace(x=case.x.bfloat16()) for case in experts.cases]
    rows = torch.cat([torch.from_numpy(case.expected()["y"]) for case in cases])
    assert error(y[:-TAIL], rows.numpy()) < limit(torch.bfloat16, 24)


# Strategies


@pytest.fixture
def in_groups(monkeypatch):
    """Experts staged two at a time and multiplied by `torch._grouped_mm`, as on a GPU."""
    calls = []
    grouped_mm = torch._grouped_mm

    def recorded(*args, **kwargs):
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(planner, "group_size", lambda experts, arch: 2)
    monkeypatch.setattr(torch, "_grouped_mm", recorded)
    return calls


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_through_the_grouped_gemm(in_groups, form, dtype, transposed):
    experts = stack(32, 16, 2, (1, 0, 17, 5, 2), dtype=dtype, vectors=ALL, **form)
    experts.check(experts.run(transposed=transposed))
    assert len(in_groups) == 4  # two groups, forward and dx


@pytest.mark.parametrize(
    ("K", "O", "dtype"),
    [(30, 18, torch.float32), (36, 20, torch.bfloat16), (32, 16, torch.float64)],
)
def test_operands_unfit_for_the_grouped_gemm_take_the_loop(in_groups, K, O, dtype):
    experts = stack(K, O, 2, (1, 0, 17), dtype=dtype)
    experts.check(experts.run())
    assert not in_groups


def test_only_experts_with_rows_are_staged(monkeypatch):
    staged = []
    merged = torch_backend._merged
    monkeypatch.setattr(
        torch_backend, "_merged", lambda *args, **how: staged.append(args) or merged(*args, **how)
    )
    experts = stack(9, 8, 2, (0, 4, 0, 0, 2))
    experts.check(experts.run())
    assert len(staged) == 4  # two experts, forward and dx


def test_nothing_of_an_experts_size_is_saved_but_the_stack():
    experts = stack(40, 30, 2, vectors=ALL)
    kept = []
    leaves = experts.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = experts.call(leaves)
    own = [*leaves.values(), experts.weight, experts.offsets]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= addresses
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_onednn_forms_w_where_it_multiplies_bf16(monkeypatch, dtype, transposed):
    monkeypatch.setattr(onednn, "emulates_bf16", lambda: False)
    calls, multiply = [], onednn.linear_mul
    monkeypatch.setattr(onednn, "linear_mul", lambda *args: calls.append(args) or multiply(*args))
    experts = stack(264, 256, 3, (0, 70), dtype=dtype)
    experts.check(experts.run(transposed=transposed))
    fuses = dtype == torch.bfloat16 and onednn._multiplies_bf16()
    assert len(calls) == 2 * fuses  # in forward, and for dx


@every_form
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("emulates", [False, True])
def test_products_of_bf16_are_made_where_the_cpu_is_fast(monkeypatch, form, transposed, emulates):
    """In float32 where it has no instructions for bf16; some columns of W at a time."""
    monkeypatch.setattr(onednn, "emulates_bf16", lambda: emulates)
    monkeypatch.setattr(onednn, "_WIDENED", 1 << 14)
    types = []
    multiply = onednn.multiply_widened
    monkeypatch.setattr(
        onednn, "multiply_widened", lambda *args: types.append(args) or multiply(*args)
    )
    experts = stack(264, 256, 3, (0, 1, 33), maker=make_normal, dtype=torch.bfloat16, **form)
    results = experts.run(transposed=transposed)
    experts.check(results)
    assert len(types) == (4 if emulates else 0)  # two experts, forward and dx
    assert results["hut_A"].dtype == torch.float32


@every_form
def test_the_multiplier_is_not_rounded_to_16_bits(form):
    """Only an increment may be; in the direct form T is formed in float32."""
    case = make_normal(3, 264, 256, 3, dtype=torch.bfloat16, **form)
    layer = Layer(case.weight, case.hut_A, case.hut_B, spec=case.spec)
    W = torch_backend._merged(layer, torch.bfloat16, fresh=True)
    rounded_once = error(torch.from_numpy(case.merged_weight()).bfloat16(), case.merged_weight())
    allowed = 1.01 if form.get("scaling") != 0.75 else 1.2
    assert error(W, case.merged_weight()) < allowed * rounded_once


def test_without_onednn_the_results_are_right(monkeypatch):
    monkeypatch.setattr(onednn, "_multiplies_bf16", lambda: False)
    experts = stack(264, 256, 3, (0, 33))
    experts.check(experts.run())


def test_the_workspace_is_an_expert_or_a_quarter_of_the_stack():
    def workspace(device, experts):
        options = {"dtype": torch.bfloat16, "device_name": device, "experts": experts}
        plan = explain(512, 64, 32, 8, **options)
        assert f"{experts} experts" in str(plan)
        return plan.workspace["forward"] // (64 * 32 * 2)

    assert workspace("cpu", 64) == 1
    assert workspace("H200", 64) == 16
    assert workspace("H200", 3) == 1


def test_a_plan_for_a_gpu_tells_the_kernels_and_what_they_keep():
    options = {"dtype": torch.bfloat16, "device_name": "H200", "experts": 64}
    plan = explain(512, 64, 32, 8, **options)
    assert (plan.backend, plan.forward, plan.grad_factors) == ("triton", "staged", "chunked")
    quarter = 16 * 64 * 32 * 2
    assert plan.workspace["grad_input"] == quarter
    partials = quarter * 5 // 4  # at most
    assert plan.workspace["grad_factors"] == quarter + partials  # and G of a group


# What surrounds a call


@pytest.mark.parametrize(("transform", "thin"), [("low_rank", 4), ("two_sided", 0)])
def test_flops_are_those_of_the_rows_and_of_every_expert(transform, thin):
    experts = stack(9, 8, 2, (2, 0, 3), tail=0, transform=transform)
    with FlopCounterMode(display=False) as counter:
        experts.run()
    operations = 3 * 2 * 5 * 9 * 8 + thin * 3 * 2 * 9 * 8 * 2
    assert counter.get_total_flops() == operations
    options = {"dtype": torch.float32, "transform": transform, "device_name": "cpu", "experts": 3}
    assert sum(explain(5, 9, 8, 2, **options).operations.values()) == operations


def arguments(experts, name):
    factors = experts.weight, experts.hut_A, experts.hut_B, experts.offsets
    form = experts.options.values()
    if name == "grouped_forward":
        return experts.x, *factors, experts.bias, experts.gamma, experts.beta, *form, "torch"
    return experts.grad, experts.x, *factors, experts.gamma, *form, *(True,) * 5, "torch"


@pytest.mark.parametrize("name", ["grouped_forward", "grouped_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    experts = stack(6, 5, 2, tail=0, dtype=dtype, vectors=ALL)
    torch.library.opcheck(getattr(torch.ops.hut, name).default, arguments(experts, name))


def test_the_operators_give_the_types_they_promise():
    experts = stack(6, 5, 2, dtype=torch.float16, factor_dtype=torch.float64, vectors=ALL)
    made = torch.ops.hut.grouped_backward(*arguments(experts, "grouped_backward"))
    acc = acc_dtype(torch.float16)
    assert [t.dtype for t in made] == [torch.float16, torch.float64, torch.float64, acc, acc]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_break():
    experts = stack(8, 6, 2, vectors=ALL)
    leaves = experts.leaves()
    y = torch.compile(experts.call, backend="aot_eager", fullgraph=True)(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), experts.grad)
    experts.check({"y": y, **dict(zip(leaves, grads, strict=True))})


def test_a_second_backward_names_once_differentiable():
    experts = stack(6, 5, 2)
    leaves = experts.leaves()
    upstream = experts.grad.requires_grad_()
    (grad,) = torch.autograd.grad(
        experts.call(leaves), leaves["hut_A"], upstream, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Refusals


def refused(error, match, **changes):
    experts = stack(8, 6, 2, vectors=ALL)
    given = {name: getattr(experts, name) for name in ("x", *STACKS, "offsets")}
    given |= experts.options | changes
    with pytest.raises(error, match=match):
        hut_grouped_linear(**given)


def ends(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "x must have 2 dimensions", {"x": torch.ones(2, 3, 8)}),
        (ValueError, "weight must have 3 dimensions", {"weight": torch.ones(6, 8)}),
        (ValueError, "hut_A must hold weight's 5 experts; got 4", {"hut_A": torch.ones(4, 2, 8)}),
        (ValueError, "gamma must hold weight's 5", {"gamma": torch.ones(1, 6)}),
        (ValueError, "hut_A's second dimension .* = 8; got 7", {"hut_A": torch.ones(5, 2, 7)}),
        (ValueError, "hut_B's first dimension .* = 6; got 8", {"hut_B": torch.ones(5, 8, 2)}),
        (ValueError, "in_features = 6; got 8", {"transposed": True}),
        (TypeError, "offsets must be an int32 tensor; got torch.int64",
         {"offsets": ends(1, 2, 3, 4, 5, dtype=torch.int64)}),
        (ValueError, r"offsets must have shape \(5,\)", {"offsets": ends(1, 2)}),
        (ValueError, "offsets must not decrease", {"offsets": ends(1, 3, 2, 4, 5)}),
        (ValueError, "offsets must not decrease", {"offsets": ends(-1, 3, 3, 4, 5)}),
        (ValueError, "nor exceed x's 26 rows", {"offsets": ends(1, 2, 3, 4, 27)}),
        (ValueError, "weight requires grad", {"weight": torch.ones(5, 6, 8).requires_grad_()}),
        (ValueError, "transform must be one of", {"transform": "lora"}),
        (ValueError, "two_sided has no offset", {"transform": "two_sided", "offset": 0.0}),
        (ValueError, "fused=False needs backend", {"fused": False, "backend": "triton"}),
        (TypeError, "weight must be one of", {"weight": torch.ones(5, 6, 8, dtype=torch.int8)}),
    ],
)  # fmt: skip
def test_arguments_are_checked(error, match, changes):
    refused(error, match, **changes)


def test_offsets_are_checked_without_the_kernels_too():
    refused(ValueError, "offsets must not decrease", fused=False, offsets=ends(1, 3, 2, 4, 5))


def test_a_quantized_stack_is_refused():
    class Packed(torch.Tensor):
        def dequantize(self):
            return self

    refused(
        HUTBackendError, r"quantized \(Packed\)", weight=torch.ones(5, 6, 8).as_subclass(Packed)
    )


def test_a_backend_that_cannot_run_here_is_refused():
    refused(HUTBackendError, 'backend="cuda" cannot run here', backend="cuda")
