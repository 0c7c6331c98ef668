"""Text tables, figures in words, and the sentences that every report ends with."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..records import busy

Row = dict[str, Any]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table, its first column flush left and the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()

    rule = "-" * len(line(["-" * width for width in widths]))
    return "\n".join([title, line(header), rule, *map(line, rows)])


def milliseconds(q: Mapping[str, float]) -> str:
    return ratio({key: 1e3 * q[key] for key in ("p20", "median", "p80")})


def ratio(q: Mapping[str, float]) -> str:
    """A median, and p20 to p80 where they are apart."""
    spread = f" ({q['p20']:.2f}–{q['p80']:.2f})" if q["p20"] < q["p80"] else ""
    return f"{q['median']:.2f}{spread}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f}"


def load_sentences(environment: Mapping[str, Any]) -> list[str]:
    """A warning where other programs were running."""
    if not busy(environment):
        return []
    return ["Other programs were running meanwhile: times count only on an idle machine."]


def thread_sentences(before: int, now: int) -> list[str]:
    """A word where threads were given up."""
    if now == before:
        return []
    return [f"It ran with {now} thread: the {before} that there are were no faster together."]
