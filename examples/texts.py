"""Texts to learn from: any dataset of the hub or of a folder, and one that needs no download.

A dataset with labels is a classification, or a regression where the labels are fractions. One
without is a generation: its first column of text is the prompt, its second the answer.
"""

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import docstrings

Row = dict[str, Any]
# Rows by part, the columns of text in them, the kind of task, and the classes' names in "class".
Source = tuple[dict[str, list[Row]], list[str], str, list[str] | None]
PARTS = ("train", "validation", "test")  # to learn, to choose a learning rate, to report
STRINGS = ("string", "large_string")  # types of columns of text
IGNORED = -100  # the label of what is not predicted, in transformers
CUT = 10  # every tenth training row stands in for a part that a dataset lacks,
CUT_ROWS = 1000  # as long as there are not so many
POOL = 8  # batches that are cut from one shuffled heap, sorted by length


@dataclass(frozen=True)
class Task:
    """A dataset, tokenised.

    Attributes:
        parts: Rows of `PARTS`: what the tokenizer gives, and `labels`.
        kind: What a row asks for: `"class"`, `"number"` or `"text"`.
        tokenizer: The model's tokenizer.
        summary: What the record says of the data.
        classes: The labels' names, where those are classes.
        answers: By part, every prompt and the answers to it, where those are texts.
    """

    parts: dict[str, list[Row]]
    kind: str
    tokenizer: Any
    summary: Row
    classes: list[str] | None = None
    answers: dict[str, dict[str, list[str]]] | None = None

    def batches(self, size: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """So many training batches of rows of about one length, shuffled anew in each epoch."""
        shuffle, rows, made = random.Random(seed), self.parts["train"], 0
        while made < steps:
            order = shuffle.sample(rows, len(rows))
            heaps = (order[i : i + POOL * size] for i in range(0, len(order), POOL * size))
            batches = [batch for heap in heaps for batch in _by_length(heap, size)]
            for batch in shuffle.sample(batches, len(batches))[: steps - made]:
                yield self.collate(batch)
            made += len(batches)

    def every(self, part: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows of a part, in batches."""
        return map(self.collate, _by_length(self.parts[part], size))

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as one batch, padded to the longest of them."""
        inputs = [{key: row[key] for key in row if key != "labels"} for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        joined = pad_sequence(labels, True, IGNORED) if self.kind == "text" else torch.stack(labels)
        return {**self.tokenizer.pad(inputs, return_tensors="pt"), "labels": joined}

    def asked(self, part: str, size: int) -> Iterator[tuple[dict[str, Tensor], list[list[str]]]]:
        """Every prompt of a part once, in batches padded on the left, and the answers to each."""
        assert self.answers is not None
        answers = self.answers[part]
        prompts = sorted(answers, key=len)
        for some in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            batch = self.tokenizer(
                [_question(prompt) for prompt in some],
                add_special_tokens=False,
                return_token_type_ids=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            yield dict(batch), [answers[prompt] for prompt in some]


def load(
    dataset: str,
    subset: str | None,
    revision: str | None,
    tokenizer: Any,
    max_length: int,
    scored: int | None,
) -> Task:
    """Loads a dataset and tokenises it, once.

    Args:
        dataset: `"docstrings"`, or what `datasets.load_dataset` takes: a name on the hub, a folder.
        subset: The dataset's configuration, such as `"sst2"` of GLUE.
        revision: A branch or a commit on the hub.
        tokenizer: The model's. It is given a padding token where it has none.
        max_length: The most tokens of a row.
        scored: The most rows of the parts that are not trained on; None for all.

    Raises:
        ValueError: no training rows, or columns that do not fit.
    """
    if dataset == "docstrings":
        source, described = from_docstrings()
    else:
        source, described = from_hub(dataset, subset, revision), {}
    parts, columns, kind, classes = source
    parts, repeated = without_repeats(parts, _telling(columns, kind))
    parts = {part: rows if part == "train" else rows[:scored] for part, rows in parts.items()}
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    summary = {
        "dataset": dataset,
        "subset": subset,
        "columns": columns,
        "kind": kind,
        "classes": classes,
        "rows": {part: len(rows) for part, rows in parts.items()},
        "repeated": repeated,
        "balance": classes and {part: _balance(rows, classes) for part, rows in parts.items()},
        **described,
    }
    encode = _answered if kind == "text" else _labelled
    tokenised = {
        part: [encode(row, columns, tokenizer, max_length) for row in rows]
        for part, rows in parts.items()
    }
    answers = None
    if kind == "text":
        answers = {part: _answers(rows, columns) for part, rows in parts.items()}
    return Task(tokenised, kind, tokenizer, summary, classes, answers)


def from_docstrings() -> tuple[Source, Row]:
    """The texts of docstrings.py, and what it says about them."""
    parts, described = docstrings.load()
    classes = sorted(docstrings.FAMILIES)
    numbered = {part: _numbered(rows, classes) for part, rows in parts.items()}
    return (numbered, ["text"], "class", classes), described


def from_hub(dataset: str, subset: str | None, revision: str | None) -> Source:
    """A dataset of the hub or of a folder.

    A part that the dataset lacks, or has without labels, is cut from the training rows.
    """
    from datasets import load_dataset

    data = load_dataset(dataset, subset, revision=revision)
    if "train" not in data:
        raise ValueError(f"{dataset} has no split 'train', only {sorted(data)}")
    features = data["train"].features
    columns = [name for name, kind in features.items() if getattr(kind, "dtype", None) in STRINGS]
    label = next((name for name in ("label", "labels") if name in features), None)
    if label in columns:
        columns.remove(label)
    if len(columns) not in ((1, 2) if label else (2,)):
        wanted = "one or two columns of text" if label else "a column of prompts, one of answers"
        raise ValueError(f"expected {wanted}, and {dataset} has {columns}")

    splits = {name: list(split) for name, split in data.items()}
    kind, classes = "text", None
    if label is not None:
        kind = "number" if getattr(features[label], "dtype", "").startswith("float") else "class"
        splits = {name: _with_label(rows, label, kind) for name, rows in splits.items()}
        if kind == "class":
            names = getattr(features[label], "names", None)
            classes = names or sorted({row[label] for row in splits["train"]})
        splits = {name: _numbered(rows, classes or [], label) for name, rows in splits.items()}
    found = {part: _split(splits, part) for part in PARTS}
    if not found["test"]:  # as in GLUE, whose test labels are kept back
        found["test"], found["validation"] = found["validation"], []
    for place, part in enumerate(("test", "validation")):
        if not found[part]:
            found[part], found["train"] = _cut(found["train"], _telling(columns, kind), place)
    return found, columns, kind, classes


def without_repeats(
    parts: dict[str, list[Row]], columns: list[str]
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The parts without rows whose text stands in a later part too, and how many those were."""
    kept, repeated, later = {}, {}, set()
    for part in reversed(PARTS):
        rows = [row for row in parts[part] if _key(row, columns) not in later]
        repeated[part] = len(parts[part]) - len(rows)
        later |= {_key(row, columns) for row in rows}
        kept[part] = rows
    return {part: kept[part] for part in PARTS}, repeated


def _telling(columns: list[str], kind: str) -> list[str]:
    """The columns that tell a row: the prompt alone, so that one part has all answers to it."""
    return columns[:1] if kind == "text" else columns


def _labelled(row: Row, columns: list[str], tokenizer: Any, max_length: int) -> Row:
    texts = [row[column] for column in columns]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": row["label"]}


def _answered(row: Row, columns: list[str], tokenizer: Any, max_length: int) -> Row:
    """The prompt, a separator and the answer; only the answer is to be predicted."""
    prompt, answer = (row[column] for column in columns)
    asked = tokenizer(_question(prompt), add_special_tokens=False)["input_ids"]
    given = tokenizer(f" {answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    ids, labels = asked + given, [IGNORED] * len(asked) + given
    return {
        "input_ids": ids[:max_length],
        "attention_mask": [1] * len(ids[:max_length]),
        "labels": labels[:max_length],
    }


def _question(prompt: str) -> str:
    return f"{prompt} ||"


def _answers(rows: list[Row], columns: list[str]) -> dict[str, list[str]]:
    """Every prompt, and all the answers to it."""
    found = defaultdict(list)
    for row in rows:
        found[row[columns[0]]].append(row[columns[-1]])
    return found


def _with_label(rows: list[Row], label: str, kind: str) -> list[Row]:
    """Rows with a label: -1 stands for none, but a number may be -1 where not all of them are."""
    given = [row for row in rows if row[label] is not None]
    known = [row for row in given if row[label] != -1]
    return given if kind == "number" and known else known


def _numbered(rows: list[Row], classes: list[str], label: str = "label") -> list[Row]:
    """Rows whose `label` is the place of their class, or the number it was."""
    place = {name: number for number, name in enumerate(classes)}
    return [{**row, "label": place.get(row[label], row[label])} for row in rows]


def _balance(rows: list[Row], classes: list[str]) -> dict[str, int]:
    counts = Counter(row["label"] for row in rows)
    return {str(name): counts[number] for number, name in enumerate(classes)}


def _split(splits: dict[str, list[Row]], part: str) -> list[Row]:
    """A part's rows, also where it goes by a longer name, as `validation_matched` of MNLI does."""
    names = [name for name in splits if name.startswith(part) and splits[name]]
    return splits[min(names, key=len)] if names else []


def _cut(rows: list[Row], columns: list[str], place: int) -> tuple[list[Row], list[Row]]:
    """Some of the rows, told by their texts alone, and the others."""
    chosen = [zlib.crc32(repr(_key(row, columns)).encode()) // 7 % CUT == place for row in rows]
    cut = [row for row, yes in zip(rows, chosen, strict=True) if yes][:CUT_ROWS]
    left = {id(row) for row in cut}
    return cut, [row for row in rows if id(row) not in left]


def _key(row: Row, columns: list[str]) -> tuple[str, ...]:
    return tuple(row[column] for column in columns)


def _by_length(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Batches of rows in the order of their lengths."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
