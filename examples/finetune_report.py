"""Results of the fine-tunes, in a table, in a picture and in plain sentences."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.report.finetunes import NAMES
from benchmarks.report.plots import COLORS, STYLE
from benchmarks.report.text import (
    load_sentences,
    mebibytes,
    milliseconds,
    ratio,
    table,
    thread_sentences,
)

Row = dict[str, Any]
COLOR = {
    **COLORS,
    "probe": COLORS["frozen"],
    "hut_low_rank_scaled": COLORS["hut_low_rank"],
    "hut_paper_grouped": COLORS["hut_paper"],
}
DASHED = ("hut_low_rank", "hut_paper")  # the plain rate, in the color of the one that is LoRA's
POINTS = 32  # of a loss curve


def described(data: Row) -> str:
    """The data in a line."""
    what = {"number": "numbers", "text": "answers to prompts"}.get(data["kind"])
    what = what or f"{len(data['classes'])} classes"
    rows = ", ".join(f"{count} {part}" for part, count in data["rows"].items())
    return f"{data['dataset']}: {what}; rows: {rows}"


def table_of(rows: Sequence[Row], metric: str) -> str:
    """The methods at their best rates."""
    seeds = len(rows[0]["runs"])
    interval = f"with its 95 % interval over {seeds} seeds" if seeds > 1 else "one seed"
    return table(
        f"At each method's best rate; {NAMES[metric]}, {interval}",
        [
            "",
            "r",
            "trained",
            "rate",
            metric,
            "loss",
            "step ms",
            f"step / {_lora(rows)['label']}",
            "model MiB",
            "peak MiB",
            "file kB",
        ],
        [
            [
                row["label"],
                _or_dash(row["r"], str),
                f"{row['trainable']:,}",
                f"{row['rate']:g}",
                hundredfold(row[metric]),
                f"{row['loss']['mean']:.3f}",
                _or_dash(row.get("step"), milliseconds),
                _or_dash(row.get("step_versus_lora"), ratio),
                mebibytes(row["model_bytes"]),
                _or_dash(row.get("peak_bytes"), mebibytes),
                _or_dash(row["adapter_bytes"], lambda size: f"{size / 1000:.0f}"),
            ]
            for row in rows
        ],
    )


def sweep_of(rows: Sequence[Row], metric: str) -> str:
    """Every rate that was tried."""
    most = max(len(row["sweep"]) for row in rows)
    cells = [
        [
            f"{one['rate']:g}: {100 * one['validation'][metric]['mean']:.1f}"
            + ("*" if one["rate"] == row["rate"] else " ")
            for one in row["sweep"]
        ]
        for row in rows
    ]
    return table(
        f"The rates tried: {NAMES[metric]} on the validation part (* the best)",
        ["", *[""] * most],
        [
            [row["label"], *line, *[""] * (most - len(line))]
            for row, line in zip(rows, cells, strict=True)
        ],
    )


def sentences(
    rows: Sequence[Row], metric: str, environment: Row, threads: tuple[int, int]
) -> list[str]:
    """Sentences on the numbers, and on their limits."""
    lora = _lora(rows)
    counts = sorted({row["trainable"] for row in rows if row["r"]})
    even = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return [
        *load_sentences(environment),
        *thread_sentences(*threads),
        f"Every adapter has {even} parameters; the head is trained beside each, at one rate.",
        *(_against(row, lora, metric) for row in rows if row["method"].startswith("hut")),
        *(_edge(row) for row in rows if row["on_edge"] and row["rate"] > 0),
    ]


def _lora(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["method"] == "lora")


def _against(row: Row, lora: Row, metric: str) -> str:
    mine, other, name = row[metric], lora[metric], lora["label"]
    difference = mine["mean"] - other["mean"]
    if other["margin"] is None:
        word = "one seed, no interval"
    elif abs(difference) <= other["margin"]:
        word = f"within {name}'s interval"
    else:
        word = f"{'above' if difference > 0 else 'BELOW'} {name}'s interval"
    return (
        f"{row['label']} ends at {hundredfold(mine)}, {name} at {hundredfold(other)} "
        f"({NAMES[metric]}): {word}; its best rate is "
        f"{row['rate'] / lora['rate']:.3g} times {name}'s."
    )


def _edge(row: Row) -> str:
    return (
        f"The best rate of {row['label']}, {row['rate']:g}, is the last one tried on its side: a "
        "better one may lie beyond."
    )


def hundredfold(q: Row) -> str:
    """Mean and margin, times 100."""
    return f"{100 * q['mean']:.1f}" + _or_dash(q["margin"], lambda m: f" ± {100 * m:.1f}", "")


def _or_dash(value: Any, form: Any, dash: str = "–") -> str:
    return dash if value is None else form(value)


def picture(file: Path, rows: Sequence[Row], metric: str) -> None:
    """Training losses, test scores, and what each learning rate gave."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
        _losses(axes[0][0], rows)
        _scores(axes[0][1], rows, metric)
        _sweep(axes[1][0], rows, "loss", "loss", 1)
        _sweep(axes[1][1], rows, metric, NAMES[metric], 100)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _losses(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean over the seeds, with the range between them, a point for several steps."""
    for row in rows:
        curves = [run["losses"] for run in row["runs"]]
        steps = min(map(len, curves))
        if steps == 0:
            continue
        ends = np.linspace(0, steps, min(POINTS, steps) + 1).astype(int)[1:]
        values = np.array([_means(curve, ends) for curve in curves])
        label = f"{row['label']}, rate {row['rate']:g}"
        axes.plot(ends, values.mean(0), **_line(row), label=label)
        axes.fill_between(
            ends, values.min(0), values.max(0), color=COLOR[row["method"]], alpha=0.15, linewidth=0
        )
    axes.set(title="Training loss at each method's best rate", xlabel="step")
    axes.set_ylim(bottom=0)
    axes.legend()


def _means(curve: Sequence[float], ends: Any) -> list[float]:
    begins = [0, *ends[:-1]]
    return [statistics.fmean(curve[a:b]) for a, b in zip(begins, ends, strict=True)]


def _scores(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Mean and interval, and the seeds as dots."""
    for place, row in zip(range(len(rows), 0, -1), rows, strict=True):
        q, color = row[metric], COLOR[row["method"]]
        values = [100 * value for value in q["values"]]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.4, markersize=4)
        margin = None if q["margin"] is None else 100 * q["margin"]
        axes.errorbar(
            100 * q["mean"], place, xerr=margin, fmt="D", color=color, capsize=4, markersize=6
        )
        axes.annotate(
            hundredfold(q),
            (100 * q["mean"], place),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.set_yticks(range(len(rows), 0, -1), [row["label"] for row in rows])
    axes.set_ylim(0.5, len(rows) + 0.6)
    axes.margins(x=0.15)
    interval = ", 95 % interval" if rows[0][metric]["margin"] is not None else ", one seed"
    axes.set(title=f"On the test part{interval}", xlabel=NAMES[metric])


def _sweep(axes: Axes, rows: Sequence[Row], key: str, name: str, times: float) -> None:
    """Means over the seeds, with the range between them; a star where the rate is the best."""
    for row in rows:
        found = [(one["rate"], one["validation"][key]) for one in row["sweep"]]
        rates = [rate for rate, _ in found]
        means = [times * scores["mean"] for _, scores in found]
        best = means[rates.index(row["rate"])]
        axes.plot(rates, means, marker="o", **_line(row), markersize=4, label=row["label"])
        axes.plot(row["rate"], best, "*", color=COLOR[row["method"]], markersize=12)
        low, high = ([times * end(q["values"]) for _, q in found] for end in (min, max))
        axes.fill_between(rates, low, high, color=COLOR[row["method"]], alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set(
        title="On the validation part, at each learning rate",
        xlabel="learning rate (log; * the chosen one)",
        ylabel=name,
    )
    axes.legend(fontsize=8)


def _line(row: Row) -> Row:
    dashed = row["method"] in DASHED
    return {"color": COLOR[row["method"]], "linestyle": "--" if dashed else "-"}
