"""HUT over quantized weights: against float64, against the base layer, and what is kept of it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hut_kernels import (
    HUTLinear,
    adapter_options,
    explain,
    formats,
    hut_linear,
    hut_weight,
    inject,
    load_adapter,
    merge,
    parameter_groups,
    save_adapter,
)
from hut_kernels.errors import HUTBackendError

from ..references import TRAINABLE, check, error, make_normal
from .weights import (
    assert_compiles_alike,
    assert_loss_falls,
    bnb,
    four_bit,
    linear4bit,
    linear8bit,
    repacked,
)

FORMS = {
    "residual": {"scaling": 0.75},
    "direct": {"offset": 0.0},
    "two_sided": {"transform": "two_sided"},
    "split": {"precision": "split"},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def nf4(weight):
    return four_bit(weight.float(), "nf4")


def fp4_nested_across_rows(weight):
    return four_bit(weight.float(), "fp4", 128, nested=False)


def int8_params(weight):
    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight.data = weight.float()
    return layer.to("cpu").weight


def torchao(name, weight):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
    model[0].weight.data = weight.float()
    quantization.quantize_(model, getattr(quantization, name)())
    return model[0].weight.requires_grad_(False)


QUANTIZED = {
    "nf4": nf4,
    "fp4": fp4_nested_across_rows,
    "int8": int8_params,
    "Int8Tensor": lambda weight: torchao("Int8WeightOnlyConfig", weight),
    "Float8Tensor": lambda weight: torchao("Float8WeightOnlyConfig", weight),
    "IntxUnpackedToInt8Tensor": lambda weight: torchao("IntxWeightOnlyConfig", weight),
}
every_format = pytest.mark.parametrize("quantize", QUANTIZED.values(), ids=QUANTIZED)


def over(case, weight):
    """The case with the values of a quantized weight, in the compute type, for its own."""
    stored = formats.stored(weight)
    if isinstance(stored, formats.Stored):
        return case.replace(weight=stored.dense(case.x.dtype))
    return case.replace(weight=formats.dense(weight).to(case.x.dtype))


def run(case, weight, **how):
    """`y` and every gradient over the quantized weight."""
    leaves = {
        name: value.detach().requires_grad_()
        for name in TRAINABLE
        if (value := getattr(case, name)) is not None
    }
    options = {**case.options, "gamma": leaves.get("gamma"), "beta": leaves.get("beta"), **how}
    x, A, B = leaves["x"], leaves["hut_A"], leaves["hut_B"]
    y = hut_linear(x, weight, A, B, leaves.get("bias"), **options)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad)
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


@every_format
@every_form
@every_dtype
@pytest.mark.parametrize("vectors", ["", "bias gamma beta"], ids=["plain", "vectors"])
def test_every_result_against_float64(quantize, form, dtype, vectors):
    case = make_normal((3, 5), 48, 64, 5, dtype=dtype, vectors=vectors, **form)
    weight = quantize(case.weight)
    case = over(case, weight)
    check(case, run(case, weight))
    check(case, run(case, weight, fused=False))


@every_form
@every_dtype
@pytest.mark.parametrize("emulates", [False, True])
def test_rows_in_blocks(form, dtype, emulates, monkeypatch):
    """G, T and W0 some rows at a time, none of them as the others."""
    monkeypatch.setattr("hut_kernels.onednn.emulates_bf16", lambda: emulates)
    monkeypatch.setattr("hut_kernels.torch_backend._BLOCK", 7 * 50)
    monkeypatch.setattr("hut_kernels.multiplier._TILE", 3 * 50)
    monkeypatch.setattr("hut_kernels.multiplier._ROUNDED_TILE", 4 * 50)
    monkeypatch.setattr("hut_kernels.formats.base._TILE", 2 * 50)
    case = make_normal(9, 50, 33, 3, dtype=dtype, vectors="bias gamma beta", **form)
    weight = nf4(case.weight)
    case = over(case, weight)
    check(case, run(case, weight))
    plain = case.replace(bias=None, gamma=None, beta=None)
    check(plain, run(plain, weight))


@every_format
@pytest.mark.parametrize("form", [FORMS["residual"], FORMS["two_sided"]], ids=["low", "two"])
def test_merged_weight(quantize, form):
    case = make_normal(1, 48, 64, 5, vectors="gamma", **form)
    weight = quantize(case.weight)
    case = over(case, weight)
    options = {name: case.options[name] for name in ("transform", "offset", "scaling", "gamma")}
    for dtype in (None, torch.float32, torch.bfloat16):
        merged = hut_weight(weight, case.hut_A, case.hut_B, dtype=dtype, **options)
        assert merged.dtype == dtype or dtype is None
        assert error(merged, case.merged_weight()) < (5e-3 if dtype == torch.bfloat16 else 2e-6)


@every_format
def test_only_x_and_the_layer_are_saved(quantize):
    weight = quantize(torch.randn(512, 256))
    x = torch.randn(64, 256, requires_grad=True)
    A, B = torch.randn(8, 256, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = hut_linear(x, weight, A, B)
    own = {t.data_ptr() for t in kept if type(t) is torch.Tensor}
    stored = formats.stored(weight)
    layer = [x, A, B, *((stored.data, *stored.scales) if stored is not weight else ())]
    assert own <= {tensor.data_ptr() for tensor in layer}
    assert not any(t.shape == (512, 256) and type(t) is torch.Tensor for t in kept)
    y.sum().backward()


def test_operations_are_those_of_the_layer():
    weight = four_bit(torch.randn(64, 48))
    x, A, B = torch.randn(7, 48), torch.randn(4, 48), torch.randn(64, 4)
    with FlopCounterMode(display=False) as counter:
        hut_linear(x, weight, A, B)
    assert counter.get_total_flops() == 2 * 7 * 64 * 48 + 2 * 64 * 48 * 4


# A fresh layer is its base layer


@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"transform": "two_sided", "scale_shift": True}], ids=str)
def test_a_fresh_layer_equals_its_linear4bit_in_training(stored_as, compute, given, options):
    base = linear4bit(dtype=stored_as, compute_dtype=compute).train()
    layer = HUTLinear.from_linear(base, r=4, **options)
    x = torch.randn(3, 64, dtype=given, requires_grad=True)
    y, expected = layer(x), base(x)
    assert y.dtype == expected.dtype == given
    assert torch.equal(y, expected)
    dx, d_base = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
    if stored_as == base.compute_dtype:  # elsewhere the base's backward rounds W0 twice
        assert torch.equal(dx, d_base)


def test_a_fresh_layer_equals_its_linear8bit_in_training():
    base = linear8bit().train()
    x = torch.randn(3, 64).bfloat16()
    expected = base(x)  # which moves the scales to the layer's state
    assert base.weight.SCB is None
    assert torch.equal(HUTLinear.from_linear(base, r=4)(x), expected)


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_under_autocast(make):
    base = make().train()
    layer = HUTLinear.from_linear(base, r=4)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), base(x)
    assert error(y, expected.detach().double()) < 8e-3
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_evaluation_changes_nothing(make):
    """Bitsandbytes' own layers would be repacked, or quantize x."""
    layer = HUTLinear.from_linear(make(), r=4).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = layer(x)
    assert not hasattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu")
    assert torch.equal(layer.train()(x), y)


@pytest.mark.parametrize("sizes", [(50, 64), (64, 80), (64, 65), (33, 7)], ids=str)
def test_sizes_that_bitsandbytes_cannot_evaluate_on_a_cpu(sizes):
    """Nor does an evaluation compute in bfloat16, as its does over float32 layers."""
    base = linear4bit(*sizes)
    layer = trained(HUTLinear.from_linear(base, r=4)).eval()
    x = torch.randn(5, sizes[1])
    W = layer.merged_weight().double()
    with torch.no_grad():
        assert error(layer(x), x.double() @ W.T + base.bias.double()) < 2e-6
    if bnb.functional.has_avx512bf16():
        with pytest.raises((AssertionError, RuntimeError)), torch.no_grad():
            base.eval()(x)


@pytest.mark.parametrize("training", [True, False])
def test_over_a_repacked_base_gradients_are_right(training):
    base = linear4bit(dtype=torch.bfloat16, bias=False)
    W0 = formats.stored(base.weight).dense(torch.float64)
    repacked(base)
    x = torch.randn(5, 64, requires_grad=True)
    layer = HUTLinear.from_linear(base, r=4).train(training)
    y = layer(x)
    grad = torch.randn_like(y)
    assert error(y, x.detach().double() @ W0.T) < 8e-3
    (dx,) = torch.autograd.grad(y, x, grad)
    assert error(dx, grad.double() @ W0) < 8e-3


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_dropout_is_of_the_update_only(make):
    base = make().train()
    layer = HUTLinear.from_linear(base, r=4, dropout=0.5, scale_shift=True)
    x = torch.randn(3, 64)
    assert error(layer(x), base(x).detach().double()) < 1e-5  # no update yet
    with torch.no_grad():
        layer.hut_B.normal_()
    x.requires_grad_()
    assert error(layer(x), layer.eval()(x).detach().double()) > 1e-2
    layer.train()(x).sum().backward()
    assert all(p.grad is not None for _, p in layer.named_factors())


# The layer as a module


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_copies_share_nothing_that_the_libraries_change(make):
    base = make()
    layer = HUTLinear.from_linear(base, r=4)
    x = torch.randn(3, 64)
    y = layer(x)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.weight is not base.weight
    other = copy.deepcopy(layer)
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    base.eval()
    with torch.no_grad():
        base(x)  # repacks a Linear4bit, moves the scales of a Linear8bitLt
    for each in (layer, other, layer.to("cpu"), layer.float()):
        assert torch.equal(each(x), y)


@pytest.mark.parametrize(
    "make", [linear4bit, linear8bit, lambda: linear4bit(nested=False)], ids=["4", "8", "4 plain"]
)
def test_state_dict_holds_the_whole_weight(make):
    layer, other = (HUTLinear.from_linear(make(), r=4) for _ in range(2))
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), other(x))
    state = layer.state_dict()
    other.load_state_dict(state)
    assert torch.equal(layer(x), other(x))
    name = next(key for key in state if key not in ("weight", "bias", "hut_A", "hut_B"))
    del state[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_a_checkpoint_of_the_base_fits():
    base = linear4bit()
    layer = HUTLinear.from_linear(linear4bit(), r=4)
    missing, unexpected = layer.load_state_dict(base.state_dict(), strict=False)
    assert (missing, unexpected) == (["hut_A", "hut_B"], [])
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), base.train()(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = linear4bit(), linear8bit(64, 96), nn.Linear(64, 7)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_inject_trains_over_quantized_layers():
    model = Model()
    assert inject(model, ["first", "second"], r=4, scale_shift=True) == ["first", "second"]
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_loss_falls(model, torch.randn(9, 64), 0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, first[name])}
    factors = ("hut_A", "hut_B", "gamma", "beta")
    assert moved == {f"{layer}.{f}" for layer in ("first", "second") for f in factors}


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_pickled_layer_keeps_its_weight(nested, storage):
    """Pickle makes a plain parameter of a Params4bit."""
    layer = trained(HUTLinear.from_linear(linear4bit(nested=nested, storage=storage), r=4))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        x = torch.randn(3, 64)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.merged_weight(), layer.merged_weight())
        assert other.state_dict().keys() == layer.state_dict().keys()
        layer.load_state_dict(other.state_dict())
        assert torch.equal(other(x), layer(x))


def test_a_pickled_int8_layer_is_refused():
    layer = pickle.loads(pickle.dumps(HUTLinear.from_linear(linear8bit(), r=4)))
    with pytest.raises(TypeError, match=r"int8; a quantized one loses its class, .* by pickle"):
        layer(torch.randn(3, 64))


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
def test_a_layer_over_a_repacked_base_in_every_state(nested):
    base = repacked(linear4bit(nested=nested))
    layer = trained(HUTLinear.from_linear(base, r=4))
    x = torch.randn(3, 64)
    y = layer(x)
    other = HUTLinear.from_linear(linear4bit(nested=False), r=4)
    other.load_state_dict(layer.state_dict())
    base.state_dict()  # which undoes the repacking, more or less
    states = copy.deepcopy(layer), layer.to("cpu"), pickle.loads(pickle.dumps(layer)), other
    for each in states:
        assert torch.equal(each(x), y)


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
@pytest.mark.parametrize("strict", [False, True])
def test_codes_without_what_belongs_to_them_are_refused(make, strict):
    """Nothing is read of them, also where keys may be absent."""
    layer, other = (HUTLinear.from_linear(make(), r=4) for _ in range(2))
    x = torch.randn(3, 64)
    y = layer(x)
    states = [{"weight": other.weight.data}, {"weight": torch.randn(96, 64)}]
    if make is linear4bit:
        states.append(HUTLinear.from_linear(linear4bit(nested=False), r=4).state_dict())
        states.append(HUTLinear.from_linear(linear4bit(quant_type="fp4"), r=4).state_dict())
    for state in states:
        with pytest.raises(RuntimeError, match="weight is quantized, and of what belongs"):
            layer.load_state_dict(state, strict=strict)
        assert torch.equal(layer(x), y)
    layer.load_state_dict({"hut_A": other.hut_A}, strict=False)
    assert torch.equal(layer.hut_A, other.hut_A)


def test_an_adapter_file_over_quantized_layers(tmp_path):
    model, other = Model(), Model()
    inject(model, ["first", "second"], r=4, scale_by_rms=True)
    for layer in (model.first, model.second):
        trained(layer)
    save_adapter(model, tmp_path / "adapter.safetensors")
    inject(other, ["first", "second"], **adapter_options(tmp_path / "adapter.safetensors"))
    load_adapter(other, tmp_path / "adapter.safetensors")
    for name in ("first", "second"):
        layer, loaded = getattr(model, name), getattr(other, name)
        assert all(
            torch.equal(v, dict(loaded.named_factors())[k]) for k, v in layer.named_factors()
        )
        assert loaded.scaling == layer.scaling


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_break():
    model = Model()
    inject(model, ["first", "second"], r=4)
    for layer in (model.first, model.second):
        nn.init.normal_(layer.hut_B, std=0.1)
    x = torch.randn(9, 64)
    assert_compiles_alike(model, x)


def test_explain_counts_the_bytes_of_the_format():
    dense, nf4_, int8 = (
        explain(4096, 4096, 4096, 16, dtype=torch.bfloat16, device_name="H200", weight_dtype=w)
        for w in (None, "nf4", "int8")
    )
    assert (nf4_.forward, nf4_.grad_input, nf4_.grad_factors) == ("staged", "staged", "chunked")
    size = 4096 * 4096
    assert dense.bytes["forward"] - nf4_.bytes["forward"] == round(size * (2 - 0.5625))
    assert dense.bytes["forward"] - int8.bytes["forward"] == size
    assert "bfloat16 over nf4" in str(nf4_)
    few = explain(1, 4096, 4096, 16, dtype=torch.bfloat16, device_name="H200", weight_dtype="nf4")
    assert few.forward == "fused"
    assert few.workspace["forward"] == 0
    assert "bound by instructions (estimate): beside 16 bits it saves memory only" in str(few)


# Merging


def trained(layer):
    with torch.no_grad():
        for _, factor in layer.named_factors():
            factor.add_(torch.randn_like(factor) / 8)
    return layer


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_to_linear_is_dense_in_the_compute_type(compute):
    layer = trained(HUTLinear.from_linear(linear4bit(compute_dtype=compute), r=4, scale_shift=True))
    x = torch.randn(5, 64, dtype=compute)
    with pytest.warns(UserWarning, match=r"1 quantized weights dense: 0\.0 MB become 0\.0 MB"):
        plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert plain.weight.dtype == plain.bias.dtype == compute
    assert error(plain(x), layer(x).detach().double()) < (
        1e-5 if compute == torch.float32 else 8e-3
    )


def test_merge_makes_a_model_that_runs_in_its_own_type():
    """An int8 layer keeps no type: the model's is taken."""
    model = nn.Sequential(linear8bit(64, 64, bias=False), nn.Linear(64, 7, dtype=torch.bfloat16))
    inject(model, ["0"], r=4)
    trained(model[0])
    x = torch.randn(5, 64).bfloat16()
    y = model(x)
    with pytest.warns(UserWarning, match="1 quantized weights dense"):
        merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert error(model(x), y.detach().double()) < 8e-3


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
@pytest.mark.parametrize("options", [{}, {"transform": "two_sided"}, {"scale_by_rms": True}])
def test_rates_and_scales_are_those_over_the_dequantized_weight(make, options):
    """W0 is what `parameter_groups` and `scale_by_rms` measure, not its codes."""
    few_bits, dense = nn.Sequential(make()), nn.Sequential(nn.Linear(64, 96))
    dense[0].weight.data = formats.dense(few_bits[0].weight, torch.float32)
    for model in (few_bits, dense):
        inject(model, ["0"], r=4, **options)
    assert few_bits[0].scaling == dense[0].scaling
    rates, expected = (
        [group["lr"] for group in parameter_groups(model, 1e-3)] for model in (few_bits, dense)
    )
    assert rates == expected


# Refusals


def test_the_extension_reads_dense_weights_only():
    weight, A, B = four_bit(torch.randn(8, 64)), torch.randn(2, 64), torch.randn(8, 2)
    with pytest.raises(HUTBackendError, match="cuda"):
        hut_linear(torch.randn(3, 64), weight, A, B, backend="cuda")


def test_shapes_are_the_weights_own():
    weight = four_bit(torch.randn(8, 64))
    with pytest.raises(ValueError, match=r"in_features = 64; got 63"):
        hut_linear(torch.randn(3, 63), weight, torch.randn(2, 64), torch.randn(8, 2))
    with pytest.raises(ValueError, match="out_features = 8; got 9"):
        hut_linear(torch.randn(3, 64), weight, torch.randn(2, 64), torch.randn(9, 2))


def test_a_weight_that_lost_its_class():
    weight = nn.Parameter(four_bit(torch.randn(8, 64)).data, requires_grad=False)
    with pytest.raises(TypeError, match=r"uint8.*loses its class"):
        hut_linear(torch.randn(3, 64), weight, torch.randn(2, 64), torch.randn(8, 2))


def test_a_layer_that_is_not_quantized_yet():
    with pytest.raises(HUTBackendError, match="not quantized yet"):
        HUTLinear.from_linear(bnb.nn.Linear4bit(64, 8))
    with pytest.raises(HUTBackendError, match="not quantized yet"):
        HUTLinear.from_linear(bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False))


def test_a_subclass_with_a_forward_of_its_own():
    class Scaled(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Scaled(64, 8)
    layer.weight = linear4bit(8).weight
    with pytest.raises(TypeError, match="forward of its own"):
        HUTLinear.from_linear(layer)


# torchao


TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")


@pytest.mark.parametrize("config", TORCHAO)
@pytest.mark.parametrize("how", ["inject", "peft"])
def test_torchao_layers_in_every_state(config, how):
    """Adapted, trained, copied, saved, loaded and merged; torchao's own layers do not pickle."""
    quantization = pytest.importorskip("torchao.quantization")

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 7))
        quantization.quantize_(
            model,
            getattr(quantization, config)(),
            lambda m, name: isinstance(m, nn.Linear) and name == "0",
        )
        return model

    def adapted():
        model = fresh()
        if how == "inject":
            inject(model, ["0"], r=4)
            return model
        peft = pytest.importorskip("peft")
        from hut_kernels.integrations.peft import HUTConfig

        return peft.get_peft_model(model, HUTConfig(r=4, target_modules=["0"]))

    model, x = adapted(), torch.randn(9, 64)
    assert error(model(x), fresh()(x).detach().double()) < 2e-6
    assert_loss_falls(model, x, 1.0)
    y = model(x)
    other = adapted()
    other.load_state_dict(model.state_dict())
    for each in (copy.deepcopy(model), other, model.eval()):
        assert torch.equal(each(x), y)
    with pytest.warns(UserWarning, match="1 quantized weights dense"):
        merged = merge(model) if how == "inject" else model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    assert type(merged[0].weight) is nn.Parameter
    assert error(merged(x), y.detach().double()) < 2e-6
