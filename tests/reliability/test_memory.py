"""Memory regimes: mixed precision, checkpointing, hooks, offloading, modes, accumulation."""

import gc

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from hut_kernels import hut_linear, inject, merge

from ..references import Recorder, make
from .models import (
    WIDTH,
    Block,
    assert_same_gradients,
    block,
    every_form,
    gradients,
    layer,
    twin,
)

every_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def backward(model, x, run=None):
    """The output of `run(x)`, or of the model, and the gradients it leaves."""
    y = (run or model)(x)
    y.float().square().mean().backward()
    return y.detach()


# Mixed precision


@every_form
@every_half
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_trains_float32_factors(form, half, weight_dtype):
    """Factors and their gradients stay float32, and are as good as the type of x lets them be."""
    model = layer((64, 48), dtype=weight_dtype, **form)
    exact = twin(model).double()
    x = torch.randn(32, 64)
    backward(exact, x.to(half).double())
    with torch.autocast("cpu", half):
        y = model(x)
    assert y.dtype == half
    y.float().square().mean().backward()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        expected = gradients(exact)[name]
        assert (grad - expected).norm() <= 3e-2 * expected.norm(), name


@every_half
def test_autocast_reaches_a_whole_block(half):
    model = block(scale_shift=True)
    with torch.autocast("cpu", half):
        y = backward(model, torch.randn(2, 8, WIDTH))
    assert y.isfinite().all()
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())


def test_grad_scaler_keeps_small_gradients_and_skips_overflown_steps():
    model = layer((64, 48))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    x, tiny = torch.randn(32, 64), 2.0**-20

    def loss_of(x):
        with torch.autocast("cpu", torch.float16):
            return (model(x) * torch.full((48,), tiny, dtype=torch.float16).float()).sum()

    scaler.scale(loss_of(x)).backward()
    scaler.unscale_(optimizer)
    expected = twin(model)
    expected.zero_grad()
    (expected(x) * tiny).sum().backward()
    assert_same_gradients(model, expected, rtol=2e-2, atol=1e-9)
    scaler.step(optimizer)
    scaler.update()

    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    scaler.scale(loss_of(x) * 2.0**60).backward()  # far beyond float16
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert scaler.get_scale() < 2.0**14


# Checkpointing


def selective(ctx, op, *args, **kwargs):
    return (
        CheckpointPolicy.MUST_SAVE
        if op == torch.ops.hut.forward.default
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


KINDS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(selective),
    },
}


@every_form
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_to_the_bit(form, kind, dropout):
    model = block(dropout=dropout, **form)
    plain = twin(model)
    x = torch.randn(2, 8, WIDTH, requires_grad=True)
    seed = torch.random.get_rng_state()
    expected = backward(plain, x)
    d_x, x.grad = x.grad, None
    torch.random.set_rng_state(seed)
    y = backward(model, x, lambda x: checkpoint(model, x, **KINDS[kind]))
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, d_x)
    assert_same_gradients(model, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "forwards"), [("non-reentrant", 8), ("selective", 4)])
def test_selective_checkpointing_can_save_the_operators_output(kind, forwards):
    """A policy's saved tensors are not computed again; without one, everything is."""
    with Recorder() as seen:
        model = block()
        backward(model, torch.randn(2, 8, WIDTH), lambda x: checkpoint(model, x, **KINDS[kind]))
    assert len(seen.names("hut::forward")) == forwards


@pytest.mark.parametrize("kind", ["non-reentrant", "selective"])
def test_within_torch_compile_checkpointing_gives_the_same(kind):
    """Around it PyTorch gives wrong gradients of an operator whose output is saved."""
    torch.compiler.reset()
    model = block()
    plain = twin(model)
    x = torch.randn(2, 8, WIDTH)
    expected = backward(plain, x)
    run = torch.compile(lambda x: checkpoint(model, x, **KINDS[kind]), backend="aot_eager")
    torch.testing.assert_close(backward(model, x, run), expected)
    assert_same_gradients(model, plain)


def test_a_checkpointed_layer_keeps_nothing_but_its_input():
    model = layer((64, 64))
    x = torch.randn(16, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = checkpoint(model, x, use_reentrant=False)
    # The checkpoint of PyTorch 2.10 also keeps an empty tensor of its own.
    assert [id(tensor) for tensor in kept if tensor.numel()] == [id(x)]
    y.sum().backward()


# Memory estimators


@every_form
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_model_without_data_is_adapted_and_trained(form, dropout):
    """As estimators of a training's memory do: all of it under FakeTensorMode."""
    with FakeTensorMode():
        model = Block()
        assert inject(model, ["qkv", "down"], r=3, dropout=dropout, **form)
        backward(model, torch.randn(2, 8, WIDTH))
        assert gradients(model)
        assert isinstance(merge(model).qkv.weight, FakeTensor)


def test_so_is_a_model_of_pefts():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from hut_kernels.integrations.peft import HUTConfig

    with FakeTensorMode():
        config = HUTConfig(r=3, target_modules=["qkv", "down"])
        model = peft.get_peft_model(Block(), config)
        backward(model, torch.randn(2, 8, WIDTH))
        assert gradients(model)
        assert isinstance(model.merge_and_unload().qkv.weight, FakeTensor)


# Saved tensors


@every_form
def test_saved_tensors_may_be_packed(form):
    """Hooks may give back a copy of what they were given."""
    model = layer(**form)
    plain = twin(model)
    x = torch.randn(5, WIDTH, requires_grad=True)
    backward(plain, x)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        y = model(x)
    assert packed
    y.square().mean().backward()
    assert_same_gradients(model, plain, rtol=0, atol=0)


def test_hooks_that_change_a_tensor_are_seen():
    """Backward reads what the hooks give, not what forward still had at hand."""
    model = layer()
    x = torch.randn(5, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.zeros_like):
        y = model(x)
    y.sum().backward()
    assert all(not grad.any() for grad in gradients(model).values())


def test_activations_may_be_offloaded_to_the_cpu():
    model = block()
    plain = twin(model)
    x = torch.randn(2, 8, WIDTH)
    backward(plain, x)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    y.square().mean().backward()
    assert_same_gradients(model, plain, rtol=0, atol=0)


def test_changing_a_saved_tensor_in_place_is_refused():
    """PyTorch's own guard: a gradient of what is no longer there would be silently wrong."""
    model = layer()
    y = model(torch.randn(5, WIDTH))
    with torch.no_grad():
        model.hut_A.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Modes


@every_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_and_nothing_kept(form, mode):
    model = layer(**form)
    x = torch.randn(5, WIDTH)
    expected = model(x)
    with mode():
        y = model(x)
    assert torch.equal(y, expected)
    assert y.grad_fn is None
    assert not y.requires_grad


def test_inference_tensors_go_through_a_model_that_trains():
    model = layer()
    with torch.inference_mode():
        x = torch.randn(5, WIDTH)
        assert torch.equal(model(x), model(x.clone()))
    model(x.clone()).sum().backward()
    assert gradients(model)


# Gradients taken in other ways


@every_form
def test_accumulated_gradients_are_those_of_one_big_batch(form):
    model = layer(**form)
    whole = twin(model)
    x = torch.randn(24, WIDTH)
    whole(x).square().sum().backward()
    for part in x.split(8):
        model(part).square().sum().backward()
    assert_same_gradients(model, whole, rtol=1e-4, atol=1e-4)


def test_a_retained_graph_gives_twice_the_gradient():
    model = layer(scale_shift=True)
    loss = model(torch.randn(5, WIDTH)).square().sum()
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name])


def test_a_graph_that_is_gone_is_refused():
    loss = layer()(torch.randn(5, WIDTH)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_create_graph_is_refused_and_named():
    model = layer()
    x = torch.randn(5, WIDTH, requires_grad=True)
    (d_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_eager_has_the_second_derivative():
    model = layer(fused=False)
    x = torch.randn(5, WIDTH, requires_grad=True)
    (d_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    d_x.sum().backward()
    assert gradients(model)


@every_form
def test_func_grad_and_functional_call(form):
    model = layer(**form)
    plain = twin(model)
    x = torch.randn(5, WIDTH)
    backward(plain, x)
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of(factors):
        return torch.func.functional_call(model, factors, (x,)).square().mean()

    found = torch.func.grad(loss_of)(factors)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(found[name], grad)


def test_func_vjp_and_value_and_grad():
    case = make(5, WIDTH, 12, 3)

    def call(A):
        return hut_linear(case.x, case.weight, A, case.hut_B)

    y, pull = torch.func.vjp(call, case.hut_A)
    (d_A,) = pull(torch.ones_like(y))
    value, grad = torch.func.grad_and_value(lambda A: call(A).sum())(case.hut_A)[::-1]
    torch.testing.assert_close(value, y.sum())
    torch.testing.assert_close(d_A, grad)


def test_per_sample_gradients_by_vmap_are_refused_and_served_eagerly():
    case = make(5, WIDTH, 12, 3)

    def per_sample(fused):
        def loss_of(A, x):
            return hut_linear(x, case.weight, A, case.hut_B, fused=fused).sum()

        return torch.func.vmap(torch.func.grad(loss_of), (None, 0))(case.hut_A, case.x)

    with pytest.raises(RuntimeError, match="vmap over the fused hut_linear"):
        per_sample(fused=True)
    assert per_sample(fused=False).shape == (5, 3, WIDTH)


def test_nothing_stays_alive_after_a_step():
    """No cycle and no cache holds on to a step's tensors."""
    model = block()

    def alive():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    backward(model, torch.randn(2, 8, WIDTH))
    model.zero_grad()
    before = alive()
    for _ in range(3):
        backward(model, torch.randn(2, 8, WIDTH))
        model.zero_grad()
    assert alive() <= before
