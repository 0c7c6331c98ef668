"""A tiny model of each kind and datasets in folders: nothing here asks the hub for anything."""

import csv
import itertools
import os
import random

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported

NOUNS = ["cat", "dog", "bird", "fish", "horse", "cow", "sheep", "goat"]
TASTES = {
    "good": ["kind", "lovely", "fine", "splendid"],
    "bad": ["awful", "nasty", "grim", "dreadful"],
}
WORDS = [*NOUNS, *TASTES["good"], *TASTES["bad"], "the", "is", "eats", "||"]


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


@pytest.fixture(scope="session", name="tokenizer")
def _tokenizer():
    return tokenizer()


@pytest.fixture(scope="session")
def bert(tmp_path_factory, tokenizer):
    """The folder of a small BERT with random weights."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory, tokenizer):
    """The folder of a small GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=96,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(folder, name, header, rows):
    with open(folder / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="session")
def tastes(tmp_path_factory):
    """A folder with a dataset of labelled sentences, in a training and a test file."""
    folder, rows = tmp_path_factory.mktemp("tastes"), []
    for label, adjectives in TASTES.items():
        for adjective, *nouns in itertools.product(adjectives, NOUNS, NOUNS):
            rows.append([f"{adjective} {nouns[0]} {adjective} {nouns[1]}", label])
    random.Random(0).shuffle(rows)
    write(folder, "train", ["sentence", "label"], rows[60:])
    write(folder, "test", ["sentence", "label"], rows[:60])
    return str(folder)


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """A folder with a dataset of prompts and answers, in one file."""
    folder, draw = tmp_path_factory.mktemp("answers"), random.Random(0)
    rows = set()
    while len(rows) < 200:
        noun, adjective = draw.choice(NOUNS), draw.choice(TASTES["good"])
        rows.add((f"{noun} {draw.choice(NOUNS)} {adjective}", f"the {noun} is {adjective}"))
    write(folder, "train", ["asked", "answer"], sorted(rows))
    return str(folder)


@pytest.fixture(scope="session")
def grades(tmp_path_factory):
    """A folder with pairs of texts and how much they share, from 0 to 5, and hidden test labels."""
    folder, draw = tmp_path_factory.mktemp("grades"), random.Random(0)
    adjectives = [*TASTES["good"], *TASTES["bad"]]
    rows = set()
    while len(rows) < 400:
        pair = draw.choice(adjectives), draw.choice(adjectives)
        good = sum(word in TASTES["good"] for word in pair)
        rows.add((f"{draw.choice(NOUNS)} {pair[0]}", f"{draw.choice(NOUNS)} {pair[1]}", 2.5 * good))
    header = ["sentence1", "sentence2", "label"]
    write(folder, "train", header, sorted(rows)[::2])
    write(folder, "validation", header, sorted(rows)[1::2])
    write(folder, "test", header, [("cat", "dog", -1.0)] * 3)
    return str(folder)


@pytest.fixture(scope="session")
def restaurants(tmp_path_factory):
    """A folder with a dataset of prompts, each with two answers or, every fourth, with one."""
    folder = tmp_path_factory.mktemp("restaurants")
    rows = []
    for number, (noun, other) in enumerate(itertools.product(NOUNS, NOUNS)):
        rows.append((f"{noun} {other}", f"the {noun} eats the {other}"))
        if number % 4:
            rows.append((f"{noun} {other}", f"the {other} is fine the {noun} is kind"))
    random.Random(0).shuffle(rows)
    write(folder, "train", ["meaning_representation", "human_reference"], rows)
    return str(folder)
