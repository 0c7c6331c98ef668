"""HUTLinear against the formulas of docs/definition.md, written out here in float64."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune  # which torch does not import by itself
from torch import nn
from torch.nn.utils import parametrize, prune

from hut_kernels import explain
from hut_kernels.errors import HUTBackendError
from hut_kernels.nn import PAPER, HUTLinear

FORMS = {
    "residual": {},
    "residual-alpha-shift": {"alpha": 5.0, "scale_shift": True},
    "direct": {"offset": 0},
    "direct-shift": {"offset": 0, "scale_shift": True},
    "two_sided": {"transform": "two_sided"},
    "paper": PAPER,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


class Conv1D(nn.Module):
    """A stand-in for the Conv1D of transformers: weight `[in, out]`, and `nf`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / math.sqrt(nx))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(layer):
    """The layer with factors that make an update of the weight's own size."""
    with torch.no_grad():
        for _, factor in layer.named_factors():
            factor.normal_(0.5, 1.0)
    return layer


def multiplier(layer):
    A, B = layer.hut_A.double(), layer.hut_B.double()
    if layer.transform == "two_sided":
        q = [i * layer.r // layer.in_features for i in range(layer.in_features)]
        p = [o * layer.r // layer.out_features for o in range(layer.out_features)]
        return B[:, q] * A[p]
    scaling = 1.0 if layer.alpha is None else layer.alpha / layer.r
    return layer.offset + scaling * B @ A


def reference(layer, x, mask=None):
    """The forward formula, with dropout's where a mask (0 or 1/(1-p) each) is given."""
    W0 = (layer.weight.t() if layer.fan_in_fan_out else layer.weight).double()
    W = W0 * multiplier(layer)
    x = x.double()
    y = x @ W.t() if mask is None else x @ W0.t() + (x * mask) @ (W - W0).t()
    if layer.bias is not None:
        y = y + layer.bias.double()
    return y if layer.gamma is None else layer.gamma.double() * y + layer.beta.double()


def error(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


def reload(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# What it computes


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_layer_is_bit_equal_to_its_base(form, dtype):
    base = nn.Linear(12, 9, dtype=dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    assert torch.equal(HUTLinear.from_linear(base, r=3, **form)(x), base(x))


@every_form
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", [lambda: nn.Linear(13, 10), lambda: Conv1D(10, 13)])
def test_forward_and_gradients_match_the_definition(form, fused, make):
    layer = trained(HUTLinear.from_linear(make(), r=4, fused=fused, **form)).double()
    x = torch.randn(3, 2, 13, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(factor for _, factor in layer.named_factors())]
    ref, out = reference(layer, x), layer(x)
    upstream = torch.randn_like(ref)
    assert out.shape == (3, 2, 10)
    assert error(out, ref) < 1e-12
    grads = torch.autograd.grad(out, wanted, upstream)
    for grad, exact in zip(grads, torch.autograd.grad(ref, wanted, upstream), strict=True):
        assert error(grad, exact) < 1e-12


def test_split_precision_reaches_the_product():
    base = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        base.weight[:, 1::2] = -base.weight[:, ::2]
    x = torch.randn(8, 32, dtype=torch.bfloat16).repeat_interleave(2, dim=1)  # x W0^T = 0
    errors = {}
    for precision in ("merged", "split"):
        layer = HUTLinear.from_linear(base, r=4, precision=precision)
        torch.manual_seed(1)
        with torch.no_grad():
            layer.hut_A.normal_()
            layer.hut_B.normal_(0, 5e-3)
        errors[precision] = error(layer(x), reference(layer, x))
    assert errors["split"] < 5e-3 < 2e-2 < errors["merged"]


@every_form
@pytest.mark.parametrize("bias", [True, False])
def test_merged_layer_computes_the_same(form, bias):
    layer = trained(HUTLinear(11, 8, 3, bias=bias, dtype=torch.float64, **form)).double()
    plain = layer.to_linear()
    x = torch.randn(5, 11, dtype=torch.float64)
    assert type(plain) is nn.Linear
    assert error(plain(x), reference(layer, x)) < 1e-12
    scale = 1.0 if layer.gamma is None else layer.gamma[:, None]
    assert error(layer.merged_weight(), scale * layer.weight * multiplier(layer)) < 1e-12
    assert (
        (plain.bias is None) == (layer.merged_bias() is None) == (not bias and layer.beta is None)
    )


def test_merged_tensors_are_rounded_once_to_the_weights_type():
    layer = trained(HUTLinear(40, 30, 4, scale_shift=True, dtype=torch.bfloat16))
    weight, bias = layer.merged_weight(), layer.merged_bias()
    exact_weight = layer.gamma.double()[:, None] * layer.weight.double() * multiplier(layer)
    exact_bias = layer.gamma.double() * layer.bias.double() + layer.beta.double()
    for merged, exact in ((weight, exact_weight), (bias, exact_bias)):
        assert merged.dtype == torch.bfloat16
        assert not merged.requires_grad
        # float32 in between moves a value across a rounding boundary only where it lies on one.
        assert (merged == exact.to(torch.bfloat16)).double().mean() > 0.99


def test_merged_parameters_share_nothing_with_the_layer():
    layer = HUTLinear(6, 5, 2)
    plain = layer.to_linear()
    for name in ("weight", "bias"):
        assert getattr(plain, name).data_ptr() != getattr(layer, name).data_ptr()


def test_to_linear_is_frozen_keeps_the_mode_and_draws_no_random_numbers():
    layer = HUTLinear(6, 5, 2).eval()
    before = torch.get_rng_state()
    plain = layer.to_linear()
    assert torch.equal(torch.get_rng_state(), before)
    assert not plain.training
    assert not any(p.requires_grad for p in plain.parameters())


# Dropout


@every_form
@pytest.mark.parametrize("fused", [True, False])
def test_dropout_applies_only_to_the_update(form, fused):
    base = nn.Linear(16, 12, dtype=torch.float64)
    layer = trained(HUTLinear.from_linear(base, r=4, dropout=0.4, fused=fused, **form)).double()
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.4)
    torch.manual_seed(3)
    out = layer(x)
    ref = reference(layer, x, mask)
    assert 0 < (mask == 0).sum() < mask.numel()
    assert error(out, ref) < 1e-12
    wanted = [x, *(factor for _, factor in layer.named_factors())]
    upstream = torch.randn_like(ref)
    grads = torch.autograd.grad(out, wanted, upstream)
    for grad, exact in zip(grads, torch.autograd.grad(ref, wanted, upstream), strict=True):
        assert error(grad, exact) < 1e-12


def test_dropout_is_off_in_eval_mode():
    layer = trained(HUTLinear(16, 12, 4, dropout=0.5)).eval()
    x = torch.randn(7, 16)
    assert torch.equal(layer(x), layer(x))
    assert error(layer(x), reference(layer, x)) < 2e-6
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("weight_dtype", "autocast"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
)
def test_dropout_runs_in_the_compute_type_and_keeps_no_weight_sized_copy(weight_dtype, autocast):
    base = nn.Linear(64, 48, dtype=weight_dtype)
    layer = trained(HUTLinear.from_linear(base, r=4, dropout=0.3, scale_shift=True))
    x = torch.randn(3, 64, requires_grad=True)
    kept = []
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.3)
    torch.manual_seed(5)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert error(y, reference(layer, x, mask)) < (8e-3 if autocast else 2e-6)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    big = [t for t in kept if t.numel() >= layer.weight.numel()]
    assert all(t.data_ptr() == layer.weight.data_ptr() for t in big)


def test_dropout_compiles_without_a_graph_break():
    layer = trained(HUTLinear(16, 8, 4, dropout=0.3, **PAPER))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert layer.hut_A.grad.norm() > 0


# Construction


@every_form
def test_parameters_have_the_contracts_names_shapes_and_types(form):
    layer = HUTLinear(10, 6, 3, dtype=torch.float16, factor_dtype=torch.bfloat16, **form)
    shapes = {"weight": (6, 10), "bias": (6,), "hut_A": (3, 10), "hut_B": (6, 3)}
    if form.get("scale_shift"):
        shapes |= {"gamma": (6,), "beta": (6,)}
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == shapes
    for name, parameter in layer.named_parameters():
        base = name in ("weight", "bias")
        assert parameter.requires_grad != base
        assert parameter.dtype == (torch.float16 if base else torch.bfloat16)
    assert layer.scale_shift == form.get("scale_shift", False)


def test_a_constructed_layer_draws_the_weights_of_nn_linear():
    torch.manual_seed(7)
    base = nn.Linear(9, 4)
    torch.manual_seed(7)
    layer = HUTLinear(9, 4, 2)
    assert torch.equal(layer.weight, base.weight)
    assert torch.equal(layer.bias, base.bias)
    assert HUTLinear(9, 4, 2, bias=False).bias is None


CHANGES = {
    "alpha": lambda layer: setattr(layer, "alpha", 3 * layer.alpha),
    "offset": lambda layer: setattr(layer, "offset", 0.0),
    "transform": lambda layer: setattr(layer, "transform", "two_sided"),
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(-layer.weight, False)),
    "weight.data": lambda layer: setattr(layer.weight, "data", -layer.weight.data),
    "bias": lambda layer: setattr(layer, "bias", None),
    "requires_grad": lambda layer: layer.hut_A.requires_grad_(False),
    "dtype": lambda layer: layer.double(),
    "parametrized": lambda layer: prune.random_unstructured(layer, "hut_B", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_calls_takes_effect(change):
    """Nothing that a call has found out holds for the next one."""
    layer = trained(HUTLinear(12, 10, 2))
    x = torch.randn(3, 12)
    layer(x).sum().backward()
    layer.zero_grad()
    change(layer)
    x = x.to(layer.weight.dtype)
    y = layer(x)
    y.sum().backward()
    layer.fused = False  # the definition, which keeps nothing
    torch.testing.assert_close(y, layer(x))
    assert (layer.hut_A.grad is None) == (not layer.hut_A.requires_grad)


def test_options_that_are_wrong_by_now_are_refused():
    layer = HUTLinear(12, 10, 2)
    layer(torch.randn(3, 12))
    layer.precision = "double"
    with pytest.raises(ValueError, match="precision must be one of"):
        layer(torch.randn(3, 12))
    layer.precision = "merged"
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight requires grad"):
        layer(torch.randn(3, 12))


def test_the_low_rank_init_leaves_a_gradient_to_hut_B():
    layer = HUTLinear(16, 8, 4)
    assert layer.hut_A.abs().max() <= 1 / math.sqrt(16)
    assert layer.hut_A.std() > 0
    layer(torch.randn(3, 16)).square().sum().backward()
    assert layer.hut_B.grad.norm() > 0
    assert layer.weight.grad is None
    assert layer.bias.grad is None


@every_form
def test_reset_factors_returns_to_the_base_layer(form):
    base = nn.Linear(8, 8)
    layer = trained(HUTLinear.from_linear(base, r=2, **form))
    x = torch.randn(3, 8)
    assert not torch.allclose(layer(x), base(x))
    layer.reset_factors()
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(
    ("options", "scaling", "alpha"),
    [
        ({}, 1.0, 4),
        ({"alpha": 6}, 1.5, 6),
        ({"offset": 0}, 1.0, None),
        ({"transform": "two_sided"}, 1.0, None),
    ],
)
def test_scaling_is_alpha_over_r_and_1_elsewhere(options, scaling, alpha):
    layer = HUTLinear(8, 8, 4, **options)
    assert (layer.scaling, layer.alpha) == (scaling, alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_by_rms_divides_by_the_weights_size(dtype):
    linear = nn.Linear(40, 24).to(dtype)
    size = linear.weight.double().square().mean().sqrt().item()
    layer = HUTLinear.from_linear(linear, 4, alpha=6, scale_by_rms=True)
    assert layer.rms == pytest.approx(size, rel=1e-12)
    assert layer.scaling == 6 / (4 * layer.rms)
    assert HUTLinear.from_linear(linear, 4, scale_by_rms=True).scaling == 4 / (4 * layer.rms)
    x = torch.randn(3, 40, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    with torch.no_grad():
        layer.hut_B.normal_(0, 5e-2)
    delta = layer.merged_weight().double() - linear.weight.double()
    expected = linear.weight.double() * (layer.scaling * (layer.hut_B @ layer.hut_A).double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert (delta - expected).norm() < tolerance * expected.norm()


def test_a_scaling_by_rms_stays_what_it_was():
    layer = HUTLinear(16, 8, 2, scale_by_rms=True)
    scaling = layer.scaling
    assert scaling == copy.deepcopy(layer).scaling == pickle.loads(pickle.dumps(layer)).scaling
    state = layer.state_dict()
    assert (state["rms"].dtype, state["rms"].item()) == (torch.float64, layer.rms)
    other = HUTLinear(16, 8, 2, scale_by_rms=True)
    assert other.scaling != scaling
    other.load_state_dict(state)
    assert other.scaling == scaling
    assert other.half().scaling == scaling
    assert "rms" not in HUTLinear(16, 8, 2).state_dict()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert layer.scaling == scaling
    layer.reset_factors()
    assert layer.scaling == scaling / 2


def test_scale_by_rms_waits_for_a_weight():
    layer = HUTLinear(16, 8, 2, scale_by_rms=True, device="meta")
    with pytest.raises(HUTBackendError, match=r"scale_by_rms: the weight was on the meta device"):
        layer.scaling  # noqa: B018
    state = HUTLinear(16, 8, 2, scale_by_rms=True).state_dict()
    layer.to_empty(device="cpu").load_state_dict(state)
    assert layer.scaling > 1
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match=r"a weight of a finite size that is not 0; got 0\.0"):
        HUTLinear.from_linear(zero, 2, scale_by_rms=True)
    for form in ({"offset": 0}, {"transform": "two_sided"}):
        with pytest.raises(ValueError, match="scale_by_rms belongs to low_rank with offset 1"):
            HUTLinear(4, 4, 2, scale_by_rms=True, **form)
    with pytest.raises(TypeError, match="scale_by_rms must be True or False; got 1"):
        HUTLinear(4, 4, 2, scale_by_rms=1)


@pytest.mark.parametrize("trainable", [True, False])
def test_from_linear_shares_storage_and_keeps_the_original(trainable):
    base = nn.Linear(7, 5).requires_grad_(trainable).eval()
    before = copy.deepcopy(base.state_dict())
    layer = HUTLinear.from_linear(base, r=2)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.bias.data_ptr() == base.bias.data_ptr()
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    assert all(p.requires_grad == trainable for p in base.parameters())
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_from_linear_of_a_subclass_gives_the_subclass():
    class Mine(HUTLinear):
        pass

    assert type(Mine.from_linear(nn.Linear(4, 4), r=2)) is Mine


@pytest.mark.parametrize("device_name", [None, "cpu", "A100", "RTX 4090"])
def test_a_layer_explains_itself(device_name):
    layer = HUTLinear(1024, 512, 8, precision="split", dtype=torch.bfloat16)
    expected = explain(
        64, 1024, 512, 8, dtype=torch.bfloat16, precision="split", device_name=device_name
    )
    assert layer.explain(64, device_name) == expected
    paper = HUTLinear.from_linear(nn.Linear(64, 64).half(), r=4, **PAPER)
    plan = paper.explain(7, device_name)
    assert plan.problem.transform == "two_sided"
    assert (plan.problem.dtype, plan.problem.weight_dtype) == ("float16", "float16")
    with pytest.raises(ValueError, match="N"):
        layer.explain(-1)


# Zeros stay zero.


@pytest.mark.parametrize(
    "form", [{}, {"offset": 0}, {"transform": "two_sided"}, PAPER, {"precision": "split"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_zero_of_a_pruned_base_is_a_zero_of_the_merged_weight(form, dtype):
    linear = nn.Linear(64, 32, dtype=dtype)
    prune.l1_unstructured(linear, "weight", 0.6)
    prune.remove(linear, "weight")
    zeros = linear.weight == 0
    layer = trained(HUTLinear.from_linear(linear, 4, **form))
    merged = layer.to_linear().weight
    assert zeros.sum() >= 0.59 * zeros.numel()
    assert (merged[zeros] == 0).all()
    assert (merged[~zeros] != linear.weight[~zeros]).any()


def test_a_2_4_sparse_base_merges_to_a_2_4_sparse_weight():
    semi_structured = pytest.importorskip("torch.sparse._semi_structured_conversions")
    linear = nn.Linear(128, 64)
    groups = linear.weight.data.view(64, 32, 4)
    groups.scatter_(2, groups.abs().topk(2, largest=False).indices, 0.0)
    layer = trained(HUTLinear.from_linear(linear, 4))
    merged = layer.to_linear().weight.data.view(64, 32, 4)
    assert ((merged != 0).sum(2) <= 2).all()
    # What torch.sparse.to_sparse_semi_structured packs on a GPU, in PyTorch's own form for CPUs.
    weight = merged.view(64, 128).half()
    packed = semi_structured.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed[0].shape == (64, 64)
    assert torch.equal(semi_structured.sparse_semi_structured_to_dense_cutlass(*packed), weight)
    delta = merged.view(64, 128) - linear.weight.data
    assert torch.linalg.matrix_rank(delta.double()) > 4  # of more than LoRA's rank


def test_repr_names_every_option():
    text = repr(HUTLinear(8, 6, 2, alpha=3, dropout=0.1, scale_shift=True, precision="split"))
    for part in ("in_features=8", "out_features=6", "r=2", "alpha=3", "'low_rank'", "offset=1"):
        assert part in text
    for part in ("bias=True", "dropout=0.1", "scale_shift=True", "'split'", "fused=True"):
        assert part in text
    assert "fan_in_fan_out=True" in repr(HUTLinear.from_linear(Conv1D(4, 6)))


# Conv1D


@every_form
def test_conv1d_stays_stored_as_in_out(form):
    base = Conv1D(10, 14)
    layer = trained(HUTLinear.from_linear(base, r=4, **form))
    assert (layer.in_features, layer.out_features) == (14, 10)
    assert layer.fan_in_fan_out
    assert layer.state_dict()["weight"].shape == (14, 10)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.merged_weight().shape == (14, 10)
    assert layer.merged_weight().is_contiguous()


@pytest.mark.parametrize("through", [copy.deepcopy, reload, lambda layer: layer])
def test_conv1d_merges_back_to_its_own_class(through):
    layer = through(trained(HUTLinear.from_linear(Conv1D(10, 14), r=4, **PAPER)))
    plain = layer.to_linear()
    x = torch.randn(2, 3, 14)
    assert type(plain) is Conv1D
    assert plain.nf == 10
    assert error(plain(x), reference(layer, x)) < 2e-6


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    base = pytorch_utils.Conv1D(10, 14)
    x = torch.randn(2, 3, 14)
    layer = HUTLinear.from_linear(base, r=4)
    torch.testing.assert_close(layer(x), base(x))
    plain = pickle.loads(pickle.dumps(trained(layer))).to_linear()
    assert type(plain) is pytorch_utils.Conv1D
    assert error(plain(x), reference(layer, x)) < 2e-6


# Moving, copying, saving


@every_form
@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, reload, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "torch.save", "pickle"],
)
def test_a_copy_computes_the_same_and_is_independent(form, through):
    layer = trained(HUTLinear(9, 7, 3, **form))
    other = through(layer)
    x = torch.randn(4, 9)
    y = layer(x)
    assert torch.equal(other(x), y)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in layer.parameters()
    ]
    trained(other)
    assert torch.equal(layer(x), y)


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_a_type_moves_every_parameter(form, dtype):
    layer = trained(HUTLinear(16, 8, 2, **form)).to(dtype)
    y = layer(torch.randn(3, 16, dtype=dtype))
    assert y.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert HUTLinear(4, 4, 2).half().hut_A.dtype == torch.float16


@every_form
@pytest.mark.parametrize("from_base", [True, False])
def test_meta_init_then_to_empty(form, from_base):
    source = trained(HUTLinear(9, 7, 3, **form))
    with torch.device("meta"):
        layer = HUTLinear(9, 7, 3, **form)
        if from_base:
            layer = HUTLinear.from_linear(nn.Linear(9, 7), r=3, **form)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu").reset_factors()
    layer.load_state_dict({k: source.state_dict()[k] for k in ("weight", "bias")}, strict=False)
    x = torch.randn(2, 9)
    assert torch.equal(layer(x), F.linear(x, source.weight, source.bias))
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


class Doubled(nn.Module):
    def forward(self, X):
        return 2 * X


@pytest.mark.parametrize("name", ["hut_A", "hut_B", "gamma", "bias"])
def test_a_parametrized_parameter_counts_as_what_it_computes(name):
    layer = trained(HUTLinear(9, 7, 3, **PAPER))
    x = torch.randn(4, 9)
    doubled = copy.deepcopy(layer)
    getattr(doubled, name).data.mul_(2)
    parametrize.register_parametrization(layer, name, Doubled())
    assert torch.equal(layer(x), doubled(x))
    layer(x).sum().backward()
    if name != "bias":
        doubled(x).sum().backward()
        assert torch.allclose(
            layer.parametrizations[name].original.grad, 2 * getattr(doubled, name).grad
        )


def test_autocast_casts_only_the_input():
    layer = trained(HUTLinear(16, 8, 2, scale_shift=True))
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert error(y, reference(layer, x)) < 1e-2
    y.float().sum().backward()
    assert layer.hut_A.grad.dtype == torch.float32


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be at least 1; got 0"),
        ({"r": 7, "transform": "two_sided"}, "= 6; got r = 7"),
        ({"transform": "lora"}, "transform must be one of .*'lora'"),
        ({"precision": "half"}, "precision must be one of .*'half'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"offset": 0.5}, "offset must be 1 .* or 0 .* got 0.5"),
        ({"offset": 0, "transform": "two_sided"}, "offset has no part in two_sided"),
        ({"alpha": 4, "transform": "two_sided"}, "alpha belongs to low_rank with offset 1"),
        ({"alpha": 4, "offset": 0}, "alpha belongs to low_rank with offset 1"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": math.inf}, "alpha must be a positive number"),
    ],
)
@pytest.mark.parametrize(
    "make", [HUTLinear, lambda *a, **k: HUTLinear.from_linear(nn.Linear(*a), **k)]
)
def test_invalid_options_of_a_layer_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(8, 6, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 2.5}, "r must be an integer; got 2.5"),
        ({"r": "8"}, "r must be an integer; got '8'"),
        ({"r": True}, "r must be an integer; got True"),
        ({"r": None}, "r must be an integer; got None"),
        ({"alpha": "1"}, "alpha must be a real number; got str"),
        ({"alpha": True}, "alpha must be a real number; got bool"),
        ({"alpha": torch.tensor(2.0)}, "alpha must be a real number; got Tensor"),
        ({"offset": None}, "offset must be a real number; got NoneType"),
        ({"dropout": torch.tensor(0.5)}, "dropout must be a real number; got Tensor"),
        ({"dropout": False}, "dropout must be a real number; got bool"),
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        HUTLinear(8, 6, **options)


@pytest.mark.parametrize("name", ["dtype", "factor_dtype"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_types_that_make_no_layer_are_refused(name, dtype):
    with pytest.raises(TypeError, match=f"{name} must be one of float16.*{dtype}"):
        HUTLinear(8, 6, 2, **{name: dtype})


def test_unknown_option_of_from_linear_is_refused():
    with pytest.raises(TypeError, match="rank"):
        HUTLinear.from_linear(nn.Linear(4, 4), rank=2)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def patched():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv1d(4, 4, 1), "expected an nn.Linear or a Conv1D; got Conv1d"),
        (HUTLinear(4, 4, 2), "got HUTLinear"),
        (OwnForward(4, 4), "OwnForward has a forward of its own"),
        (patched(), "Linear has a forward of its own"),
    ],
)
def test_modules_with_another_forward_are_refused(module, message):
    with pytest.raises(TypeError, match=message):
        HUTLinear.from_linear(module)


def with_weight(weight):
    linear = nn.Linear(4, 4)
    linear.register_parameter("weight", None)
    linear.weight = weight
    return linear


class Params4bit(nn.Parameter):
    pass


class QuantLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class PackedLinear(nn.Module):
    def weight(self):
        return None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (with_weight(Params4bit(torch.zeros(8, dtype=torch.uint8), False)), "Params4bit"),
        (with_weight(Params4bit(torch.zeros(4, 4))), "Params4bit"),
        (with_weight(nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), False)), "int8"),
        (with_weight(nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), False)), "float8"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrization"),
        (prune.l1_unstructured(nn.Linear(4, 4), "bias", 0.5), "the bias of Linear"),
        (nn.LazyLinear(4), "UninitializedParameter"),
        (QuantLinear(), "QuantLinear"),
        (PackedLinear(), "PackedLinear"),
    ],
)
def test_weights_that_are_no_plain_float_parameter_are_refused_by_name(module, message):
    with pytest.raises(HUTBackendError, match=message):
        HUTLinear.from_linear(module)


def test_a_sharded_weight_is_refused_by_name():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(DTensor.from_local(linear.weight.data, mesh, [Replicate()]))
        with pytest.raises(HUTBackendError, match="DTensor"):
            HUTLinear.from_linear(linear)
    finally:
        distributed.destroy_process_group()


def test_fsdp1_is_refused_by_name():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    from torch.distributed.fsdp import FullyShardedDataParallel

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = HUTLinear(8, 8, 2)
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(layer, device_id=cpu, use_orig_params=True)
        with pytest.raises(ValueError, match=r"FSDP1 .*fully_shard; fsdp_version: 2"):
            model(torch.randn(3, 8))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_calls_that_hut_linear_refuses(training):
    layer = HUTLinear(8, 6, 2, dropout=0.5).train(training)
    with pytest.raises(ValueError, match=r"8.*7"):
        layer(torch.randn(3, 7))
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        layer(torch.randn(3, 8))


def test_a_second_backward_names_once_differentiable():
    layer = trained(HUTLinear(8, 6, 2))
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
