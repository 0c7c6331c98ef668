"""The demo's pictures: what the losses did, and what a layer's step costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
COLOURS = {
    "hut_low_rank": "#0b6e99",
    "hut_paper": "#d1495b",
    "hut_eager": "#7fb7d0",
    "lora": "#e0a100",
    "hira": "#7a8450",
    "frozen": "#9a9a9a",
}
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "font.size": 9.5,
    "legend.frameon": False,
}


def losses(file: Path, pretraining: Row, rows: Sequence[Row]) -> None:
    """Pre-training, adaptation at each method's best rate, and the sweep over the rates."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(13, 4), width_ratios=(1, 1.3, 1.1), layout="constrained"
        )
        _pretraining(left, pretraining)
        _curves(middle, rows)
        _sweep(right, rows)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _pretraining(axes: Axes, pretraining: Row) -> None:
    grey, held_out = "#444444", pretraining["held_out"]
    steps, values = zip(*pretraining["curve"], strict=True)
    axes.plot(steps, values, color=grey, linewidth=1.5, label="training")
    axes.axhline(held_out, color=grey, linestyle=":", label=f"held out, at the end: {held_out:.3f}")
    axes.set(title="Pre-training on Python sources", xlabel="step", ylabel="nats per byte")
    axes.legend()


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    """The best rate's curve of each method strong, the other rates' pale."""
    start = rows[0]["sweep"][0]["curve"][0][1]
    for row in rows:
        colour = COLOURS[row["method"]]
        for one in row["sweep"]:
            best = one["rate"] == row["rate"]
            steps, values = zip(*one["curve"], strict=True)
            label = f"{row['label']}, r {row['r']}, rate {one['rate']:g}" if best else None
            style = {"linewidth": 2, "marker": "o", "markersize": 3} if best else {"alpha": 0.3}
            axes.plot(steps, values, color=colour, label=label, **style)
    low = min(value for row in rows for one in row["sweep"] for _, value in one["curve"])
    margin = 0.05 * (start - low)
    axes.set_ylim(low - margin, start + 3 * margin)  # what diverges leaves through the top
    axes.set(title="Adapting the frozen model to English", xlabel="step")
    axes.set_ylabel("validation, nats per byte (pale: the other rates)")
    axes.legend()


def _sweep(axes: Axes, rows: Sequence[Row]) -> None:
    """Final validation loss over the learning rate; the chosen one's held-out loss as a star."""
    for row in rows:
        colour = COLOURS[row["method"]]
        rates = [one["rate"] for one in row["sweep"]]
        values = [one["validation"] for one in row["sweep"]]
        axes.plot(rates, values, "o-", color=colour)
        axes.plot(row["rate"], row["held_out"], "*", color=colour, markersize=12)
    axes.plot([], [], "o", color="#444444", label="validation")
    axes.plot([], [], "*", color="#444444", markersize=10, label="held out, at the best rate")
    axes.set_xscale("log")
    axes.margins(y=0.25)
    axes.set(title="Where each learning rate ends", xlabel="learning rate")
    axes.set_ylabel("nats per byte (colours as on the left)")
    axes.legend(loc="upper center", ncols=2)


def layers(file: Path, shapes: Sequence[Sequence[Row]]) -> None:
    """Step time and peak memory of each provider, one row of panels per shape."""
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, grid = plt.subplots(
            len(shapes), 2, figsize=(11, 2.6 * len(shapes)), squeeze=False, layout="constrained"
        )
        for (times, memory), rows in zip(grid, shapes, strict=True):
            first = rows[0]
            shape = f"{first['tokens']} tokens, {first['in_features']} → {first['out_features']}"
            _bars(times, rows, [row["step_ratio"] for row in rows], "{:.2f}x")
            times.axvline(1, color="#444444", linestyle=":", linewidth=1)
            times.set(title=f"{shape}, r {first['r']}, {first['dtype']}")
            times.set_xlabel("step time against the frozen layer's (median, p20–p80)")
            sizes = [row["peak_bytes"] / 2**20 for row in rows]
            _bars(memory, rows, [{"p20": s, "median": s, "p80": s} for s in sizes], "{:.1f}")
            memory.set_xlabel("peak MiB of a step, above what is resident")
            memory.set_yticklabels([])
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _bars(axes: Axes, rows: Sequence[Row], values: Sequence[Row], form: str) -> None:
    """One bar per provider from above, its spread as a whisker, its median in figures beside it."""
    medians = [q["median"] for q in values]
    spread = [[q["median"] - q["p20"] for q in values], [q["p80"] - q["median"] for q in values]]
    places = range(len(rows), 0, -1)
    axes.barh(places, medians, color=[COLOURS[row["provider"]] for row in rows], height=0.7)
    axes.errorbar(medians, places, xerr=spread, fmt="none", ecolor="#222222")
    widest = max(q["p80"] for q in values)
    for place, q in zip(places, values, strict=True):
        axes.text(q["p80"] + 0.015 * widest, place, form.format(q["median"]), va="center")
    axes.set_xlim(0, 1.12 * widest)
    axes.set_yticks(places, [row["label"] for row in rows])
    axes.set_axisbelow(True)
