"""The snippets of docs/peft.md, run from top to bottom as they stand."""

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from .peft_models import MISMATCH

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


def test_every_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    assert text.count("```") == 2 * text.count("```python")
    names = {"__name__": "docs"}
    for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        line = text.count("\n", 0, match.start(1))
        if MISMATCH and ".add_adapter(HUTConfig" in match.group(1):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("\n" * line + match.group(1), str(PAGE), "exec"), names)
    assert "4 HiRA layers fused" in capsys.readouterr().out
    if MISMATCH:
        pytest.skip(f"all but the snippet of add_adapter ran: {MISMATCH}")
