"""NF4 and FP4: bit for bit what bitsandbytes dequantizes to, in every state of its weights."""

import copy

import pytest
import torch

from hut_kernels import formats
from hut_kernels.errors import HUTBackendError

from ..references import error
from .weights import bnb, dequantized, four_bit, linear4bit, repacked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_nesting = pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
every_table = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def same(a, b):
    """To the bit, NaN for NaN and the sign of zero included."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    bits = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    number = ~(a.isnan() & b.isnan())
    return torch.equal(a.view(bits)[number], b.view(bits)[number])


@every_table
def test_the_tables_are_bitsandbytes_own(quant_type):
    table = torch.tensor(formats.four_bit.TABLES[quant_type])
    assert same(table, bnb.functional.get_4bit_type(quant_type, device="cpu"))


@every_table
@every_dtype
@every_nesting
@pytest.mark.parametrize("block", BLOCKS)
def test_equal_to_the_library_where_it_is_right(quant_type, dtype, nested, block):
    weight = four_bit((torch.randn(6, 4096) / 8).to(dtype), quant_type, block, nested)
    with torch.compiler.set_stance("force_eager"):  # what it compiles for blocks of 2048 and more
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert same(formats.stored(weight).dense(dtype), expected)


@every_dtype
@every_nesting
@pytest.mark.parametrize("block", BLOCKS)
def test_equal_at_any_width(dtype, nested, block):
    """To the definition; and to the library, where it has no rows that begin within a block."""
    for in_features in (*range(2, 400, 1 + block // 512), 4304):  # rows for two blocks are many
        quant_type = ("nf4", "fp4")[in_features // 2 % 2]
        rows = 2 * block // in_features + 1 + in_features % 3
        weight = (torch.randn(rows, in_features) / 8).to(dtype)
        weight *= torch.logspace(-1, 1, rows)[:, None]
        weight = four_bit(weight, quant_type, block, nested)
        found = formats.stored(weight).dense(dtype)
        assert same(found, dequantized(weight)), (in_features, quant_type)
        if in_features % 16 or in_features % block == 0:
            with torch.compiler.set_stance("force_eager"):
                theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            # FP4's second zero has a sign in some of its kernels.
            assert torch.equal(found, theirs), (in_features, quant_type)


def test_the_library_is_wrong_where_the_block_divides_no_row():
    """The reason why `dequantize_4bit` is never called: it is off wherever rows differ."""
    weight = four_bit(torch.randn(16, 80) * torch.logspace(-2, 2, 16)[:, None], nested=False)
    state = weight.quant_state
    theirs = bnb.functional.dequantize_4bit(weight.data, state)
    ours = formats.stored(weight).dense(torch.float32)
    assert same(ours, dequantized(weight))
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert not torch.allclose(theirs, ours)


@every_table
@every_dtype
def test_absmax_of_zero_subnormal_infinite_and_nan(quant_type, dtype):
    weight = four_bit(torch.randn(9, 64).to(dtype), quant_type, nested=False)
    special = [0.0, 1e-40, 3e-8, 6e-5, 6e4, 3e38, float("inf"), float("nan"), 1.0]
    weight.quant_state.absmax = torch.tensor(special)
    found = formats.stored(weight).dense(dtype)
    assert same(found, dequantized(weight))
    # Where a CPU rounds to bfloat16 by one instruction, it takes float32's subnormals for zero.
    normal = [0, *range(2, 9)] if dtype == torch.bfloat16 else slice(None)
    theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert same(found[normal], theirs[normal])


@every_table
@every_dtype
def test_nested_absmax_of_zero_subnormal_infinite_and_nan(quant_type, dtype):
    """So do the absmax of absmax and its offset; the block of codes is 256."""
    special = [0.0, 1e-40, 3e-8, 6e-5, 6e4, 3e38, float("inf"), float("nan"), 1.0]
    weight = four_bit(torch.randn(9 * 256, 64).to(dtype), quant_type, nested=True)
    state = weight.quant_state
    assert len(state.state2.absmax) == 9
    state.state2.absmax = torch.tensor(special)
    for offset in (0.0, 1e-40, 1.0, float("inf")):
        state.offset = torch.tensor(offset)
        found = formats.stored(weight).dense(dtype)
        assert same(found, dequantized(weight)), offset
        tiny = dtype == torch.bfloat16 and offset < 1  # see above: subnormals, by one instruction
        normal = slice(256 * 2, None) if tiny else slice(None)
        theirs = bnb.functional.dequantize_4bit(weight.data, state)
        assert same(found[normal], theirs[normal]), offset


@every_table
@every_dtype
@every_nesting
@pytest.mark.parametrize("value", [0.0, 1e-42, float("inf")])
def test_weights_that_are_all_zero_subnormal_or_infinite(quant_type, dtype, nested, value):
    weight = torch.zeros(8, 128, dtype=dtype)
    weight[::2] = value
    weight[1, 3] = -value
    weight = four_bit(weight, quant_type, nested=nested)
    assert same(formats.stored(weight).dense(dtype), dequantized(weight))


@every_nesting
@pytest.mark.parametrize("in_features", [64, 48, 7])
def test_any_rows_are_those_of_the_whole(in_features, nested, monkeypatch):
    stored = formats.stored(four_bit(torch.randn(301, in_features), nested=nested))
    whole = stored.dense(torch.float32)
    monkeypatch.setattr("hut_kernels.formats.base._TILE", 5 * in_features)
    assert same(stored.dense(torch.float32), whole)
    for rows in (slice(0, 1), slice(300, 301), slice(3, 200), slice(17, 17)):
        out = torch.empty(rows.stop - rows.start, in_features)
        assert same(stored.read(rows, out), whole[rows])


def test_another_compute_type_rounds_once():
    """As a forward of Linear4bit does; its backward rounds to the type of quant_state first."""
    weight = four_bit(torch.randn(64, 64).half())
    weight.quant_state.dtype = torch.float32
    exact = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    weight.quant_state.dtype = torch.float16
    stored = formats.stored(weight)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(stored.dense(dtype), exact.to(dtype))


@every_nesting
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_storage_type_holds_the_same_bytes(storage, nested):
    weight = torch.randn(24, 64)
    stored = formats.stored(four_bit(weight, nested=nested, storage=storage))
    plain = formats.stored(four_bit(weight, nested=nested))
    assert same(stored.dense(torch.float32), plain.dense(torch.float32))


@every_nesting
def test_restored_from_an_operators_arguments(nested):
    stored = formats.stored(four_bit(torch.randn(24, 80), nested=nested))
    again = formats.restore(stored.data, stored.scales, stored.form.text)
    assert same(again.dense(torch.float32), stored.dense(torch.float32))
    assert again.shape == (len(again), 80) == (24, 80)
    assert again.numel() == 24 * 80
    blocks = 24 * 80 // 64
    absmax = blocks + 4 * (256 + 1 + 1) if nested else 4 * blocks
    assert stored.nbytes == 24 * 80 // 2 + absmax


def test_states_in_which_users_have_them():
    layer = linear4bit(dtype=torch.bfloat16)
    expected = dequantized(layer.weight)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    statistics = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    loaded = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    moved = layer.weight.to("cpu")
    for weight in (
        layer.weight,
        copy.deepcopy(layer).weight,
        copy.copy(layer.weight),
        loaded,
        moved,
    ):
        assert same(formats.stored(weight).dense(torch.bfloat16), expected)


# Repacked for inference on a CPU


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only"
)
def test_an_evaluation_repacks_as_these_tests_do():
    layer = linear4bit(dtype=torch.bfloat16)
    other = repacked(copy.deepcopy(layer))
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 64, dtype=torch.bfloat16))
    assert torch.equal(layer.weight.data, other.weight.data)
    assert torch.equal(layer.weight.quant_state.absmax, other.weight.quant_state.absmax)
    assert layer.weight.quant_state.packing_format_for_cpu


@every_nesting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_repacked_weight_is_read_right(dtype, nested):
    """Its codes are the same, and its absmax is rounded to bfloat16."""
    layer = linear4bit(dtype=dtype, nested=nested, in_features=192)
    before = formats.stored(layer.weight)
    absmax = before.absmax(0, before.numel() // 64).bfloat16().float()
    rounded = formats.restore(
        before.data, (absmax,), before.form._replace(sizes=(*before.shape, 64, 0)).text
    )
    stored = formats.stored(repacked(layer).weight)
    whole = stored.dense(dtype)
    assert same(whole, rounded.dense(dtype))
    for rows in (slice(0, 1), slice(31, 33), slice(5, 90)):
        out = torch.empty(rows.stop - rows.start, 192, dtype=dtype)
        assert same(stored.read(rows, out), whole[rows])


def test_a_repacked_weight_of_another_storage_type_is_read_right():
    layer = linear4bit(nested=False, storage=torch.bfloat16, dtype=torch.bfloat16)
    expected = dequantized(layer.weight)
    assert same(formats.stored(repacked(layer).weight).dense(torch.bfloat16), expected)


@every_nesting
def test_saving_a_repacked_layer(nested):
    """Doubly quantized, it is quantized again; otherwise its absmax stays transposed, unnoticed.

    We read it right then, too, from the layer and from its checkpoint.
    """
    layer = repacked(linear4bit(nested=nested, in_features=192))
    before = formats.stored(layer.weight).dense(torch.float32)
    state = layer.state_dict()
    found = formats.stored(layer.weight).dense(torch.float32)
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if nested:
        assert same(found, theirs)
        assert 0 < error(found, before.double()) < 1e-2
    else:
        assert same(found, before)
        assert error(theirs.view(before.shape), before.double()) > 0.1
    statistics = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    loaded = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    assert same(formats.stored(loaded).dense(torch.float32), found)


@every_nesting
@pytest.mark.parametrize("undone", [False, True])
def test_a_quant_state_that_a_repacked_weight_shares(nested, undone):
    """`Params4bit.to()` shares it: it says of the one weight what is true of the other."""
    layer = linear4bit(nested=nested, in_features=192, dtype=torch.bfloat16)
    other = layer.weight.to("cpu")
    assert other.quant_state is layer.weight.quant_state
    evaluated = formats.stored(repacked(layer).weight).dense(torch.bfloat16)
    assert same(formats.stored(other).dense(torch.bfloat16), evaluated)
    if undone:
        kept = copy.copy(layer.weight)
        layer.state_dict()
        expected = formats.stored(layer.weight).dense(torch.bfloat16)
        for weight in (kept, other):
            assert same(formats.stored(weight).dense(torch.bfloat16), expected)


def test_a_repacked_weight_under_a_quant_state_of_before():
    layer = linear4bit(nested=False)
    state = copy.copy(layer.weight.quant_state)
    repacked(layer)
    layer.weight.quant_state = state
    with pytest.raises(HUTBackendError, match=r"\(96, 32\) bytes.*quant_state is one of before"):
        formats.stored(layer.weight)


@every_nesting
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_shared_weight_is_put_in_order_again(nested, storage):
    """And is one for bitsandbytes too: what it dequantizes to is what the repacked one did."""
    layer = repacked(linear4bit(nested=nested, in_features=192, storage=storage))
    expected = formats.stored(layer.weight).dense(torch.float32)
    before = layer.weight.data.clone()
    weight = formats.shared(layer.weight)
    assert weight.dtype == storage
    assert type(formats.stored(weight)) is formats.FourBit
    assert same(formats.stored(weight).dense(torch.float32), expected)
    assert same(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), expected)
    assert torch.equal(layer.weight.data, before)
    assert layer.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("sizes", [(48, 64), (64, 80), (64, 96), (32, 7), (64, 2)], ids=str)
@every_nesting
def test_a_weight_that_an_evaluation_could_not_repack(sizes, nested):
    """It raises, halfway: quant_state may be another by then, the weight is not."""
    layer = linear4bit(*sizes, nested=nested)
    expected = dequantized(layer.weight)
    for _ in range(2):
        with pytest.raises((AssertionError, RuntimeError)):
            repacked(layer)
        assert same(formats.stored(layer.weight).dense(torch.float32), expected)
        assert same(formats.stored(formats.shared(layer.weight)).dense(torch.float32), expected)


# What is refused


def test_a_weight_that_is_not_quantized_yet():
    weight = bnb.nn.Params4bit(torch.randn(8, 64), requires_grad=False)
    with pytest.raises(HUTBackendError, match=r"Params4bit that is not quantized yet.*\.to\("):
        formats.stored(weight)


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.float, torch.Tensor.double])
def test_packed_bytes_that_were_converted_as_numbers(convert):
    weight = four_bit(torch.randn(8, 64), storage=torch.bfloat16)
    weight.data = convert(weight.data)
    with pytest.raises(HUTBackendError, match=r"stored as torch\.bfloat16.*quant_storage"):
        formats.stored(weight)


def test_a_part_of_a_weight():
    weight = four_bit(torch.randn(8, 64))
    weight.data = weight.data[:64]
    with pytest.raises(HUTBackendError, match="take 256 bytes; got 64"):
        formats.stored(weight)


def test_a_weight_on_the_meta_device():
    state = four_bit(torch.randn(8, 64)).quant_state
    weight = bnb.nn.Params4bit(
        torch.empty(256, 1, dtype=torch.uint8, device="meta"), quant_state=state
    )
    with pytest.raises(HUTBackendError, match="meta"):
        formats.stored(weight)
