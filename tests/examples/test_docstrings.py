"""The task from documentation strings: nothing in a text tells its family by name."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import docstrings
from examples.docstrings import Documented, common, distinct, documented, masked


def text_of(text, family="files"):
    return Documented(family, "a.b", text, frozenset(docstrings.words_of(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the payload of this message.", "Return the _ of this _."),
        ("Two Messages\n    and a message_factory", "Two _ and a _"),
        ("See :class:`~email.policy.Policy` or `utf8=True`.", "See _ or _."),
        ("Use email, not numpy.ndarray or torch", "Use _, not _ or _"),
        ("Call set_payload(text, None) on HTTPServer", "Call _ on _"),
        ("Headers of http://a.b/c, RFC 2822", "Headers of _ RFC _"),
        ("A parser; the policies' parsers", "A parser; the policies' parsers"),
    ],
)
def test_code_and_names_are_masked(text, expected):
    assert masked(text, "email.message.Message.payload") == expected


def test_no_text_names_its_module_or_symbol():
    texts = list(documented("network", ["http", "smtplib"]))
    texts += itertools.islice(documented("arrays", ["numpy"]), 300)
    assert len(texts) > 350
    for one in texts:
        for name in {*one.place.lower().split("."), *docstrings.MODULES}:
            name = name.strip("_")
            if len(name) > 1:
                assert not re.search(rf"(?i)(?<![a-z]){name}s?(?![a-z])", one.text), one
        assert not re.search(r"\w_\w|[a-z][A-Z]|\w\.\w|`", one.text), one


def test_no_two_texts_are_nearly_the_same():
    texts = [one for name in ("socket", "ssl", "http", "ftplib") for one in documented("x", [name])]
    kept = distinct(texts)
    assert 0 < len(kept) < len(texts)
    assert all(common(a, b) < docstrings.NEAR for a, b in itertools.combinations(kept, 2))
    for one in set(texts) - set(kept):  # nothing goes that is like no other
        assert any(common(one, other) >= docstrings.NEAR for other in kept), one


def test_the_first_of_two_like_texts_is_kept():
    first = text_of("open the archive for reading or writing")
    second = text_of("Open the archive, for writing or for reading!", "text")
    assert distinct([first, second]) == [first]


SOME = {"files": "tarfile shutil os", "network": "ssl ftplib socket http"}
FEW = {"train": 40, "validation": 10, "test": 20}


def load_some():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "FAMILIES", SOME)
        patch.setattr(docstrings, "PARTS", FEW)
        return docstrings.load()


def test_no_text_is_nearly_one_of_another_part():
    rows, _ = load_some()
    for part, some in rows.items():
        labels = [row["label"] for row in some]
        assert labels.count("files") == labels.count("network") == FEW[part]
    texts = [text_of(row["text"]) for some in rows.values() for row in some]
    assert all(common(a, b) < docstrings.NEAR for a, b in itertools.combinations(texts, 2))


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_deals_the_same(seed):
    """Strings hash differently in each process: nothing may depend on the order of a set."""
    code = "from tests.examples.test_docstrings import load_some; print(load_some()[1]['digest'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == load_some()[1]["digest"]


def test_a_text_keeps_its_part_when_others_come_or_go():
    texts = list(documented("network", ["ssl", "socket"]))
    parts = [docstrings.deal(one) for one in texts]
    assert set(parts) == set(docstrings.PARTS)
    assert [docstrings.deal(one) for one in reversed(texts)] == parts[::-1]
