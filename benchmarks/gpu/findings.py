"""Conclusions from figures: break-evens, verdicts, changes of table and planner. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hut_kernels import devices, planner
from tests.gpu.cases import PARTS

from ..report.text import table
from .extension import launching_text

Row = dict[str, Any]
OTHER = {"forward": "staged", "grad_input": "staged", "grad_factors": "chunked"}
WORTH = 0.97  # of a row's time: what a change must get below to be worth a proposal


@dataclass(frozen=True)
class Crossing:
    """Up to how many tokens one strategy is the faster one.

    Attributes:
        tokens: The break-even; 0 where it never is the faster one.
        kind: `crossed`, `always` (at every measured N) or `never`.
        regret: Mean of what the choice by this break-even loses at the measured points, 0.01 being
            1 % of the time.
    """

    tokens: int
    kind: str
    regret: float


def break_even(points: Iterable[tuple[int, float]]) -> Crossing:
    """The break-even from ratios of times, `(N, first / second)`: the first is chosen up to it.

    The threshold that loses least over all measured points, placed between its two neighbors
    where the ratio, by log-log interpolation, is 1.

    Raises:
        ValueError: No points, or a ratio that is not positive.
    """
    ordered = sorted(points)
    if not ordered:
        raise ValueError("no points to find a break-even from")
    if any(not ratio > 0 for _, ratio in ordered):
        raise ValueError(f"ratios must be positive; got {ordered}")
    logs = [math.log(ratio) for _, ratio in ordered]
    losses = [
        sum(max(0.0, one) for one in logs[:cut]) + sum(max(0.0, -one) for one in logs[cut:])
        for cut in range(len(logs) + 1)
    ]
    # Where both are as good the first has it: it is the one without a workspace.
    cut = min(range(len(losses)), key=lambda n: (losses[n], -n))
    regret = losses[cut] / len(logs)
    if cut == 0:
        return Crossing(0, "never", regret)
    if cut == len(logs):
        return Crossing(ordered[-1][0], "always", regret)
    (low, _), (high, _) = ordered[cut - 1], ordered[cut]
    below, above = logs[cut - 1], logs[cut]
    if not below < 0 < above:
        return Crossing(low, "crossed", regret)
    share = -below / (above - below)
    at = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return Crossing(int(at), "crossed", regret)


def median(row: Row, name: str) -> float | None:
    """A figure of a row; None where it was not taken or failed."""
    found = row.get(name)
    value = found.get("median") if isinstance(found, dict) else None
    return value if value and value > 0 else None


def ratio(row: Row, name: str, other: str) -> float | None:
    a, b = median(row, name), median(row, other)
    return a / b if a and b else None


def crossings(rows: Sequence[Row]) -> list[Row]:
    """The break-evens of every layer and part that was measured over tokens."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("suite") == "tokens":
            groups.setdefault((*_layer(row), row["part"]), []).append(row)
    found = []
    for key, some in groups.items():
        part = some[0]["part"]
        points = [(row["N"], value) for row in some if (value := ratio(row, "fused", OTHER[part]))]
        if points:
            layer = dict(zip(("K", "O", "r", "transform", "dtype"), key, strict=False))
            found.append({**layer, "part": part, **asdict(break_even(points))})
    return found


def proposal(found: Sequence[Row], device: devices.Device, record: str) -> Row:
    """The planner's entry for a device, from its break-evens: the geometric mean over layers.

    Returns:
        `entry` (a line of `devices.BREAK_EVENS`), `tokens` by part, and `now`, what stands there.
    """
    now = devices.break_even(device)
    tokens = {}
    for part in PARTS:
        some = [one["tokens"] for one in found if one["part"] == part]
        if some:
            mean = math.exp(sum(math.log(max(1, n)) for n in some) / len(some))
            tokens[part] = _rounded(mean) if any(some) else 0
    values = [str(tokens.get(part, getattr(now, part))) for part in PARTS]
    name = devices.known_name(device)
    entry = f'"{name}": BreakEven({", ".join(values)}, "{record}"),'
    return {
        "entry": entry if len(tokens) == len(PARTS) else None,
        "tokens": tokens,
        "now": asdict(now),
    }


def _rounded(tokens: float) -> int:
    """To a sixteenth of its power of two, downwards: no figure here is finer."""
    step = max(1, 2 ** max(0, int(math.log2(max(1.0, tokens))) - 4))
    return int(tokens) // step * step


def as_rows(rows: Sequence[Row], environment: Row, device: devices.Device) -> Iterator[Row]:
    """A row for each strategy, in the form of the suites, for `targets.table`."""
    for row in rows:
        if row.get("suite") not in ("tokens", "step", "launching") or "error" in row:
            continue
        case = {"tokens": row["N"], "in_features": row["K"], "out_features": row["O"]}
        case |= {name: row[name] for name in ("r", "transform", "part") if name in row}
        figures = {name: row.get(name) for name in ("plain", "planned", "fused", "staged")}
        if row["suite"] == "tokens":
            figures["planned"] = row.get(getattr(_plan(row, device), row["part"]))
        if row["suite"] == "launching":
            figures = {row["provider"]: row["seconds"]}
        for name, q in figures.items():
            if q and "median" in q:
                yield {
                    "suite": row["suite"],
                    "provider": name,
                    "case": case,
                    "types": {"compute": row["dtype"]},
                    "seconds": {"step": q},
                    "environment": environment,
                }


def _plan(row: Row, device: devices.Device) -> planner.Plan:
    sizes = row["N"], row["K"], row["O"], row["r"]
    types = row["dtype"], row["dtype"]
    return planner.plan(planner.Problem(*sizes, *types, transform=row["transform"]), device)


def tile_changes(rows: Sequence[Row]) -> list[Row]:
    """For every table row that was tried, the fastest right alternative if it is worth it."""
    found = []
    for row in rows:
        if row.get("suite") != "tiles":
            continue
        around = [value for name in ("before", "after") if (value := median(row, name))]
        timed = [(value, one) for one in row["candidates"] if (value := median(one, "time"))]
        if not around or not timed:
            continue
        base, spread = min(around), max(around) / min(around) - 1
        value, one = min(timed, key=lambda entry: entry[0])
        found.append(
            {
                "kernel": row["kernel"],
                "N": row["N"],
                "transform": row["transform"],
                "r": row["r"],
                "dtype": row["dtype"],
                "row": row["row"],
                "change": one["change"],
                "ratio": value / base,
                "spread": spread,
                "worth_it": value / base < min(WORTH, 1 - 1.5 * spread),
                "tried": len(timed),
                "wrong": [c["change"] for c in row["candidates"] if c["status"] == "failed"],
            }
        )
    return found


# In words


def summary(record: Row, device: devices.Device) -> str:
    """The record on one screen."""
    rows = record.get("rows", [])
    parts = [
        correctness_text(record.get("correctness", {})),
        ceilings_text(record.get("ceilings", {})),
        *(tokens_text(some) for some in _by_layer(rows, "tokens")),
        *(steps_text(some) for some in _by_layer(rows, "step")),
        weight_text([row for row in rows if row.get("suite") == "weight"]),
        launching_text([row for row in rows if row.get("suite") == "launching"]),
        verdicts_text(record.get("verdicts", []), device),
        changes_text(record.get("tile_changes", []), record.get("proposal"), record),
        left_out_text(record),
    ]
    return "\n\n".join(part for part in parts if part)


def correctness_text(found: Row) -> str:
    if not found:
        return ""
    counts = ", ".join(f"{count} {status}" for status, count in found["counts"].items())
    lines = [f"Correctness: {counts}."]
    worst = found.get("worst") or {}
    if worst:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in sorted(worst.items()))
        lines.append(f"  worst error as a share of its limit: {shares}")
    for one in found.get("failures", []):
        lines.append(f"  FAILED {one['case']}: {'; '.join(one['problems'])}")
    for one in found.get("skipped", []):
        lines.append(f"  skipped {one['case']}: {'; '.join(one['problems'])}")
    for one in found.get("elsewhere", []):
        lines.append(f"  another kernel ran in {one['case']}: not {', '.join(one['missing'])}")
    for name, one in found.get("sanitizer", {}).items():
        detail = f": {one['detail']}" if one.get("detail") else ""
        lines.append(f"  compute-sanitizer {name}: {one['status']}{detail}")
    return "\n".join(lines)


def ceilings_text(found: Row) -> str:
    if not found:
        return ""
    rates = ", ".join(
        f"{name} {found[f'{name}_per_second'] / 1e12:.0f}"
        for name in ("bfloat16", "float16", "tf32", "float32")
        if f"{name}_per_second" in found
    )
    copy = found["copy_bytes_per_second"] / 1e12
    return f"Ceilings: copy {copy:.2f} TB/s (read + written); products, TFLOP/s: {rates}."


def tokens_text(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        other = OTHER[row["part"]]
        best = min((v for n in ("fused", other) if (v := median(row, n))), default=None)
        lines.append(
            [
                row["part"],
                str(row["N"]),
                *(_microseconds(row, name) for name in ("plain", "fused", other)),
                _number(ratio(row, "fused", "plain")),
                _number(ratio(row, other, "plain")),
                _number(row["floor"] / best if best else None),
            ]
        )
    header = ["part", "N", "plain us", "fused us", "other us", "fused/plain", "other/plain"]
    return table(f"{_title(rows[0])}; other: staged, chunked", [*header, "floor/best"], lines)


def steps_text(rows: Sequence[Row]) -> str:
    names = ("plain", "planned", "fused", "staged", "eager")
    lines = [
        [
            str(row["N"]),
            *(_microseconds(row, name) for name in names),
            _number(ratio(row, "planned", "plain")),
            _number(ratio(row, "eager", "planned")),
        ]
        for row in rows
    ]
    header = ["N", *(f"{name} us" for name in names), "planned/plain", "eager/graph"]
    return table(f"Forward + backward, {_title(rows[0])}", header, lines)


def weight_text(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [
            _title(row),
            _microseconds(row, "weight"),
            _microseconds(row, "copy"),
            _number(ratio(row, "weight", "copy")),
        ]
        for row in rows
    ]
    return table("The weight kernel beside a copy", ["", "weight us", "copy us", "ratio"], lines)


def verdicts_text(lines: Sequence[Sequence[str]], device: devices.Device) -> str:
    if not lines:
        return ""
    text = table("Targets, as ratios of device time", ["", "limit", "at", "ratio", ""], lines)
    if "H200" not in device.name:
        text += f"\nThe targets are stated for an H200; this is {device.name}."
    return text


def changes_text(changes: Sequence[Row], proposed: Row | None, record: Row) -> str:
    lines = []
    for one in record.get("break_evens", []):
        layer = f"{one['K']}x{one['O']} r {one['r']} {one['transform']} {one['dtype']}"
        lines.append(
            f"  {one['part']} {layer}: fused up to {one['tokens']} tokens ({one['kind']}; "
            f"the choice loses {one['regret']:.1%} on average)"
        )
    if proposed and proposed["entry"]:
        now = ", ".join(f"{part} {proposed['now'][part]}" for part in PARTS)
        lines.append(f"  devices.BREAK_EVENS now: {now} ({proposed['now']['source']})")
        lines.append(f"  devices.BREAK_EVENS should have: {proposed['entry']}")
    for one in changes:
        where = f"{one['kernel']} at N = {one['N']}, r {one['r']}, {one['dtype']}"
        if one["worth_it"]:
            lines.append(
                f"  tables.py, {where}: {_brief(one['row'])} with {one['change']}: "
                f"{one['ratio']:.3f} of its time (spread {one['spread']:.1%}, {one['tried']} tried)"
            )
        else:
            lines.append(f"  tables.py, {where}: keep (best of {one['tried']}: {one['ratio']:.3f})")
        lines += [f"    WRONG RESULT with {change}" for change in one["wrong"]]
    return "What should change:\n" + "\n".join(lines) if lines else ""


def left_out_text(record: Row) -> str:
    lines = [
        f"  {phase['name']}: {phase['note']}" for phase in record.get("phases", []) if phase["note"]
    ]
    return "Left out or failed:\n" + "\n".join(lines) if lines else ""


def _by_layer(rows: Sequence[Row], suite: str) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("suite") == suite:
            groups.setdefault(_layer(row), []).append(row)
    parts = {part: index for index, part in enumerate(PARTS)}
    return [
        sorted(some, key=lambda row: (parts.get(row.get("part", ""), 0), row["N"]))
        for some in groups.values()
    ]


def _layer(row: Row) -> tuple:
    return row["K"], row["O"], row["r"], row["transform"], row["dtype"]


def _title(row: Row) -> str:
    return f"{row['K']} -> {row['O']}, r {row['r']}, {row['transform']}, {row['dtype']}"


def _brief(row: Row) -> str:
    names = ("BN", "BO", "BK", "warps", "stages")
    return "Row(" + ", ".join(f"{name}={row[name]}" for name in names if name in row) + ")"


def _microseconds(row: Row, name: str) -> str:
    value = median(row, name)
    if value is not None:
        return f"{1e6 * value:.1f}"
    return "failed" if isinstance(row.get(name), dict) else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
