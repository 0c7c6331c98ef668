"""Text tables, figures in words, and the sentences that every report ends with."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table, its first column flush left and the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()

    rule = "-" * len(line(["-" * width for width in widths]))
    return "\n".join([title, line(header), rule, *map(line, rows)])


def milliseconds(q: dict[str, float]) -> str:
    return f"{1e3 * q['median']:.2f} ({1e3 * q['p20']:.2f}–{1e3 * q['p80']:.2f})"


def ratio(q: dict[str, float]) -> str:
    return f"{q['median']:.2f} ({q['p20']:.2f}–{q['p80']:.2f})"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f}"


def load_sentences(load: float | None, cpus: int) -> list[str]:
    """A warning where other work was running at the start."""
    if load is None or load < 0.3 * cpus:
        return []
    return [
        f"The machine was busy (load average {load:.1f} on {cpus} CPUs): times count only on an "
        "idle machine."
    ]


def thread_sentences(before: int, now: int) -> list[str]:
    """A word where threads were given up."""
    if now == before:
        return []
    return [f"It ran with {now} thread: the {before} that there are were no faster together."]
