"""Estimates: their memory is what the memory and model suites measure, their time a roofline."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import __main__ as cli
from benchmarks import data_sheets
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import Shape
from benchmarks.suites import estimate, memory, model

CPU, FP32 = torch.device("cpu"), torch.float32
METHODS = ("hut_low_rank", "hut_paper", "peft_lora", "peft_hira")


@pytest.fixture
def small(monkeypatch):
    """A Llama of three blocks."""
    big = model.RECIPES["llama-3.1-8b"]
    options = {
        **big.options, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 300,
    }  # fmt: skip
    monkeypatch.setitem(model.RECIPES, "small", replace(big, options=options))
    return model.RECIPES["small"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_model_equals_the_measurement(small, checkpointing):
    setting = model.Setting("small", "all", checkpointing, 3, 2, 256, 4)
    base = model.build(setting, FP32, CPU)
    rows = model.measure(setting, base, FP32, CPU, 0, METHODS, [])
    request = estimate.Request(small, "all", 4, "bf16", 2, 256, checkpointing, FP32)
    for row in rows:
        found = estimate._estimate(request, row["provider"], None)
        assert found.trained == row["counts"]["trainable"]
        peak = found.total - found.weights - found.adapters - found.optimizer
        assert peak == pytest.approx(row["bytes"]["peak"], rel=0.03), row["provider"]


@pytest.mark.parametrize("name", METHODS)
def test_memory_of_a_stack_equals_the_measurement(name):
    tokens, width, depth = 256, 1536, 3
    (row,) = memory.measure(Shape(tokens, width, width), [depth], 4, FP32, CPU, [name])
    with torch.device("meta"):
        base = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
    stack = PROVIDERS[name].adapt(base, r"\d+", 4)
    kept, peak = estimate.step_bytes(
        stack,
        lambda: {"input": torch.randn(tokens, width, requires_grad=True)},
        lambda: torch.randn(tokens, width),
        None,
    )
    assert kept == pytest.approx(row["bytes"]["saved"], rel=0.03)
    assert peak == pytest.approx(row["bytes"]["peak"], rel=0.03)


def request(recipe, **changes):
    given = {"targets": "all", "r": 16, "base": "bf16", "batch": 1, "sequence": 512}
    return estimate.Request(recipe, **{**given, "checkpointing": False, **changes})


def test_the_figures_of_a_large_model():
    """Llama 3.1 8B: 8.03 billion weights; HUT's step takes 1.5 times LoRA's products."""
    recipe, sheet = model.RECIPES["llama-3.1-8b"], data_sheets.find("A100")
    found = estimate.estimates(request(recipe), sheet, ("hut_low_rank", "peft_lora", "full"))
    hut, lora, full = found
    assert full.trained == pytest.approx(8.030e9, rel=1e-3)
    assert hut.weights == lora.weights == pytest.approx(16.06e9, rel=1e-3)
    assert hut.trained == lora.trained == 41_943_040
    assert hut.adapters == hut.gradients == hut.optimizer / 2 == 4 * hut.trained
    assert hut.kept < lora.kept
    assert 1.45 < hut.seconds / lora.seconds < 1.55
    assert lora.seconds > 4 * 512 * 6.98e9 / 312e12
    nf4 = estimate.estimates(request(recipe, base="nf4"), sheet, ("peft_lora",))[0]
    assert nf4.label == "QLoRA (nf4, PEFT)"
    assert nf4.weights == pytest.approx(2 * (8.030e9 - 6.979e9) + 0.5625 * 6.979e9, rel=1e-3)
    less = estimate.estimates(request(recipe, checkpointing=True), sheet, ("hut_low_rank",))[0]
    assert less.kept < hut.kept / 3
    assert less.seconds > hut.seconds


def test_blocks_are_extrapolated_right(small):
    two = request(replace(small, options={**small.options, "num_hidden_layers": 2}))
    for name in METHODS[::3]:
        three = estimate.figures(request(small), name, 3, None)
        one, more = (estimate.figures(two, name, blocks, None) for blocks in (1, 2))
        for field, value in vars(three).items():
            step = getattr(more, field) - getattr(one, field)
            assert getattr(more, field) + step == pytest.approx(value, rel=1e-6), (name, field)


class TestDevices:
    def test_a_name_is_found_as_people_write_it(self):
        for text in ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090"):
            assert data_sheets.find(text).name == "RTX 4090"
        assert data_sheets.find("H100 PCIe").bandwidth < data_sheets.find("H100").bandwidth

    def test_an_unknown_name_gets_the_list_and_how_to_describe_one(self):
        with pytest.raises(ValueError, match=r"one of V100, T4, .* --device memory=24"):
            data_sheets.find("RTX 9999")
        own = data_sheets.find("memory=8,bandwidth=200,tflops=20,arch=sm_75")
        assert (own.memory, own.has_kernels) == (8, False)
        for text in ("memory=8", "memory=8,bandwidth=x,tflops=1", "memory=0,bandwidth=1,tflops=1"):
            with pytest.raises(ValueError, match="a device is described as memory=24"):
                data_sheets.find(text)

    def test_the_pytorch_path_is_said(self, small, capsys):
        assert cli.main(["estimate", "--model", "small", "--device", "T4"]) == 0
        assert "runs none of HUT's kernels: PyTorch path" in capsys.readouterr().out
        assert not data_sheets.find("V100").has_kernels


def test_the_command_marks_estimates_and_says_what_fits(small, capsys):
    arguments = ["--device", "4090", "--base", "nf4", "--tokens", "64", "--checkpointing"]
    assert cli.main(["estimate", "--model", "small", *arguments]) == 0
    text = capsys.readouterr().out
    for words in ("step ms, ESTIMATE", "QLoRA (nf4, PEFT)", "yes", "bytes / GB/s", "1 x 64 tokens"):
        assert words in text
    assert cli.main(["estimate", "--model", "nobody"]) == 1
    assert cli.main(["estimate", "--device", "nothing"]) == 1
    assert "a device is one of V100" in capsys.readouterr().err
