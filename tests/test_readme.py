"""README.md: its lines run as they stand, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hut_kernels import hut_linear

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_two_lines_at_the_top_are_equal():
    before, after = (line.partition("#")[0] for line in SNIPPETS[0].splitlines())
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(5, 6),
        "weight": torch.randn(4, 6),
        "hut_A": torch.randn(2, 6),
        "hut_B": torch.randn(4, 2),
        "bias": torch.randn(4),
    }
    outputs = []
    for line in (before, after):
        names = {"F": F, "hut_linear": hut_linear, "scaling": 0.5, **tensors}
        exec(line, names)
        outputs.append(names["y"])
    torch.testing.assert_close(*outputs)


def test_the_first_lines_run_as_pasted():
    names = {"__name__": "readme"}
    exec(SNIPPETS[1], names)
    assert type(names["model"][0]) is torch.nn.Linear


def test_the_lines_with_peft_run_after_them():
    pytest.importorskip("peft")
    names = {"__name__": "readme"}
    exec(SNIPPETS[1] + SNIPPETS[2], names)
    trained = [name for name, p in names["model"].named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all("hut_" in name for name in trained)


def test_every_link_leads_to_a_file():
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
