"""The suites: what they count agrees with what is measured, and a row says what it was."""

from dataclasses import replace

import pytest
import torch

from benchmarks import shapes
from benchmarks.methods import LoRALinear
from benchmarks.providers import PROVIDERS, _own, prove
from benchmarks.shapes import MODELS, Shape
from benchmarks.suites import cost, experts, layer, memory, model, overhead
from hut_kernels import explain

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


class TestShapes:
    def test_numbers_and_models(self):
        found = shapes.parsed(["64x32", "7x8x9", "gpt2-medium"], [1, 2])
        assert found[:3] == [Shape(1, 64, 32), Shape(2, 64, 32), Shape(7, 8, 9)]
        assert Shape(2, 1024, 3072) in found
        assert len(found) == 3 + 2 * 4

    @pytest.mark.parametrize("text", ["64", "0x4", "axb", "1x2x3x4", "gpt5"])
    def test_invalid_shapes_are_refused(self, text):
        with pytest.raises(ValueError, match="no shape"):
            shapes.parsed([text], [1])

    @pytest.mark.parametrize(
        ("name", "millions"), [("roberta-base", 85), ("gpt2-medium", 302), ("llama-3.1-8b", 6979)]
    )
    def test_models_have_their_weights(self, name, millions):
        one = MODELS[name]
        count = one.blocks * sum(p.in_features * p.out_features for p in one.projections)
        assert round(count / 1e6) == millions


class TestCost:
    @pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
    def test_operations_are_the_planners_and_those_of_a_two_sided_T(self, transform):
        plan = explain(
            512, 1024, 4096, 16, dtype=BF16, device_name="A100", transform=transform
        ).operations
        counted = cost.METHODS[f"hut_{transform}"].operations(Shape(512, 1024, 4096), 16)
        T = 2 * 1024 * 4096 if transform == "two_sided" else 0  # elementwise: no product
        backward = plan["grad_input"] + plan["grad_factors"]
        assert counted == (plan["forward"] + T, backward + 3 * T)

    def test_the_papers_claim_adaptation_does_not_grow_with_the_rank(self):
        two_sided = [cost.adaptation_per_weight("hut_two_sided", r) for r in (4, 16, 128)]
        lora = [cost.adaptation_per_weight("lora", r) for r in (4, 16, 128)]
        assert two_sided == [2, 2, 2]
        assert lora == [9, 33, 257]

    @pytest.mark.parametrize(("f", "c", "ratio"), [(1, 0, 1.5), (1, 1, 4 / 3), (1 / 6, 0, 13 / 12)])
    def test_the_third_product_is_stated(self, f, c, ratio):
        assert cost.step_ratio(f, c) == pytest.approx(ratio)

    @pytest.mark.parametrize("c", [0, 1])
    @pytest.mark.parametrize("targets", ["few", "all"])
    def test_counts_of_models_come_to_that_ratio_where_thin_products_vanish(self, targets, c):
        one, tokens = MODELS["llama-3.1-8b"], 10**6
        ours, theirs = (
            cost.model_operations(one, method, targets, tokens, 1, c)
            for method in ("hut_two_sided", "lora")
        )
        expected = cost.step_ratio(cost.adapted_share(one, targets), c)
        assert ours / theirs == pytest.approx(expected, rel=2e-3)

    def test_roberta_query_and_value_are_a_sixth(self):
        assert cost.adapted_share(MODELS["roberta-large"], "few") == pytest.approx(1 / 6)


NAMES = ("frozen", "lora", "hira", "hut_low_rank", "hut_paper")


@pytest.fixture(scope="module")
def rows():
    found = layer.measure(Shape(32, 64, 48), 4, FP32, CPU, 0.05, NAMES, ["lora", "frozen"])
    return {row["provider"]: row for row in found}


class TestLayer:
    def test_every_pass_of_every_provider_is_measured(self, rows):
        assert tuple(rows) == NAMES
        for row in rows.values():
            for figures in (row["seconds"], row["floor_share"], row["versus"]["lora"]):
                assert set(figures) == {"forward", "backward", "step"}
            assert row["seconds"]["step"]["samples"] >= 5
            assert row["bytes"]["peak"] > 0
        assert rows["lora"]["versus"]["lora"]["step"]["median"] == 1
        assert rows["hut_low_rank"]["case"] == {
            "tokens": 32, "in_features": 64, "out_features": 48, "r": 4,
        }  # fmt: skip

    def test_the_floor_is_of_the_products_that_the_formula_needs(self):
        times = {
            ("product", "y"): [1.0, 2.0],
            ("product", "dx"): [10.0, 20.0],
            ("product", "G"): [100.0, 200.0],
        }
        assert layer._floor("forward", "hira", times) == [1, 2]
        assert layer._floor("backward", "lora", times) == [10, 20]
        assert layer._floor("step", "peft_hira", times) == [111, 222]
        assert layer._floor("step", "hut_two_sided", times) == [111, 222]

    def test_a_failure_on_a_shape_is_left_out_with_its_reason(self):
        found = layer.measure(Shape(8, 4, 4), 8, FP32, CPU, 0, ["hut_paper", "lora"], ["lora"])
        assert "two_sided needs r <= min" in found[0]["left_out"]
        assert found[1]["seconds"]["step"]["median"] > 0

    def test_a_provider_wrong_only_at_the_timed_size_is_not_timed(self, monkeypatch):
        class WrongWhereLarge(LoRALinear):
            def forward(self, x):
                return super().forward(x) * (2 if len(x) > 30 else 1)

        wrong = replace(PROVIDERS["lora"], adapt=_own(WrongWhereLarge))
        monkeypatch.setitem(PROVIDERS, "lora", wrong)
        prove(wrong, FP32, CPU)
        row, other = layer.measure(
            Shape(32, 64, 48), 4, FP32, CPU, 0, ["lora", "hut_low_rank"], ["lora"]
        )
        assert row["wrong"] is True
        assert "off its formula" in row["left_out"]
        assert "wrong" not in other
        assert other["versus"] == {}

    def test_a_failure_while_timing_is_left_out(self, monkeypatch):
        class FailsLater(LoRALinear):
            calls = 0

            def forward(self, x):
                FailsLater.calls += 1
                if FailsLater.calls > 8:
                    raise MemoryError("out of memory")
                return super().forward(x)

        late = replace(PROVIDERS["lora"], adapt=_own(FailsLater))
        monkeypatch.setitem(PROVIDERS, "lora", late)
        row, other = layer.measure(
            Shape(8, 6, 4), 2, FP32, CPU, 0, ["lora", "hut_low_rank"], ["lora", "hut_low_rank"]
        )
        assert row["left_out"] == "MemoryError: out of memory"
        assert set(other["versus"]) == {"hut_low_rank"}

    def test_a_replay_is_compared_with_replays(self):
        shape, names = Shape(8, 6, 4), ("lora", "lora_graph", "hut_low_rank_graph")
        times = {(name, "step"): [1.0, 2.0] for name in names}
        times |= {(layer.PRODUCT, one): [1.0, 1.0] for one in ("y", "dx", "G")}
        figures = layer._figures(names[2], {"step": None}, times, shape, 2, names[:2])
        assert set(figures["versus"]) == {"lora_graph"}

    def test_types_are_stated(self):
        assert layer.labels("peft_lora", BF16)["types"] == {
            "compute": "bfloat16",
            "weight": "bfloat16",
            "adapter": "float32",
            "autocast": None,
        }
        assert layer.labels("peft_lora_cast", BF16)["types"]["adapter"] == "bfloat16"


class TestMemory:
    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_saved_bytes_equal_theory(self, dtype):
        pytest.importorskip("peft")
        names = [
            name
            for name, provider in PROVIDERS.items()
            if provider.for_models and not provider.missing(CPU, dtype)
        ]
        rows = memory.measure(Shape(64, 256, 256), [1, 3], 4, dtype, CPU, names)
        assert len(rows) == 2 * len(names)
        for row in rows:
            theory = row["bytes"]["saved_by_theory"]
            if theory is None:
                assert PROVIDERS[row["provider"]].method in (None, "hut_two_sided_eager")
            else:  # LoRA's scaling is a tensor of some bytes in places
                assert 0 <= row["bytes"]["saved"] - theory <= 32 * row["case"]["depth"], row

    def test_hut_keeps_no_more_than_its_inputs_and_one_workspace(self):
        width, depth = 512, 4
        (row,) = memory.measure(Shape(16, width, width), [depth], 4, FP32, CPU, ["hut_low_rank"])
        weight = 4 * width**2
        assert row["bytes"]["saved"] == depth * 16 * width * 4
        assert weight < row["bytes"]["peak"] < 1.5 * weight

    def test_a_stack_must_be_square(self):
        with pytest.raises(ValueError, match="square"):
            memory.measure(Shape(1, 2, 3), [1], 1, FP32, CPU, ["lora"])


class TestOverhead:
    def test_it_is_host_time_and_nothing_else(self):
        rows = overhead.measure(4, FP32, CPU, 0.02, ["lora", "hut_low_rank"], ["lora"])
        assert [row["suite"] for row in rows] == ["overhead"] * 2
        assert "operations" not in rows[0]
        assert rows[1]["versus"]["lora"]["backward"]["median"] > 0


SMALL = {
    "roberta-large": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64},
    "gpt2-medium": {"n_embd": 16, "n_head": 2},
    "qwen2.5-7b": {
        "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 32, "vocab_size": 99,
    },
}  # fmt: skip


class TestModel:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        pytest.importorskip("peft")
        for name, options in SMALL.items():
            recipe = model.RECIPES[name]
            small = replace(recipe, options={**recipe.options, **options})
            monkeypatch.setitem(model.RECIPES, name, small)

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize(
        ("name", "targets", "layers"),
        [
            ("roberta-large", "few", 2),
            ("roberta-large", "all", 6),
            ("gpt2-medium", "few", 1),
            ("gpt2-medium", "all", 4),
            ("qwen2.5-7b", "all", 7),
            ("qwen2.5-7b", "o_proj+up_proj", 2),
        ],
    )
    def test_a_step_is_measured_with_the_baselines(self, name, targets, layers, checkpointing):
        setting = model.Setting(name, targets, checkpointing, 1, 2, 8, 2)
        base = model.build(setting, FP32, CPU)
        names = ["lora", "peft_lora", "peft_hira", "hut_low_rank", "hut_paper"]
        rows = model.measure(setting, base, FP32, CPU, 0.05, names, ["peft_lora"])
        by = {row["provider"]: row for row in rows}
        assert not [row for row in rows if "left_out" in row]
        assert by["lora"]["counts"]["trainable"] == by["hut_low_rank"]["counts"]["trainable"]
        assert by["hut_low_rank"]["versus"]["peft_lora"]["step"]["median"] > 0
        assert by["lora"]["case"]["blocks_of"] == (28 if "qwen" in name else 24)
        assert by["lora"]["case"]["checkpointing"] is checkpointing
        pattern = model.RECIPES[name].pattern(targets, base)
        hut = PROVIDERS["hut_low_rank"].adapt(base, pattern, 2)
        assert sum("hut_A" in key for key, _ in hut.named_parameters()) == layers

    def test_a_model_may_be_a_configuration_file(self, tmp_path):
        recipe = model.RECIPES["qwen2.5-7b"]
        recipe.config(1).save_pretrained(tmp_path)
        for place in (tmp_path, tmp_path / "config.json"):
            read = model.recipe_of(str(place))
            assert read.blocks == 1
            assert len(read.names("few", read.build())) == 7
        with pytest.raises(ValueError, match=r"a model is one of roberta-base, .*; got 'gpt5'"):
            model.recipe_of("gpt5")

    def test_methods_impossible_for_a_model_are_left_out(self):
        setting = model.Setting("gpt2-medium", "few", False, 1, 1, 4, 2)
        base = model.build(setting, FP32, CPU)
        rows = model.measure(setting, base, FP32, CPU, 0, ["lora", "peft_loha"], ["lora"])
        assert "Conv1D" in rows[1]["left_out"]

    def test_steps_train_the_adapters_and_nothing_else(self):
        setting = model.Setting("roberta-large", "few", False, 1, 1, 4, 2)
        base = model.build(setting, FP32, CPU)
        before = {name: p.clone() for name, p in base.named_parameters()}
        adapted = PROVIDERS["hut_low_rank"].adapt(
            base, model.RECIPES[setting.model].pattern("few", base), 2
        )
        tokens = torch.randint(5, 100, (1, 4))
        step = model.training_step(adapted, {"input_ids": tokens, "labels": tokens[:, 0] % 2})
        step()
        after = dict(adapted.named_parameters())
        assert all(torch.equal(p, after[name]) for name, p in before.items())
        assert any("hut_B" in name and p.abs().sum() > 0 for name, p in after.items())


class TestExperts:
    def test_shapes(self):
        found = experts.parsed(["8x2x64x48"], [1, 2])
        assert found == [experts.Shape(1, 8, 2, 64, 48), experts.Shape(2, 8, 2, 64, 48)]
        with pytest.raises(ValueError, match="8x2x64 is no shape of experts"):
            experts.parsed(["8x2x64"], [1])

    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_rows(self, dtype):
        """Each method has proved its formula, or there would be no rows."""
        shape = experts.Shape(24, 4, 2, 32, 24)
        rows = experts.measure(shape, 2, dtype, CPU, 0)
        assert [row["provider"] for row in rows] == list(experts.LABELS)
        by = {row["provider"]: row["bytes"] for row in rows}
        stack = 4 * 3 * 24 * 32 * dtype.itemsize
        assert by["frozen"]["peak_above"] == 0
        assert by["peft_lora"]["saved_above"] > stack  # the sum of stack and factors is kept
        assert by["hut_low_rank"]["saved_above"] < stack

    def test_a_method_that_is_wrong_is_not_timed(self, monkeypatch):
        monkeypatch.setattr(
            "hut_kernels.integrations.experts._project",
            lambda self, name, x, offsets, found: torch.zeros(
                len(x), getattr(self, name).shape[1], dtype=x.dtype
            ),
        )
        with pytest.raises(ArithmeticError, match="hut_low_rank does not compute its formula"):
            experts.measure(experts.Shape(8, 4, 2, 16, 8), 2, FP32, CPU, 0)
