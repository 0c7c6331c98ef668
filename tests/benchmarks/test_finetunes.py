"""Fine-tunes' records: what is said of learning rates, and PEFT's form of them."""

import json

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import records
from benchmarks.report import exchange, finetunes
from benchmarks.report.finetunes import interval

RATES = (1e-3, 3e-3, 1e-2)


def method(name, losses, **changes):
    """A method whose validation losses at the rates are these, each seed 0.01 above the last."""
    rate = RATES[losses.index(min(losses))]
    sweep = [
        {
            "rate": at,
            "validation": {
                "loss": interval([loss, loss + 0.01, loss + 0.02]),
                "accuracy": interval([0.5, 0.5, 0.5]),
            },
        }
        for at, loss in zip(RATES, losses, strict=True)
    ]
    runs = [
        {"rate": rate, "seed": seed, "losses": [2.0, 1.0], "test": {"accuracy": 0.6, "loss": 1.2}}
        for seed in range(3)
    ]
    return {
        "method": name,
        "label": name.upper(),
        "r": 8,
        "rate": rate,
        "accuracy": interval([0.6, 0.6, 0.6]),
        "loss": interval([1.2, 1.2, 1.2]),
        "peak_bytes": 1 << 20,
        "adapter_bytes": 1000,
        "trainable": 100,
        "head": 10,
        "step": {"p20": 0.1, "median": 0.1, "p80": 0.1, "samples": 5},
        "sweep": sweep,
        "runs": runs,
    } | changes


def record(**losses):
    losses = {
        "lora": (1.5, 1.4, 1.6),
        "hut_low_rank_scaled": (1.5, 1.41, 1.3),
        "hut_low_rank": (1.7, 1.6, 1.5),
        "hut_paper_grouped": (1.4, 1.5, 1.6),
        "hut_paper": (1.6, 1.5, 1.4),
    } | losses
    recipe = {
        "model": "m", "dataset": "d", "target": ["query"], "r": 8, "batch": 4, "max_length": 32,
        "weight_decay": 0.0, "rates": list(RATES),
    }  # fmt: skip
    return {
        "suite": "finetune",
        "complete": True,
        "metric": "accuracy",
        "recipe": recipe,
        "data": {"rows": {"train": 8}},
        "steps": 2,
        "seconds": 9.0,
        "methods": [method(name, some) for name, some in losses.items()],
        "environment": records.environment(torch.device("cpu")),
        "schema_version": records.SCHEMA_VERSION,
    }


class TestRates:
    def test_differences_are_paired_by_seed(self):
        """All seeds differ by as much: their spread is not in the difference's interval."""
        one, other = method("a", (1.5, 1.4, 1.6)), method("b", (1.5, 1.3, 1.6))
        q = finetunes.difference(one, 3e-3, other, 3e-3)
        assert q["mean"] == pytest.approx(0.1)
        assert q["margin"] == pytest.approx(0, abs=1e-12)

    def test_each_method_made_for_loras_rate_is_judged_there_and_at_its_own(self):
        lines = finetunes.sentences(record())
        assert len(lines) == 4
        assert lines[0].startswith("HUT_LOW_RANK_SCALED at LoRA's best rate, 0.003")
        assert "less LoRA's there +0.010 ± 0.000 (HIGHER)." in lines[0]
        assert (
            "its own best rate, 0.01, 3.33 times LoRA's: loss less LoRA's best -0.100" in lines[1]
        )
        assert "the best of HUT_LOW_RANK, at 0.01, 3.33 times LoRA's rate, -0.200 ± 0.0" in lines[1]
        assert lines[1].count("(lower)") == 2

    def test_a_best_rate_far_from_loras_is_said_to_be(self):
        line = finetunes.sentences(record(lora=(1.3, 1.4, 1.6)))[1]
        assert "10 times LoRA's, MORE than a factor of 3" in line

    def test_what_the_seeds_cannot_tell_apart_is_within_the_interval(self):
        some = record()
        scaled = some["methods"][1]["sweep"][1]["validation"]
        scaled["loss"] = interval([1.39, 1.44, 1.42])
        assert finetunes.sentences(some)[0].endswith("(not told apart).")

    def test_a_search_is_not_a_sweep(self):
        some = record()
        some["recipe"]["rates"] = None
        assert finetunes.sentences(some) == []

    def test_tables_star_the_best_loss_of_a_line(self):
        best, sweep = finetunes.tables(record())
        assert best.rows[0][:4] == ["LORA", "8", "0.003", "1"]
        assert best.rows[0][4] == "60.0 ± 0.0"
        lora = next(row for row in sweep.rows if row[0] == "LORA")
        assert [cell.endswith("*") for cell in lora[1:]] == [False, True, False]


class TestExchange:
    # What huggingface/peft's method_comparison/processing.py takes out of a file.
    TRAIN_INFO = (
        "accelerator_memory_reserved_avg", "accelerator_memory_max",
        "accelerator_memory_reserved_99th", "train_time", "file_size",
    )  # fmt: skip

    def test_a_seeds_file_holds_what_pefts_tables_read(self, tmp_path):
        files = exchange.write([record()], tmp_path)
        assert len(files) == 5 * 3
        one = json.loads((tmp_path / "lora--rank8-lr0.003-seed1.json").read_text())
        run, train, meta = one["run_info"], one["train_info"], one["meta_info"]
        assert run["peft_config"] == {"peft_type": "LORA", "r": 8, "target_modules": ["query"]}
        assert run["train_config"]["model_id"] == "m"
        assert run["train_config"]["optimizer_kwargs"]["lr"] == 3e-3
        assert {"created_at", "total_time", "experiment_name", "peft_branch"} <= set(run)
        assert train["status"] == "success"
        assert all(
            train[name] == int(train[name]) or name == "train_time" for name in self.TRAIN_INFO
        )
        assert train["train_time"] == pytest.approx(0.2)
        last = train["metrics"][-1]
        assert (last["test accuracy"], last["train samples"]) == (0.6, 8)
        assert last["train loss"] == 1.5
        assert last["train total tokens"] == 8 * 32
        assert {"peft-version", "transformers-version", "torch-version"} <= set(
            meta["package_info"]
        )
        assert "system_info" in meta
        hut = json.loads((tmp_path / "hut_low_rank--rank8-lr0.01-seed0.json").read_text())
        assert hut["run_info"]["peft_config"]["peft_type"] == "HUT"

    @pytest.mark.parametrize(
        "changes", [{"suite": "layer"}, {"complete": False}, {"metric": "bleu"}]
    )
    def test_what_is_no_fine_tune_by_accuracy_is_refused(self, changes, tmp_path):
        with pytest.raises(ValueError, match="complete fine-tunes scored by accuracy"):
            exchange.write([record() | changes], tmp_path)

    def test_the_command_writes_them(self, tmp_path, capsys):
        some = record()
        records.write(tmp_path / "finetune.json", [some], some["environment"], None)
        out = tmp_path / "results"
        assert cli.main(["export", str(tmp_path / "finetune.json"), "--out", str(out)]) == 0
        assert len(list(out.glob("*.json"))) == len(capsys.readouterr().out.splitlines()) == 15
