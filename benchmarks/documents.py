"""The tables of README.md and docs/, generated from records between two marks.

    <!-- benchmark: KIND FILE -->
    ...
    <!-- end of benchmark -->

KIND is a suite, whose tables in full are wanted; `summary`, for a layer record in brief; or `cost`,
which needs no FILE. FILE lies in benchmarks/results/.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cost, records, tables
from .shapes import MODELS, parsed

RESULTS = records.ROOT / "benchmarks" / "results"
MARKED = re.compile(
    r"(<!-- benchmark: (?P<kind>\w+)(?: (?P<file>\S+))? -->\n).*?(<!-- end of benchmark -->)", re.S
)
Row = dict[str, Any]


def files() -> list[Path]:
    """The documents with marks."""
    documents = [records.ROOT / "README.md", *sorted((records.ROOT / "docs").glob("*.md"))]
    return [file for file in documents if MARKED.search(file.read_text())]


def renewed(text: str) -> str:
    """A document's text with every marked part generated anew.

    Raises:
        ValueError: An unknown kind, or a record that is not valid.
        FileNotFoundError: No such record.
    """
    return MARKED.sub(lambda found: f"{found[1]}\n{_generated(found)}\n\n{found[4]}", text)


def _generated(found: re.Match[str]) -> str:
    if found["kind"] == "cost":
        return "\n\n".join(table.markdown() for table in tables.of(_counted()))
    rows = records.read_lines(RESULTS / found["file"])
    if found["kind"] == "summary":
        return _summary(rows)
    own = [row for row in rows if row["suite"] == found["kind"]]
    if not own:
        raise ValueError(f"{found['file']} has no row of {found['kind']!r}")
    parts = [*(table.markdown() for table in tables.of(own)), *tables.left_out(own)]
    return "\n\n".join([*parts, tables.provenance(own)])


def _summary(rows: Sequence[Row]) -> str:
    """Ratios to PEFT's LoRA over the shapes, who wins how often, and on what it was measured."""
    sentences = [
        tables.who_wins(rows, "hut_low_rank", other)
        for other in ("peft_lora", "peft_hira", "hut_low_rank_eager")
    ]
    return "\n\n".join(
        [
            *(table.markdown() for table in tables.ratios_over_shapes(rows, ["peft_lora"])),
            " ".join(sentence for sentence in sentences if sentence),
            *tables.left_out(rows),
            tables.provenance(rows),
        ]
    )


def _counted() -> list[Row]:
    shapes = parsed(["4096x4096"], [4096])
    return [
        *cost.layer_rows(shapes, cost.RANKS),
        *cost.model_rows(list(MODELS), 4096, cost.RANKS[0]),
    ]
