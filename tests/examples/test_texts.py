"""Any dataset becomes the same kind of task: parts, batches, labels, and no row in two parts."""

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")

from examples import texts

from .conftest import write

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets"
)


def load(folder, tokenizer, scored=None, max_length=16):
    return texts.load(str(folder), None, None, tokenizer, max_length, scored)


@needs_datasets
def test_a_folder_with_labels(tastes, tokenizer):
    task = load(tastes, tokenizer)
    assert task.classes == ["bad", "good"]
    assert task.summary["columns"] == ["sentence"]
    rows = task.summary["rows"]
    assert rows["test"] == 60
    assert 0.05 < rows["validation"] / (rows["train"] + rows["validation"]) < 0.15
    assert sum(task.summary["balance"]["test"].values()) == 60
    batch = task.collate(task.parts["train"][:5])
    assert batch["labels"].shape == (5,)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 6)
    assert {part: len(some) for part, some in load(tastes, tokenizer, scored=7).parts.items()} == {
        **rows,
        "validation": 7,
        "test": 7,
    }


@needs_datasets
def test_pairs_of_texts_and_test_labels_that_are_kept_back(tmp_path, tokenizer):
    rows = [[f"{n} cat", f"dog {n}", n % 3] for n in range(90)]
    write(tmp_path, "train", ["premise", "hypothesis", "label"], rows)
    held_out = [[f"{n} cow", "dog", n % 3] for n in range(30)]
    write(tmp_path, "validation", ["premise", "hypothesis", "label"], held_out)
    write(tmp_path, "test", ["premise", "hypothesis", "label"], [["cow", "cat", -1]] * 5)
    task = load(tmp_path, tokenizer)
    assert task.classes == [0, 1, 2]
    assert task.summary["rows"]["test"] == 30  # the labelled ones
    row = task.parts["test"][0]
    assert row["input_ids"].count(tokenizer.sep_token_id) == 2


@needs_datasets
def test_a_row_stands_in_one_part_only(tmp_path, tokenizer):
    write(tmp_path, "train", ["text", "label"], [["cat dog", 0], ["cow", 1], ["bird", 0]])
    write(tmp_path, "validation", ["text", "label"], [["cow", 1], ["fish", 0]])
    write(tmp_path, "test", ["text", "label"], [["cat dog", 0], ["fish", 1]])
    task = load(tmp_path, tokenizer)
    assert task.summary["rows"] == {"train": 1, "validation": 1, "test": 2}
    assert task.summary["repeated"] == {"train": 2, "validation": 1, "test": 0}


@needs_datasets
def test_prompts_and_answers(answers, tokenizer):
    task = load(answers, tokenizer)
    assert task.classes is None
    assert all(task.parts.values())
    batch = task.collate(task.parts["train"][:3])
    given = tokenizer.convert_tokens_to_ids(["the"])[0]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        asked = ids.tolist().index(tokenizer.convert_tokens_to_ids("||")) + 1
        assert (labels[:asked] == texts.IGNORED).all()
        assert labels[asked] == ids[asked] == given
        assert tokenizer.eos_token_id in labels


@needs_datasets
def test_labels_that_are_fractions_are_numbers_to_predict(tmp_path, grades, tokenizer):
    task = load(grades, tokenizer)
    assert (task.kind, task.classes, task.summary["balance"]) == ("number", None, None)
    assert task.summary["rows"]["test"] == 200  # the test file's labels are kept back
    assert {row["labels"] for row in task.parts["train"]} == {0.0, 2.5, 5.0}
    assert task.collate(task.parts["train"][:3])["labels"].dtype == torch.float32
    # Where only some labels are -1, it is a number as any other.
    for part in texts.PARTS:
        rows = [[f"{part} cat", -1.0], [f"{part} dog", 0.5]]
        write(tmp_path, part, ["text", "label"], rows)
    assert [row["labels"] for row in load(tmp_path, tokenizer).parts["test"]] == [-1.0, 0.5]


@needs_datasets
def test_all_answers_to_a_prompt_stand_in_one_part(restaurants, tokenizer):
    task = load(restaurants, tokenizer)
    seen = [prompt for part in texts.PARTS for prompt in task.answers[part]]
    assert len(seen) == len(set(seen)) == 64
    assert sum(len(row) for row in task.parts.values()) == 64 + 48
    for prompt, given in task.answers["train"].items():
        noun, other = prompt.split()
        both = [f"the {noun} eats the {other}", f"the {other} is fine the {noun} is kind"]
        assert given == both[: len(given)] or given == both[::-1]


@needs_datasets
def test_prompts_are_asked_once_and_padded_on_the_left(tmp_path, tokenizer):
    rows = [["cat dog cow", "fine"], ["cat", "kind"], ["cat dog cow", "grim"], ["goat", "fine"]]
    write(tmp_path, "train", ["a", "b"], [["bird", "fine"]])
    write(tmp_path, "validation", ["a", "b"], [["fish", "fine"]])
    write(tmp_path, "test", ["a", "b"], rows)
    batches = list(load(tmp_path, tokenizer).asked("test", 2))
    assert [given for _, given in batches] == [[["kind"], ["fine"]], [["fine", "grim"]]]
    (batch, _) = next(load(tmp_path, tokenizer).asked("test", 3))
    assert set(batch) == {"input_ids", "attention_mask"}
    said = tokenizer.batch_decode(batch["input_ids"])
    assert said == ["[PAD] [PAD] cat ||", "[PAD] [PAD] goat ||", "cat dog cow ||"]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


@needs_datasets
def test_datasets_that_do_not_fit_are_refused(tmp_path, tokenizer):
    for header, row, word in (
        (["a", "b", "c", "label"], ["cat", "dog", "cow", 1], "a', 'b', 'c"),
        (["a"], ["cat"], "prompts"),
    ):
        folder = tmp_path / word[0] / str(len(header))
        folder.mkdir(parents=True)
        write(folder, "train", header, [row] * 3)
        with pytest.raises(ValueError, match=word):
            load(folder, tokenizer)


def task_of(lengths, tokenizer):
    rows = [
        {"input_ids": [n + 4] * length, "attention_mask": [1] * length, "labels": n % 2}
        for n, length in enumerate(lengths)
    ]
    return texts.Task({"train": rows, "test": rows}, "class", tokenizer, {}, ["a", "b"])


def padding(batches):
    return sum((b["attention_mask"] == 0).float().mean().item() for b in batches) / len(batches)


def test_an_epoch_has_every_row_once_in_batches_of_about_one_length(tokenizer):
    task = task_of([1 + 7 * n % 29 for n in range(290)], tokenizer)
    batches = list(task.batches(10, 29, seed=0))
    assert sorted(i for b in batches for i in b["input_ids"][:, 0].tolist()) == list(range(4, 294))
    rows = task.parts["train"]
    shuffled = [task.collate([rows[7 * i % 290] for i in range(n, n + 10)]) for n in range(29)]
    assert padding(batches) < padding(shuffled) / 2
    first, second = (list(task.batches(10, 60, seed=s)) for s in (0, 0))
    assert len(first) == 60
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
    other = next(task.batches(10, 1, seed=1))
    assert not torch.equal(other["input_ids"][:, 0], first[0]["input_ids"][:, 0])


def test_scoring_reads_every_row_once(tokenizer):
    task = task_of([3, 1, 2, 5, 4, 1, 1], tokenizer)
    seen = [i for b in task.every("test", 3) for i in b["input_ids"][:, 0].tolist()]
    assert sorted(seen) == list(range(4, 11))
