"""The demo's pictures: what was learned at which rate, and what a layer costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.report.plots import COLORS, STYLE, bars, memory_bars, plt

Row = dict[str, Any]


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
        color = COLORS[row["method"]]
        for one in row["sweep"]:
            best = one["rate"] == row["rate"]
            steps, values = zip(*one["curve"], strict=True)
            label = f"{row['label']}, r {row['r']}, rate {one['rate']:g}" if best else None
            style = {"linewidth": 2, "marker": "o", "markersize": 3} if best else {"alpha": 0.3}
            axes.plot(steps, values, color=color, label=label, **style)
    low = min(value for row in rows for one in row["sweep"] for _, value in one["curve"])
    margin = 0.05 * (start - low)
    axes.set_ylim(low - margin, start + 3 * margin)  # what diverges leaves through the top
    axes.set(title="Adapting the frozen model to English", xlabel="step")
    axes.set_ylabel("nats per byte, first 8 KiB of validation,\nread often (pale: other rates)")
    axes.legend()


def _sweep(axes: Axes, rows: Sequence[Row]) -> None:
    """Final validation loss over the learning rate; the chosen one's held-out loss as a star."""
    for row in rows:
        color = COLORS[row["method"]]
        rates = [one["rate"] for one in row["sweep"]]
        values = [one["validation"] for one in row["sweep"]]
        axes.plot(rates, values, "o-", color=color)
        axes.plot(row["rate"], row["held_out"], "*", color=color, markersize=12)
    axes.plot([], [], "o", color="#444444", label="validation, whole text")
    axes.plot([], [], "*", color="#444444", markersize=10, label="held out, at the best rate")
    axes.set_xscale("log")
    axes.margins(y=0.35)
    axes.set(title="Where each learning rate ends", xlabel="learning rate (log)")
    axes.set_ylabel("nats per byte, the whole texts, read once\n(colors as on the left)")
    axes.legend(loc="upper left")


def layers(file: Path, shapes: Sequence[Sequence[Row]]) -> None:
    """Step time and peak memory of each provider, one row of panels per shape."""
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, grid = plt.subplots(
            len(shapes), 2, figsize=(11, 2.6 * len(shapes)), squeeze=False, layout="constrained"
        )
        for (times, memory), rows in zip(grid, shapes, strict=True):
            case = rows[0]["case"]
            shape = f"{case['tokens']} tokens, {case['in_features']} → {case['out_features']}"
            bars(times, rows, [row["versus"]["frozen"]["step"] for row in rows], "{:.2f}x")
            times.axvline(1, color="#444444", linestyle=":", linewidth=1)
            times.set(title=f"{shape}, r {case['r']}, {rows[0]['types']['compute']}")
            times.set_xlabel("step time against the frozen layer's (median, p20–p80)")
            memory_bars(memory, rows)
        figure.savefig(file, dpi=150)
        plt.close(figure)
