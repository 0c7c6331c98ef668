"""torch.compile: one graph, whole and dynamic, with the operators as single nodes in it."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from hut_kernels import hut_linear

from ..references import make
from .models import (
    WIDTH,
    assert_same_gradients,
    block,
    every_form,
    gpt2,
    layer,
    roberta,
    twin,
)

# aot_eager traces, captures and partitions exactly as Inductor does, but generates no code: all
# that can break or recompile does so there. Inductor itself has a test of its own.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled(function, **options):
    return torch.compile(function, **{"fullgraph": True, "backend": BACKEND, **options})


def step(model, x):
    y = model(x)
    y.square().mean().backward()
    return y


# hut_linear and HUTLinear


@every_form
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
def test_a_layer_is_one_graph_for_any_number_of_tokens(form, fused):
    model = layer(fused=fused, **form)
    plain = twin(model)
    fast = compiled(model, dynamic=True)
    for N in (2, 9, 17, 64):
        x = torch.randn(N, 3, WIDTH)
        torch.testing.assert_close(step(fast, x), step(plain, x))
    assert_same_gradients(model, plain)
    assert graphs() == 1


@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
def test_hut_linear_with_every_argument_is_one_graph(transform):
    case = make(5, WIDTH, 12, 3, vectors="bias gamma beta", transform=transform)
    leaves = [case.x, case.hut_A, case.hut_B, case.bias, case.gamma, case.beta]
    for leaf in leaves:
        leaf.requires_grad_()

    def call(x):
        return hut_linear(x, case.weight, case.hut_A, case.hut_B, case.bias, **case.options)

    fast = compiled(call, dynamic=True)
    for N in (5, 2, 31):
        x = torch.randn(N, WIDTH, requires_grad=True)
        ours = torch.autograd.grad(fast(x).sum(), [x, *leaves[1:]])
        plain = torch.autograd.grad(call(x).sum(), [x, *leaves[1:]])
        torch.testing.assert_close(ours, plain)
    assert graphs() == 1


def test_without_being_told_a_second_size_is_the_last_recompilation():
    """PyTorch specialises the first size, and 0 and 1; every other must share one graph."""
    fast = compiled(layer())
    for N in (8, 9, 33, 17, 2, 64):
        step(fast, torch.randn(N, WIDTH))
    assert graphs() == 2
    for N in (0, 1):
        step(fast, torch.randn(N, WIDTH))
    assert graphs() <= 4


def test_dropout_and_autocast_stay_in_one_graph():
    model = layer(dropout=0.5)
    fast = compiled(model, dynamic=True)
    for N in (4, 9):
        with torch.autocast("cpu", torch.bfloat16):
            assert step(fast, torch.randn(N, WIDTH)).dtype == torch.bfloat16
    assert graphs() == 1


def test_no_gradient_and_inference_modes_compile():
    model = layer()
    x = torch.randn(4, WIDTH)
    expected = model(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(model)(x), expected)


# Models


def test_an_injected_block_is_one_graph():
    model = block(scale_shift=True)
    plain = twin(model)
    fast = compiled(model, dynamic=True)
    for shape in ((2, 8), (2, 9), (3, 17)):
        x = torch.randn(*shape, WIDTH)
        torch.testing.assert_close(step(fast, x), step(plain, x))
    assert_same_gradients(model, plain)
    assert graphs() == 1


def check_transformer(model):
    plain = twin(model.eval())  # dropout off: the two runs are compared
    fast = compiled(model, dynamic=True)
    for shape in ((2, 8), (3, 17)):
        tokens = torch.randint(3, 31, shape)
        losses = [m(input_ids=tokens).logits.square().mean() for m in (fast, plain)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    assert_same_gradients(model, plain)
    assert graphs() == 1


def test_gpt2_is_one_graph():
    check_transformer(gpt2())


def test_roberta_is_one_graph():
    check_transformer(roberta(transform="two_sided", scale_shift=True))


def test_a_training_loop_does_not_recompile():
    model = block()
    fast = compiled(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for number in range(6):
        if number == 1:
            torch._dynamo.config.error_on_recompile = True
        try:
            step(fast, torch.randn(2, 8, WIDTH))
        finally:
            torch._dynamo.config.error_on_recompile = False
        optimizer.step()
        optimizer.zero_grad()
    assert graphs() == 1


def test_inductor_compiles_forward_and_backward():
    model = block()
    plain = twin(model)
    fast = compiled(model, backend="inductor", dynamic=True)
    for tokens in (8, 13):
        x = torch.randn(2, tokens, WIDTH)
        torch.testing.assert_close(step(fast, x), step(plain, x), rtol=1e-4, atol=1e-5)
    assert_same_gradients(model, plain, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


# The graph


def captured(function):
    """The function compiled, and the operators' calls that its graphs will hold."""
    nodes = {"forward": [], "backward": []}

    def keep(which):
        def compiler(graph, _):
            nodes[which] += [node for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=True), nodes


def names(nodes):
    return [str(node.target) for node in nodes]


@every_form
def test_the_operators_are_single_nodes(form):
    fast, nodes = captured(layer(bias=False, **form))
    step(fast, torch.randn(5, WIDTH, requires_grad=True))
    assert names(nodes["forward"]).count("hut.forward.default") == 1
    assert names(nodes["backward"]).count("hut.backward.default") == 1
    products = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}
    assert products.isdisjoint(names(nodes["forward"] + nodes["backward"]))


def test_nothing_is_computed_twice_in_the_backward_graph():
    """The partitioner must not recompute the forward operator: its backward needs x alone."""
    fast, nodes = captured(block())
    step(fast, torch.randn(2, 5, WIDTH))
    assert names(nodes["forward"]).count("hut.forward.default") == 4
    assert "hut.forward.default" not in names(nodes["backward"])


def test_a_transform_of_torch_func_is_refused_and_not_silently_zero():
    """Within one Dynamo inlines forward, and would differentiate an operator without gradient."""
    case = make(5, WIDTH, 12, 3)

    def gradient(A, fused):
        def loss(A):
            return hut_linear(case.x, case.weight, A, case.hut_B, fused=fused).sum()

        return torch.func.grad(loss)(A)

    with pytest.raises(RuntimeError, match=r"torch\.compile does not see .* use fused=False"):
        compiled(gradient)(case.hut_A, fused=True)
    torch.testing.assert_close(
        compiled(gradient)(case.hut_A, fused=False), gradient(case.hut_A, fused=True)
    )


# Scalars


def test_a_scalar_is_a_constant_of_its_graph_and_never_a_tensor():
    """Dynamo makes a varying float symbolic, by way of a float64 tensor; the operator settles it.

    So each value has a graph, which is there when the value comes again.
    """
    case = make(5, WIDTH, 12, 3)
    leaf = case.x.requires_grad_()

    def call(x, scaling):
        return hut_linear(x, case.weight, case.hut_A, case.hut_B, scaling=scaling)

    fast, nodes = captured(call)
    for scaling in (0.5, 0.75, 0.5, 0.75):
        ours, plain = (f(leaf, scaling) for f in (fast, call))
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaf)[0] for y in (ours, plain)))
    assert graphs() == 2
    calls = [n for kind in nodes.values() for n in kind if str(n.target).startswith("hut.")]
    assert len(calls) == 4
    for node in calls:
        (start,) = (i for i, a in enumerate(node.args) if a == "low_rank")
        assert [type(a) for a in node.args[start + 1 : start + 3]] == [float, float]


# The operators


@pytest.mark.parametrize("name", ["forward", "backward", "weight"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"offset": 0.0, "scaling": 0.5},
        {"precision": "split"},
        {"transform": "two_sided", "dtype": torch.float64},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("N", [0, 1, (2, 0, 3)], ids=str)
def test_opcheck_with_few_tokens_and_every_option(name, options, N):
    from ..test_ops import arguments

    case = make(N, 6, 5, 2, vectors="bias gamma beta", **options)
    torch.library.opcheck(getattr(torch.ops.hut, name).default, arguments(name, case))
