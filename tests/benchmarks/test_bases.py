"""Bases in few bits: providers prove their formulas over them, and rows say how they are stored."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import bases
from benchmarks.providers import PROVIDERS, admit, prove
from benchmarks.report import tables, targets
from benchmarks.shapes import Shape
from benchmarks.suites import layer, memory, model
from hut_kernels import formats
from hut_kernels.nn import HUTLinear

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
FEW_BITS = bases.BASES[1:]
every_base = pytest.mark.parametrize("base", FEW_BITS)
NAMES = ("peft_lora", "peft_hira", "hut_low_rank", "hut_paper")


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "hut_low_rank_eager"])
def test_each_computes_its_formula(name, dtype, base):
    prove(PROVIDERS[name], dtype, CPU, base=base)


def test_a_layer_that_dequantizes_otherwise_is_found(monkeypatch):
    def rolled(weight, dtype):
        return formats.dense(weight, dtype).roll(1)

    own = SimpleNamespace(dense=rolled, base_weight=formats.base_weight)
    monkeypatch.setattr(bases, "formats", own)
    with pytest.raises(ArithmeticError, match="HUT low_rank: y"):
        prove(PROVIDERS["hut_low_rank"], torch.float32, CPU, base="nf4")


def test_what_takes_dense_weights_only_is_left_out():
    found = admit(["frozen", "lora", "hira", "peft_loha"], torch.float32, CPU, base="nf4")
    assert not found.errors
    assert not found.wrong
    assert {found.left_out[name] for name in ("frozen", "lora", "hira")} == {
        "it takes dense weights only"
    }
    assert "peft_loha" in found.left_out


def test_without_bitsandbytes_each_says_so(monkeypatch):
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: None)
    assert "bitsandbytes is not installed" in PROVIDERS["hut_low_rank"].missing(
        CPU, torch.float32, "nf4"
    )
    assert PROVIDERS["hut_low_rank"].missing(CPU, torch.float32) is None


@every_base
def test_a_conv1d_is_stored_the_right_way_round(base):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(64, 128)
    layer = bases.stored(conv, base)
    W0 = formats.dense(formats.base_weight(layer), torch.float32)
    assert W0.shape == (64, 128)
    assert (W0 - conv.weight.t()).norm() < 0.1 * conv.weight.norm()


@every_base
def test_rows_of_a_layer(base):
    given = Shape(32, 64, 48), 4, torch.float32, CPU, 0.05, NAMES, ["peft_hira"]
    rows = layer.measure(*given, base=base)
    assert [row["label"] for row in rows] == [
        "QLoRA (PEFT)", "HiRA (PEFT)", "HUT low_rank", "HUT paper's form",
    ]  # fmt: skip
    for row in rows:
        assert row["types"]["weight"] == base
        assert row["versus"]["peft_hira"]["step"]["median"] > 0
        assert ("dequantize" in row) == row["provider"].startswith("hut")
    (table,) = tables.of(rows)
    assert f"float32 over {base}" in table.title


@every_base
def test_rows_of_a_stack_keep_x_only(base):
    rows = memory.measure(Shape(32, 64, 64), [3], 4, torch.float32, CPU, NAMES, base=base)
    kept = {row["provider"]: row["bytes"] for row in rows}
    assert kept["hut_low_rank"]["saved"] == kept["hut_low_rank"]["saved_by_theory"]
    assert kept["peft_hira"]["saved"] > kept["hut_low_rank"]["saved"] + 3 * 64 * 64 * 4
    assert kept["peft_lora"]["saved_by_theory"] is None


@every_base
def test_rows_of_a_model(base):
    setting = model.Setting("roberta-large", "few", False, 1, 1, 8, 4)
    base_model = model.build(setting, torch.float32, CPU, base)
    kinds = {type(module).__name__ for module in base_model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[base] in kinds
    assert type(base_model.classifier.dense) is nn.Linear
    rows = model.measure(
        setting, base_model, torch.float32, CPU, 0, NAMES, ["peft_lora"], storage=base
    )
    assert not [row for row in rows if "left_out" in row]
    assert rows[0]["counts"]["adapted_share"] == pytest.approx(2 / 13, rel=1e-2)  # a head of 1


def test_layers_over_one_weight_hold_no_copy_of_it():
    stack = bases.with_stored(nn.Sequential(nn.Linear(64, 64)), "int8")
    one, two = (PROVIDERS["peft_lora"].adapt(memory.sharing_copy(stack), "0", 2) for _ in range(2))
    codes = {
        module.state.CB.data_ptr()
        for adapted in (stack, one, two)
        for module in adapted.modules()
        if hasattr(module, "state") and module.state.CB is not None
    }
    assert len(codes) == 1
    inner = PROVIDERS["hut_low_rank"].make(stack[0], 2)
    assert isinstance(inner, HUTLinear)
    assert inner.weight.data_ptr() in codes


def test_targets_are_for_the_storage_that_they_name():
    environment = {"device": "cpu", "device_name": "this", "date": "today", "cpu_count": 2}
    q = {"p20": 0.5, "median": 0.6, "p80": 0.7, "samples": 99}
    common = {
        "suite": "layer", "provider": "hut_low_rank", "label": "HUT", "environment": environment,
        "case": {"tokens": 512, "in_features": 1024, "out_features": 4096, "r": 16},
        "versus": {"peft_hira": {"step": q}}, "dequantize": {"over_library": q},
    }  # fmt: skip
    for storage, found in (("nf4", 2), ("bfloat16", 0), ("int8", 0)):
        row = {**common, "types": {"compute": "bfloat16", "weight": storage}}
        over_nf4 = [one for one in targets.ON_CPU if one.base == "nf4"]
        lines = [line for one in over_nf4 for line in targets.lines(one, [row])]
        assert len(lines) == found, storage
        assert all(line[-1] == targets.MET for line in lines)
