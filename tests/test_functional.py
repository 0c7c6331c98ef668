"""hut_linear and hut_weight: right for any shape, type, stride and option, and every refusal."""

import math

import pytest
import torch
from hypothesis import given

from hut_kernels import HUTBackendError, hut_linear, hut_weight, onednn, torch_backend
from hut_kernels.checks import check_weight

from .references import (
    LAYOUTS,
    Recorder,
    cancelling,
    check,
    error,
    gain,
    laid_out,
    limit,
    make,
    make_normal,
    run,
    update_limit,
    update_of,
)
from .strategies import cases, examples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = DTYPES[1:]
FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0, "scaling": 1.25},
    "two_sided": {"transform": "two_sided"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_ways = pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])


# Against float64


@given(case=cases(DTYPES))
@examples(300)
def test_any_layer_matches_the_reference(case):
    check(case, run(case))


@every_form
@every_dtype
@pytest.mark.parametrize("precision", ["merged", "split"])
@both_ways
def test_a_layer_of_real_proportions_matches_the_reference(form, dtype, precision, fused):
    """Normally distributed data; factors as they are used, float32 over any base."""
    case = make_normal(
        33, 190, 130, 5, dtype=dtype, vectors="bias gamma beta", precision=precision, **form
    )
    check(case, run(case, fused=fused))


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [None, "expanded", "constant"])
def test_any_strides_give_the_same(form, layout, grad):
    case = make_normal(7, 19, 13, 3, vectors="bias gamma beta", **form)
    check(laid_out(case, layout, grad), run(laid_out(case, layout, grad)))


def test_an_input_expanded_over_the_batch():
    case = make_normal(9, 14, 11, 3)
    case = case.replace(x=case.x[:1].expand(9, 14))
    check(case, run(case))


@every_form
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(form, leading):
    case = make(leading, 10, 6, 2, vectors="bias gamma beta", **form)
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, case.bias, **case.options)
    assert y.shape == (*leading, 6)
    check(case, run(case))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 3, 0), (0, 3, 2), (0, 0, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("leading", [1, 2])
def test_dimensions_of_0_and_1(sizes, leading, fused):
    N, K, O = sizes
    case = make((N,) * leading, K, O, 2, vectors="bias gamma beta")
    check(case, run(case, fused=fused))


@pytest.mark.parametrize("r", [1, 2, 3, 16, 17, 33, 64, 128, 131])
@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
def test_any_rank(r, transform):
    case = make_normal(5, 140, 133, r, vectors="gamma", transform=transform)
    check(case, run(case))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate_as_in_a_linear_layer(value, fused):
    case = make(3, 6, 5, 2)
    x = case.x.clone()
    x[1, 2] = value
    y = hut_linear(x, case.weight, case.hut_A, case.hut_B, fused=fused)
    assert not y[1].isfinite().any()
    assert y[::2].isfinite().all()


def test_the_output_is_a_tensor_of_its_own():
    case = make(3, 6, 6, 1)
    ones = torch.ones_like
    for hut_A, hut_B in ((case.hut_A, case.hut_B), (ones(case.hut_A), ones(case.hut_B))):
        y = hut_linear(case.x, case.weight, hut_A, hut_B, offset=0.0)
        assert not y._is_view()
        assert y.is_contiguous()
        assert y.data_ptr() not in {case.x.data_ptr(), case.weight.data_ptr()}


@pytest.mark.parametrize("precision", ["merged", "split"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 0, 6)], ids=str)
@both_ways
def test_the_output_may_be_changed_in_place(shape, precision, fused):
    case = make(1, 6, 5, 2)
    factors = [factor.clone().requires_grad_() for factor in (case.hut_A, case.hut_B)]
    x, bias = torch.randn(shape, dtype=case.x.dtype), torch.ones(5, dtype=case.x.dtype)
    y = hut_linear(x, case.weight, *factors, bias, precision=precision, fused=fused)
    assert not (fused and y._is_view())
    wanted = y.detach().clone().relu()
    assert torch.equal(y.relu_(), wanted)
    y.sum().backward()


# The update on its own


@every_form
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("precision", ["merged", "split"])
@pytest.mark.parametrize("gamma", ["", "gamma"])
@both_ways
def test_the_update_arrives_where_the_base_cancels(form, dtype, precision, gamma, fused):
    form = {**form, "scaling": 1.0} if form.get("offset") == 0 else form
    case = cancelling(make_normal(32, 256, 192, 4, dtype=dtype, **form), 5e-2)
    case = case.replace(precision=precision)
    if gamma:  # a power of two leaves every rounding as it is
        case = case.replace(gamma=torch.full((192,), 0.5))
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, **case.options, fused=fused)
    update = update_of(case) * (0.5 if gamma else 1.0)
    assert error(y, update) <= update_limit(dtype, case.transform, precision)


@every_form
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_split_keeps_an_update_of_a_thousandth(form, dtype, fused):
    form = {**form, "scaling": 1.0}
    case = cancelling(make_normal(32, 256, 192, 4, dtype=dtype, **form), 1e-3)
    case = case.replace(precision="split")
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, **case.options, fused=fused)
    assert 0.98 <= gain(y, update_of(case)) <= 1.02


@pytest.mark.parametrize("fused", [True, False])
def test_the_dead_zone_of_merged_in_bfloat16_is_as_documented(fused):
    case = cancelling(make_normal(64, 512, 256, 16, dtype=torch.bfloat16), 1e-3)
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B, fused=fused)
    assert 0.1 < gain(y, update_of(case)) < 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_merged_has_no_dead_zone_in_the_finer_types(dtype):
    case = cancelling(make_normal(32, 256, 192, 4, dtype=dtype), 1e-3)
    y = hut_linear(case.x, case.weight, case.hut_A, case.hut_B)
    assert 0.95 <= gain(y, update_of(case)) <= 1.05


@pytest.mark.parametrize("precision", ["merged", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_input_gradient_carries_the_update_too(dtype, precision):
    """The same base, cancelling over the outputs: dx is the update's alone."""
    case = cancelling(make_normal(32, 192, 256, 4, dtype=dtype), 5e-2)
    weight, grad = case.weight.clone(), case.grad.clone()
    weight[1::2], grad[:, 1::2] = -weight[::2], grad[:, ::2]
    case = case.replace(weight=weight, grad=grad, precision=precision)
    increment = case.weight.double().numpy() * (case.multiplier() - 1.0)
    dx = run(case)["x"]
    assert error(dx, case.grad.double().numpy() @ increment) <= update_limit(
        dtype, "low_rank", precision
    )


@every_form
def test_the_gradients_know_no_dead_zone(form):
    """A factor's gradient is that of the formulas, however small the update."""
    form = {**form, "scaling": 1.0}
    case = make_normal(32, 96, 80, 4, dtype=torch.bfloat16, **form)
    case = case.replace(hut_B=torch.full_like(case.hut_B, 1e-5))
    results = run(case)
    check(case, {name: results[name] for name in ("hut_A", "hut_B")})


# The merged weight


@given(case=cases(DTYPES, leading=False))
@examples(60)
def test_hut_weight_matches_the_reference(case):
    options = {name: case.options[name] for name in ("transform", "offset", "scaling", "gamma")}
    for dtype in (None, torch.float32, torch.bfloat16):
        out = hut_weight(case.weight, case.hut_A, case.hut_B, **options, dtype=dtype)
        assert out.dtype == (dtype or case.weight.dtype)
        allowed = torch.finfo(out.dtype).eps / 2  # rounded once
        exact = torch.finfo(out.dtype).eps < 1e-10
        wide = 1e-12 if exact and case.hut_A.dtype == torch.float64 else 2e-6
        assert error(out, case.merged_weight()) <= allowed + wide


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", ["", "gamma"])
@pytest.mark.parametrize("size", [(17, 21), (300, 256)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("emulates", [False, True])
def test_forward_multiplies_by_the_merged_weight_to_the_bit(
    form, dtype, vectors, size, layout, emulates, monkeypatch
):
    """Of many tokens, by W as a whole, and of one, tile by tile; but for rounded increments."""
    monkeypatch.setattr(onednn, "emulates_bf16", lambda: emulates)
    O, K = size
    case = make_normal(K, K, O, 3, dtype=dtype, vectors=vectors, **form)
    case = laid_out(case.replace(x=torch.eye(K, dtype=dtype)), layout)
    options = {name: case.options[name] for name in ("transform", "offset", "scaling", "gamma")}
    operands = case.weight, case.hut_A, case.hut_B
    merged = hut_weight(*operands, **options)
    used = hut_linear(case.x, *operands, **options).t()
    residual = case.options["transform"] == "low_rank" and case.options["offset"] == 1.0
    large = O * K >= torch_backend._LARGE
    native = onednn.is_native(dtype, case.x.device)
    if native and residual and large and not vectors:
        # Either factor is rounded, and with them the increment m: docs/definition.md allows it, and
        # to the bit W would take three times as long. The roundings of W and of m add up in square.
        m = float(((case.multiplier() - 1.0) ** 2).mean() ** 0.5)
        assert (used == merged).double().mean() > 0.9
        allowed = 1.01 * (1.0 + 2.0 * m * m) ** 0.5 * error(merged, case.merged_weight())
        assert error(used, case.merged_weight()) < allowed
    else:
        assert torch.equal(used, merged)
    for tokens in (1, 16):
        assert torch.equal(hut_linear(case.x[:tokens], *operands, **options).t(), used[:, :tokens])


def test_hut_weight_is_detached_and_new():
    case = make(1, 6, 5, 2)
    case.hut_A.requires_grad_()
    case.weight.requires_grad_()  # merging a weight that is trained elsewhere is no error
    out = hut_weight(case.weight, case.hut_A, case.hut_B)
    assert not out.requires_grad
    assert out.data_ptr() != case.weight.data_ptr()


@every_form
def test_a_merged_layer_is_a_plain_linear_layer(form):
    case = make_normal(9, 21, 17, 3, vectors="bias gamma beta", **form)
    options = {name: case.options[name] for name in ("transform", "offset", "scaling", "gamma")}
    weight = hut_weight(case.weight, case.hut_A, case.hut_B, **options)
    y = torch.nn.functional.linear(case.x, weight, case.gamma * case.bias + case.beta)
    assert error(y, case.expected()["y"]) < limit(torch.float32, 21)


# Autocast: x alone is cast


@both_ways
def test_autocast_casts_only_x(fused):
    case = make_normal(6, 12, 9, 3, vectors="bias gamma beta")
    with torch.autocast("cpu", torch.bfloat16):
        y = hut_linear(
            case.x, case.weight, case.hut_A, case.hut_B, case.bias, **case.options, fused=fused
        )
    assert y.dtype == torch.bfloat16
    assert error(y, case.replace(x=case.x.bfloat16()).expected()["y"]) < limit(torch.bfloat16, 12)
    with torch.autocast("cpu", torch.bfloat16):
        same = hut_linear(case.x.double(), case.weight, case.hut_A, case.hut_B, fused=fused)
    assert same.dtype == torch.float64
    assert error(same, case.replace(bias=None, gamma=None, beta=None).expected()["y"]) < 1e-12


# Errors


def arguments(**changes):
    """A valid call of hut_linear, x `[3, 8]`, weight `[6, 8]`, r = 2, with changes."""
    call = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "hut_A": torch.randn(2, 8),
        "hut_B": torch.randn(6, 2),
    }
    return {**call, **changes}


def raises(kind, call, *parts, of=hut_linear):
    """The call raises `kind` before any operator ran; the message has all the parts."""
    with Recorder() as recorder, pytest.raises(kind) as caught:
        of(**call)
    assert type(caught.value) is kind
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in: {caught.value}"
    assert recorder.calls == []


def test_the_call_that_the_refusals_change_is_valid():
    assert hut_linear(**arguments()).shape == (3, 6)


@both_ways
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"x": torch.zeros(3, 7)}, ("x", "in_features", 8, 7)),
        ({"x": torch.zeros(())}, ("x", 8, "scalar")),
        ({"weight": torch.zeros(6)}, ("weight", "2 dimensions", "(6,)")),
        ({"weight": torch.zeros(6, 8, 1)}, ("weight", "2 dimensions", "(6, 8, 1)")),
        ({"weight": torch.zeros(8, 6)}, ("x", 6, 8)),
        ({"hut_A": torch.zeros(2)}, ("hut_A", "2 dimensions", "(2,)")),
        ({"hut_A": torch.zeros(2, 9)}, ("hut_A", "in_features", 8, 9)),
        ({"hut_A": torch.zeros(0, 8), "hut_B": torch.zeros(6, 0)}, ("r must be at least 1", "0")),
        ({"hut_B": torch.zeros(5, 2)}, ("hut_B", "out_features", 6, 5)),
        ({"hut_B": torch.zeros(6, 3)}, ("hut_B", "r = 2", 3)),
        ({"hut_B": torch.zeros(6)}, ("hut_B", "2 dimensions", "(6,)")),
        ({"bias": torch.zeros(5)}, ("bias", 6, 5)),
        ({"bias": torch.zeros(())}, ("bias", 6, "()")),
        ({"gamma": torch.zeros(6, 1)}, ("gamma", 6, "(6, 1)")),
        ({"beta": torch.zeros(8)}, ("beta", 6, 8)),
        (
            {"transform": "two_sided", "hut_A": torch.ones(7, 8), "hut_B": torch.ones(6, 7)},
            ("two_sided", "min(in_features, out_features) = 6", "r = 7"),
        ),
    ],
)
def test_shapes_that_do_not_fit(changes, parts, fused):
    raises(ValueError, arguments(**changes, fused=fused), *parts)


@both_ways
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"transform": "lora"}, ("transform", "low_rank", "two_sided", "'lora'")),
        ({"transform": None}, ("transform", "low_rank", "None")),
        ({"precision": "half"}, ("precision", "merged", "split", "'half'")),
        ({"transform": "two_sided", "offset": 0.0}, ("two_sided", "offset=0.0")),
        ({"transform": "two_sided", "scaling": 2.0}, ("two_sided", "scaling=2.0")),
    ],
)
def test_unknown_options_are_refused(changes, parts, fused):
    raises(ValueError, arguments(**changes, fused=fused), *parts)


def test_unknown_backend():
    raises(ValueError, arguments(backend="metal"), "auto, torch, triton, cuda", "'metal'")


@pytest.mark.parametrize("backend", ["triton", "cuda", "metal"])
def test_eager_runs_only_on_torch(backend):
    raises(ValueError, arguments(fused=False, backend=backend), "fused=False", backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_eager_takes_the_backends_that_are_torch(backend):
    call = arguments()
    torch.testing.assert_close(
        hut_linear(**call, fused=False, backend=backend), hut_linear(**call, fused=True)
    )


@both_ways
@pytest.mark.parametrize("name", ["x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_types_that_no_layer_has(name, dtype, fused):
    shapes = {"x": (3, 8), "weight": (6, 8), "hut_A": (2, 8), "hut_B": (6, 2)}
    tensor = torch.zeros(shapes.get(name, (6,))).to(dtype)
    raises(TypeError, arguments(**{name: tensor}, fused=fused), name, "float32", "bfloat16", dtype)


@both_ways
@pytest.mark.parametrize("name", ["hut_A", "hut_B", "bias", "gamma", "beta"])
def test_tensors_on_different_devices(name, fused):
    shapes = {"hut_A": (2, 8), "hut_B": (6, 2)}
    tensor = torch.zeros(shapes.get(name, (6,)), device="meta")
    raises(ValueError, arguments(**{name: tensor}, fused=fused), "one device", "cpu", name, "meta")


def test_x_on_another_device():
    raises(ValueError, arguments(x=torch.zeros(3, 8, device="meta")), "one device", "meta", "cpu")


@both_ways
def test_a_weight_that_requires_grad(fused):
    weight = torch.randn(6, 8, requires_grad=True)
    raises(ValueError, arguments(weight=weight, fused=fused), "requires grad", "frozen", "detach")
    view = torch.randn(48, requires_grad=True).view(6, 8)  # FSDP1 makes frozen weights such views
    raises(ValueError, arguments(weight=view, fused=fused), "FSDP1", "fully_shard", "fsdp_version")


@both_ways
def test_a_weight_on_the_meta_device(fused):
    weight = torch.zeros(6, 8, device="meta")
    raises(HUTBackendError, arguments(weight=weight, fused=fused), "meta")


@both_ways
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_weight(fused):
    weight = torch.quantize_per_tensor(torch.randn(6, 8), 0.1, 0, torch.qint8)
    raises(HUTBackendError, arguments(weight=weight, fused=fused), "quantized", "qint8")


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes names its packed parameter."""


class DTensor(torch.Tensor):
    """The mark of a sharded tensor: the local one in it."""

    _local_tensor = None


@pytest.mark.parametrize(
    ("weight", "parts"),
    [
        (Params4bit(torch.zeros(6, 8), requires_grad=False), ("not quantized yet", "Params4bit")),
        (torch.zeros(6, 8).as_subclass(DTensor), ("sharded", "DTensor", "full_tensor")),
    ],
)
def test_weights_of_foreign_kinds(weight, parts):
    raises(HUTBackendError, arguments(weight=weight), *parts)
    call = {k: v for k, v in arguments(weight=weight).items() if k != "x"}
    raises(HUTBackendError, call, *parts, of=hut_weight)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["x", "hut_A", "hut_B", "bias", "gamma", "beta"])
def test_a_sharded_argument_with_a_plain_weight(name, fused):
    call = arguments(fused=fused) | {key: torch.zeros(6) for key in ("bias", "gamma", "beta")}
    call[name] = call[name].as_subclass(DTensor)
    raises(HUTBackendError, call, f"{name} is sharded", "DTensor", "to_local")


def test_plain_weights_pass():
    check_weight(torch.zeros(2, 2))
    check_weight(torch.nn.Parameter(torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        (ValueError, {"transform": "lora"}, ("transform", "'lora'")),
        (ValueError, {"hut_A": torch.zeros(2, 9)}, ("hut_A", 8, 9)),
        (ValueError, {"hut_B": torch.zeros(6, 3)}, ("hut_B", 2, 3)),
        (ValueError, {"gamma": torch.zeros(5)}, ("gamma", 6, 5)),
        (ValueError, {"hut_A": torch.zeros(2, 8, device="meta")}, ("weight", "cpu", "meta")),
        (ValueError, {"transform": "two_sided", "scaling": 2.0}, ("two_sided", "scaling=2.0")),
        (TypeError, {"dtype": torch.int8}, ("dtype", "float32", torch.int8)),
        (TypeError, {"weight": torch.zeros(6, 8, dtype=torch.int32)}, ("weight", torch.int32)),
    ],
)
def test_refusals_of_hut_weight(kind, changes, parts):
    call = {k: v for k, v in arguments().items() if k != "x"}
    raises(kind, {**call, **changes}, *parts, of=hut_weight)


def test_all_on_the_meta_device_gives_a_shape():
    call = {name: tensor.to("meta") for name, tensor in arguments().items()}
    for fused in (True, False):
        y = hut_linear(**call, fused=fused)
        assert (y.shape, y.device.type) == ((3, 6), "meta")
