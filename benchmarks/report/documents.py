"""The tables, sentences and pictures of docs/ and of benchmarks/results, made from records.

    <!-- benchmark: KIND FILE ... -->
    ...
    <!-- end of benchmark -->

KIND is a suite, whose tables in full are wanted; `brief`, for a layer record and a memory record in
one small table; `targets`, for the project's targets as a record meets or misses them; `finetune`,
for a record of `make finetune`; or `cost`, which needs no FILE. Files lie in benchmarks/results/. A
picture is an SVG that holds its record's checksum.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from .. import records
from ..shapes import MODELS, parsed
from ..suites import cost
from . import finetunes, tables, targets

RESULTS = records.ROOT / "benchmarks" / "results"
FOLDER = records.ROOT / "docs" / "pictures"
PICTURES = {  # by what `plots` calls them
    "layer-time": "layer-cpu-intel-xeon.jsonl",
    "memory": "memory-cpu-intel-xeon.jsonl",
}
MARKED = re.compile(
    r"(<!-- benchmark: (?P<kind>\w+)(?P<files>(?: [^\s>]+)*) -->\n).*?(<!-- end of benchmark -->)",
    re.S,
)
Row = dict[str, Any]


def files() -> list[Path]:
    """The documents with marks."""
    folders = records.ROOT / "docs", RESULTS
    documents = [file for folder in folders for file in sorted(folder.glob("*.md"))]
    return [file for file in documents if MARKED.search(file.read_text())]


def renewed(text: str) -> str:
    """A document's text with every marked part generated anew.

    Raises:
        ValueError: An unknown kind, or a record that is not valid.
        FileNotFoundError: No such record.
    """
    return MARKED.sub(lambda found: f"{found[1]}\n{_generated(found)}\n\n{found[4]}", text)


def _generated(found: re.Match[str]) -> str:
    kind, names = found["kind"], found["files"].split()
    if kind == "cost":
        return "\n\n".join(table.markdown() for table in tables.of(_counted()))
    if kind == "finetune":
        record = records.read(RESULTS / names[0])[0]
        shown = (table.markdown() for table in finetunes.tables(record))
        said = "\n".join(f"- {line}" for line in finetunes.sentences(record))
        return "\n\n".join([*shown, said, tables.provenance([record])])
    if kind == "targets":
        runs = tables.grouped(records.read(RESULTS / names[0]), "environment.date")
        return "\n\n".join(_judged(rows) for _, rows in runs)
    some = [records.read(RESULTS / name) for name in names]
    if kind == "brief":
        layers, memory = some
        about = dict.fromkeys(map(tables.provenance, some))
        return "\n\n".join(
            [tables.brief(layers, memory).markdown(), tables.all_wins(layers), *about]
        )
    own = [row for row in some[0] if row["suite"] == kind]
    if not own:
        raise ValueError(f"{names[0]} has no row of {kind!r}")
    return "\n\n".join(
        [
            *(table.markdown() for table in tables.of(own)),
            *([tables.all_wins(own)] if kind in ("layer", "overhead") else []),
            *tables.left_out(own),
            tables.provenance(own),
        ]
    )


def _judged(rows: list[Row]) -> str:
    """The targets that a run's rows judge, and where they were measured."""
    measured = [target for target in targets.TARGETS if any(targets.lines(target, rows))]
    return f"{targets.table(rows, measured).markdown()}\n\n{tables.provenance(rows)}"


def _counted() -> list[Row]:
    shapes = parsed(["4096x4096"], [4096])
    return [
        *cost.layer_rows(shapes, cost.RANKS),
        *cost.model_rows(list(MODELS), 4096, cost.RANKS[0]),
    ]


def stale_pictures() -> list[Path]:
    """The pictures that are not there, or not of their record as it is now."""
    pictures = [FOLDER / f"{name}.svg" for name in PICTURES]
    return [
        file for file in pictures if not file.exists() or _checksum(file) not in file.read_text()
    ]


def draw(picture: Path) -> None:
    """Draws one of the pictures from its record."""
    from . import plots

    rows = records.read(RESULTS / PICTURES[picture.stem])
    picture.parent.mkdir(parents=True, exist_ok=True)
    plots.save(picture.stem, rows, [picture], _checksum(picture))


def _checksum(picture: Path) -> str:
    record = RESULTS / PICTURES[picture.stem]
    return f"{record.name}, sha256 {hashlib.sha256(record.read_bytes()).hexdigest()}"
