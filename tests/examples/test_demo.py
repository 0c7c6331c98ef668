"""The demo at a tiny size: it runs, writes what it says, and says what its numbers say."""

import json
import math
import time

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples.demo import __main__ as demo
from examples.demo import adaptation, corpora, report
from examples.gpt import GPT, GPTConfig

ARGUMENTS = "--size tiny --width 32 --depth 1 --rank 4 --pretrain-steps 30 --steps 8 --seconds 0.1"


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for other threads
    try:
        assert demo.main([*ARGUMENTS.split(), "--device", "cpu", "--out", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder, json.loads((folder / "demo.json").read_text())


def test_it_writes_pictures_adapters_and_a_record(demonstrated):
    folder, record = demonstrated
    for name in ("losses.png", "layers.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "adapter_hut_low_rank.safetensors").exists()
    assert (folder / "adapter_hut_paper.safetensors").exists()
    assert record["schema_version"] == 1
    assert {"date", "platform", "cpu", "threads", "versions", "commit", "dirty"} <= set(
        record["environment"]
    )
    assert record["options"]["gpt"]["width"] == 32
    assert record["options"]["steps"] == record["adaptation"][0]["steps"] == 8


def test_every_provider_is_proven_and_measured(demonstrated):
    _, record = demonstrated
    rows = {row["provider"]: row for row in record["layer"]}
    assert set(rows) == set(record["proofs"]) == set(demo.COMPARED)
    for row in rows.values():
        for q in row["seconds"].values():
            assert 0 < q["p20"] <= q["median"] <= q["p80"]
        assert row["bytes"]["peak"] > 0
    assert rows["frozen"]["versus"]["frozen"]["step"]["median"] == 1
    assert rows["hut_low_rank"]["bytes"]["peak"] < rows["hut_low_rank_eager"]["bytes"]["peak"]


def test_methods_learn_with_as_many_parameters_and_merge_without_loss(demonstrated):
    _, record = demonstrated
    rows = {row["method"]: row for row in record["adaptation"]}
    assert {"hut_low_rank", "hut_paper", "lora"} == set(rows)
    assert len({row["trainable"] for row in rows.values()}) == 1
    assert rows["lora"]["r"] == rows["hut_low_rank"]["r"] == rows["hut_paper"]["r"] + 1 == 4
    for row in rows.values():
        assert row["held_out"] < record["frozen"]["held_out"]
        assert math.isclose(row["held_out"], row["merged_held_out"], rel_tol=1e-5)
        best = min(row["sweep"], key=lambda one: one["validation"])
        assert row["rate"] == best["rate"]
        assert len(row["sweep"]) == 3


def test_the_sentences_quote_the_numbers(demonstrated):
    _, record = demonstrated
    text = "\n".join(record["sentences"])
    for row in record["adaptation"]:
        assert f"{row['label']} at {row['held_out']:.4f}" in text
    for row in record["layer"]:
        if row["provider"] != "frozen":
            ratio = row["versus"]["frozen"]["step"]["median"]
            assert f"{row['label']} {ratio:.2f}x" in text


@pytest.mark.parametrize(
    "arguments", [["--rank", "0"], ["--steps", "-1"], ["--size", "tiny", "--width", "33"]]
)
def test_sizes_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.parse(arguments)
    assert arguments[-2] in capsys.readouterr().err


class TestTexts:
    def test_they_are_the_same_every_time_and_not_empty(self):
        assert corpora.english().digest == corpora.english().digest
        sources = corpora.python_sources(limit=500_000)
        assert sources.digest == corpora.python_sources(limit=500_000).digest
        assert min(sources.sizes.values()) > 4096
        assert min(corpora.english().sizes.values()) > 30_000

    def test_no_paragraph_of_the_held_out_english_is_in_the_rest(self):
        text = corpora.english()
        train, held_out = (
            {
                " ".join(p.split())
                for p in bytes(part.tolist()).decode(errors="replace").split("\n\n")
            }
            for part in (text.train, text.held_out)
        )
        # A paragraph cut in two where runs meet can leave a short end that stands elsewhere too.
        assert not {p for p in train & held_out if len(p) > 40}


class TestTraining:
    CONFIG = GPTConfig(width=16, depth=2, heads=2, context=8)

    def test_the_model_does_not_look_ahead(self):
        model, tokens = GPT(self.CONFIG), torch.randint(256, (1, 8))
        changed = tokens.clone()
        changed[0, -1] = (tokens[0, -1] + 1) % 256
        torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1])

    @pytest.mark.parametrize("r", [2, 4, 8])
    def test_all_methods_train_as_many_parameters(self, r):
        runs = adaptation.start_runs(GPT(self.CONFIG), r, rate_scale=1, seed=0)
        counts = {sum(p.numel() for p in some[0].parameters) for some in runs.values()}
        assert len(runs) == 3
        assert len(counts) == 1

    def test_an_adapted_model_begins_as_the_frozen_one(self):
        base, tokens = GPT(self.CONFIG), torch.randint(256, (2, 8))
        for some in adaptation.start_runs(base, 4, rate_scale=1, seed=0).values():
            torch.testing.assert_close(some[0].model(tokens), base(tokens))

    def test_a_course_goes_by_its_steps_where_there_is_time(self):
        course = adaptation.Course(steps=4, seconds=1000)
        shares = []
        while course.share() < 1:
            shares.append(course.share())
            course.done += 1
        assert shares == [0, 0.25, 0.5, 0.75]

    def test_a_course_ends_with_its_time(self):
        course = adaptation.Course(steps=10**9, seconds=0.02)
        time.sleep(0.03)
        assert course.share() == 1
        assert course.factor(1.0) <= 0.02


class TestReport:
    @pytest.mark.parametrize(
        ("p20", "median", "p80", "said"),
        [
            (1.2, 1.3, 1.4, "slower than LoRA (1.30x its time)"),
            (0.7, 0.8, 0.9, "faster than LoRA (0.80x its time)"),
            (0.9, 1.1, 1.2, "level with LoRA within the spread (0.90–1.20x its time)"),
        ],
    )
    def test_a_layer_wins_and_loses_by_its_numbers(self, p20, median, p80, said):
        row = {"versus": {"lora": {"step": {"p20": p20, "median": median, "p80": p80}}}}
        assert report._versus(row, {"provider": "lora", "label": "LoRA"}) == said

    @pytest.mark.parametrize(
        ("mean", "said"),
        [
            (-0.1, "is lower than LoRA's"),
            (0.1, "is higher than LoRA's"),
            (0.01, "is not told apart from LoRA's"),
        ],
    )
    def test_a_loss_wins_and_loses_by_its_numbers(self, mean, said):
        rows = [
            {
                "method": method,
                "label": method,
                "trainable": 10,
                "rate": 0.1,
                "on_edge": False,
                "held_out": 1.0,
                "held_out_minus_baseline": {"mean": mean, "standard_error": 0.01},
                "merged_difference": 1e-7,
                "step_ratio": {"p20": 1.0, "median": 1.1, "p80": 1.2, "samples": 9},
                "peak_bytes": 100,
            }
            for method in ("hut_low_rank", "lora")
        ]
        assert said in "\n".join(report.adaptation_sentences(rows, 2.0))

    def test_a_merged_model_that_differs_is_named(self):
        row = {"method": "lora", "label": "LoRA", "trainable": 1, "held_out": 1.0, "on_edge": True}
        row |= {"merged_difference": 0.5, "rate": 0.1}
        text = "\n".join(report.adaptation_sentences([row], 2.0))
        assert "DIFFERS" in text
        assert "edge of its sweep" in text
