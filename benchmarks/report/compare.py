"""Two records compared: row by row a verdict that respects the spread, machines told apart.

Each row's ratio to a baseline is compared, and on one machine its times too: where these differ and
the ratio does not, the machine has drifted. Between machines a time says how fast the machine is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..measure import FEWEST
from ..records import busy, differences, machine
from .tables import NONE, Table, at, measured, types_of, where_of

Row = dict[str, Any]
FASTER, SLOWER, LEVEL = "faster", "slower", "no difference beyond the spread"
FEW = f"fewer than {FEWEST} samples"
BUSY = "no verdict: busy machine"
LESS, MORE, SAME = "less memory", "more memory", "same memory"
TOLERANCE = 0.01  # of a byte count: allocators round


@dataclass(frozen=True)
class Finding:
    """One figure of one row in both records.

    Attributes:
        what: Suite, provider, case and figure, in words.
        first, second: The figures; seconds, a ratio, or bytes.
        ratio: The second's median over the first's.
        verdict: One of this module's words.
    """

    what: str
    first: str
    second: str
    ratio: float
    verdict: str


def findings(first: Sequence[Row], second: Sequence[Row]) -> Iterator[Finding]:
    """A verdict for each figure that both records have.

    Raises:
        ValueError: A record that has a row twice.
    """
    for row, other in pairs(first, second):
        if same_machine(row, other):
            yield from _judged(_times(row, other), row, other)
        yield from _judged(_ratios(row, other), row, other)
        if other["environment"]["device"] == row["environment"]["device"]:
            yield from _bytes(row, other)


def pairs(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows of both records that are of the same thing.

    Raises:
        ValueError: A record that has a row twice.
    """
    ours, theirs = by_identity(first), by_identity(second)
    return [(row, theirs[key]) for key, row in ours.items() if key in theirs]


def by_identity(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """The rows with figures by what they are of: suite, provider, case, types.

    Raises:
        ValueError: Two rows of the same thing: which one counts?
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in measured(rows):
        if _identity(row) in found:
            raise ValueError(f"two rows of {_words(row)}: which of them counts?")
        found[_identity(row)] = row
    return found


def same_machine(row: Row, other: Row) -> bool:
    return machine(row["environment"]) == machine(other["environment"])


def report(first: Sequence[Row], second: Sequence[Row], names: tuple[str, str]) -> Table:
    """All findings, under words on the machines and the versions.

    Raises:
        ValueError: The records have no figure in common.
    """
    found = list(findings(first, second))
    if not found:
        raise ValueError(f"{names[0]} and {names[1]} have no figure in common")
    return Table(
        f"{names[1]} against {names[0]}: medians",
        ["", names[0], names[1], "second / first", "verdict"],
        [[one.what, one.first, one.second, f"{one.ratio:.2f}", one.verdict] for one in found],
        ["", *notes(pairs(first, second)), *_only_in(first, second, names)],
    )


def notes(both: Sequence[tuple[Row, Row]]) -> list[str]:
    """Sentences on the machines of both records, their load, and differing versions."""
    lines = (
        line for row, other in both for line in _notes(row["environment"], other["environment"])
    )
    return list(dict.fromkeys(lines))


def _notes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    unlike = differences(machine(one), machine(other))
    lines = ["Both were measured on the same machine."]
    if unlike:
        lines = [
            f"Measured on DIFFERENT machines ({'; '.join(unlike)}): times are not comparable, so "
            "ratios to a common baseline are compared."
        ]
    busy = [e["other_programs_share"] for e in (one, other)]
    told = ("unknown" if share is None else f"{100 * share:.0f} %" for share in busy)
    lines.append(f"Other programs took, of the CPUs: {', '.join(told)}.")
    versions = differences(one["versions"], other["versions"])
    if versions:
        lines.append(f"Versions differ: {'; '.join(versions)}.")
    commits = [
        f"{e['commit'] or 'unknown'}{' (dirty)' if e['dirty'] else ''}" for e in (one, other)
    ]
    if commits[0] != commits[1]:
        lines.append(f"Commits: {commits[0]}, {commits[1]}.")
    return lines


def verdict(first: Mapping[str, float], second: Mapping[str, float]) -> str:
    """A verdict: samples differ if their middles, p20 to p80, lie apart."""
    if min(first["samples"], second["samples"]) < FEWEST:
        return FEW
    if first["p80"] < second["p20"]:
        return SLOWER
    if second["p80"] < first["p20"]:
        return FASTER
    return LEVEL


def _judged(found: Iterator[Finding], row: Row, other: Row) -> Iterator[Finding]:
    """The findings on times, without a verdict where either machine was busy."""
    idle = not any(busy(one["environment"]) for one in (row, other))
    return found if idle else (replace(one, verdict=BUSY) for one in found)


def _times(row: Row, other: Row) -> Iterator[Finding]:
    for one, q in row.get("seconds", {}).items():
        p = at(other, f"seconds.{one}")
        if p is not None:
            yield _finding(f"{_words(row)}: {one}", q, p, "{:.3g} ms", 1e3)


def _ratios(row: Row, other: Row) -> Iterator[Finding]:
    """Those to the first baseline that both rows have, other than itself."""
    common = [
        name
        for name in row.get("versus", {})
        if name in other.get("versus", {}) and name != row["provider"]
    ]
    for baseline in common[:1]:
        for one, q in row["versus"][baseline].items():
            p = at(other, f"versus.{baseline}.{one}")
            if p is not None:
                yield _finding(f"{_words(row)}: {one} / {baseline}", q, p, "{:.2f}x", 1)


def _finding(
    what: str, q: Mapping[str, float], p: Mapping[str, float], form: str, scale: float
) -> Finding:
    first, second = (form.format(scale * figure["median"]) for figure in (q, p))
    return Finding(what, first, second, p["median"] / q["median"], verdict(q, p))


def _bytes(row: Row, other: Row) -> Iterator[Finding]:
    for name in ("saved", "peak"):
        a, b = at(row, f"bytes.{name}"), at(other, f"bytes.{name}")
        if a and b:
            word = MORE if b > (1 + TOLERANCE) * a else LESS if b < (1 - TOLERANCE) * a else SAME
            sizes = (f"{size / 2**20:.1f} MiB" for size in (a, b))
            yield Finding(f"{_words(row)}: {name}", *sizes, b / a, word)


def _identity(row: Row) -> tuple[Any, ...]:
    types = row.get("types", {})
    return (
        row["suite"],
        row["provider"],
        tuple(sorted(row["case"].items())),
        tuple(sorted((key, str(value)) for key, value in types.items())),
    )


def _words(row: Row) -> str:
    types = types_of(row) if at(row, "types.compute") else NONE
    return f"{row['suite']} {row['provider']} {where_of(row['case'])} r {row['case']['r']} {types}"


def _only_in(first: Sequence[Row], second: Sequence[Row], names: tuple[str, str]) -> list[str]:
    sets = [{_identity(row) for row in measured(rows)} for rows in (first, second)]
    counts = [len(sets[0] - sets[1]), len(sets[1] - sets[0])]
    return [
        f"{count} rows are only in {name}."
        for count, name in zip(counts, names, strict=True)
        if count
    ]
