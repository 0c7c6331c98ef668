"""Pictures: of records (time over N, share of the floor, memory, training), and of the demo."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import tables

Row = dict[str, Any]
# A method has a colour; how it is run shows in the line.
COLOURS = {
    "frozen": "#9a9a9a",
    "lora": "#e0a100",
    "peft_lora": "#b5651d",
    "peft_lora_cast": "#d9a066",
    "hira": "#7a8450",
    "peft_hira": "#4f7942",
    "peft_hira_cast": "#a3b18a",
    "peft_loha": "#7b4b94",
    "peft_loha_cast": "#b39bc8",
    "hut_low_rank": "#0b6e99",
    "hut_low_rank_eager": "#7fb7d0",
    "hut_paper": "#d1495b",
    "hut_paper_eager": "#eba3ad",
}
LINES = {"_graph": ":", "_compiled": "-.", "_staged": (0, (5, 1)), "_fused": (0, (3, 1, 1, 1))}
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


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every picture that the rows make, as PNG and SVG.

    Returns:
        The files.

    Raises:
        ValueError: Rows of suites that have no picture.
    """
    pictures: dict[str, tuple[str, Callable[[Sequence[Row]], Figure]]] = {
        "layer-time": ("layer", time_over_tokens),
        "layer-floor": ("layer", share_of_floor),
        "memory": ("memory", memory_over_depth),
        "model": ("model", training),
    }
    files = []
    for name, (suite, picture) in pictures.items():
        some = [row for row in tables.measured(rows) if row["suite"] == suite]
        if not some:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(STYLE):
            figure = picture(some)
            about = textwrap.fill(tables.provenance(some), int(16 * figure.get_figwidth()))
            figure.supxlabel(about, fontsize=7.5, color="#666666")
            for kind in ("png", "svg"):
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], dpi=150)
            plt.close(figure)
    if not files:
        raise ValueError("nothing to draw: pictures are of layer, memory and model records")
    return files


def time_over_tokens(rows: Sequence[Row]) -> Figure:
    """A step's time over the number of tokens; the band is p20 to p80."""
    figure, panels = _panels(rows, "case.in_features", "case.out_features", "case.r")
    for axes, (sizes, some) in panels:
        for name, own in _over(some, "case.tokens"):
            tokens = [row["case"]["tokens"] for row in own]
            steps = [row["seconds"]["step"] for row in own]
            style = _style(name)
            axes.plot(tokens, [1e3 * q["median"] for q in steps], label=own[0]["label"], **style)
            low, high = ([1e3 * q[key] for q in steps] for key in ("p20", "p80"))
            axes.fill_between(tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=_layer_title(sizes, some), xlabel="tokens", ylabel="step, milliseconds")
        axes.set_yscale("log")
        _token_axis(axes, some)
    _legend(figure)
    return figure


def share_of_floor(rows: Sequence[Row]) -> Figure:
    """How near a step comes to the plain products that its formula cannot do without."""
    figure, panels = _panels(rows, "case.in_features", "case.out_features", "case.r")
    for axes, (sizes, some) in panels:
        for name, own in _over(some, "case.tokens"):
            tokens = [row["case"]["tokens"] for row in own]
            shares = [100 * row["floor_share"]["step"]["median"] for row in own]
            axes.plot(tokens, shares, label=own[0]["label"], **_style(name))
        axes.axhline(100, color="#444444", linewidth=1)
        axes.set(title=_layer_title(sizes, some), xlabel="tokens", ylabel="% of the floor")
        axes.set_ylim(0, max(110, axes.get_ylim()[1]))
        _token_axis(axes, some)
    _legend(figure)
    return figure


def memory_over_depth(rows: Sequence[Row]) -> Figure:
    """What the deepest stack keeps for backward, and each stack's peak, over the layers."""
    stacks = tables.grouped(rows, "case.tokens", "case.width", "case.r", "types.compute")
    figure, grid = plt.subplots(
        len(stacks), 2, figsize=(13, 4.4 * len(stacks)), squeeze=False, layout="constrained"
    )
    for (kept, peak), ((tokens, width, r, dtype), some) in zip(grid, stacks, strict=True):
        depths = sorted({row["case"]["depth"] for row in some})
        _kept_bars(kept, [row for row in some if row["case"]["depth"] == depths[-1]])
        kept.set_title(f"{depths[-1]} layers, {width}x{width}, {tokens} tokens, r {r}, {dtype}")
        for name, own in _over(some, "case.depth"):
            sizes = [row["bytes"]["peak"] / 2**20 for row in own]
            peak.plot([row["case"]["depth"] for row in own], sizes, **_style(name))
        peak.set(xlabel="layers", ylabel="MiB above what is resident", ylim=(0, None))
        peak.set(title="A step's peak (colours as on the left)", xticks=depths)
    return figure


def _kept_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """What is kept after a forward, and where theory puts it."""
    sizes = [row["bytes"]["saved"] / 2**20 for row in rows]
    _bars(axes, rows, [{"p20": s, "median": s, "p80": s} for s in sizes], "{:.1f}")
    theory = [row["bytes"]["saved_by_theory"] for row in rows]
    known = [(s / 2**20, len(rows) - i) for i, s in enumerate(theory) if s is not None]
    axes.plot(*zip(*known, strict=True), "k|", ms=14, mew=2, label="by theory")
    axes.set_xlabel("MiB kept after the forward, above what is resident")
    axes.legend(loc="lower right")


def training(rows: Sequence[Row]) -> Figure:
    """Tokens a second and peak memory of each model and way of training."""
    paths = ("case.model", "case.targets", "case.checkpointing")
    settings = tables.grouped(rows, *paths)
    figure, grid = plt.subplots(
        len(settings), 2, figsize=(11, 2.5 * len(settings)), squeeze=False, layout="constrained"
    )
    for (speed, memory), ((name, targets, checkpointing), some) in zip(grid, settings, strict=True):
        case = some[0]["case"]
        _bars(speed, some, [row["tokens_per_second"] for row in some], "{:,.0f}")
        speed.set(
            title=f"{name}, {targets}{', checkpointing' if checkpointing else ''} "
            f"({case['blocks']} of {case['blocks_of']} blocks)"
        )
        speed.set_xlabel("tokens a second (median, p20–p80)")
        _memory_bars(memory, some)
    return figure


def _panels(
    rows: Sequence[Row], *paths: str
) -> tuple[Figure, list[tuple[Axes, tuple[Any, list[Row]]]]]:
    """One panel for each group of rows, three abreast."""
    groups = tables.grouped(rows, *paths, "types.compute")
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(4.5 * across + 2.5, 4.2 * down), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    return figure, list(zip(panels, groups, strict=False))


def _over(rows: Sequence[Row], path: str) -> list[tuple[str, list[Row]]]:
    """Each provider's rows in the order of a number."""
    return [
        (name, sorted(own, key=lambda row: tables.at(row, path)))
        for name, own in tables.grouped(rows, "provider")
    ]


def _style(name: str) -> Any:
    """A provider's colour, and the line of how it is run."""
    line, base = "-", name
    for ending, dashes in LINES.items():
        if name.endswith(ending):
            line, base = dashes, name.removesuffix(ending)
    return {"color": COLOURS[base], "linestyle": line, "marker": "o", "markersize": 3.5}


def _layer_title(sizes: Sequence[Any], rows: Sequence[Row]) -> str:
    K, O, r, dtype = sizes
    return f"{K} → {O}, r {r}, {dtype}"


def _token_axis(axes: Axes, rows: Sequence[Row]) -> None:
    tokens = sorted({row["case"]["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(n) for n in tokens])


def _legend(figure: Figure) -> None:
    """One legend for all panels, at their right."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right center")


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
            case = rows[0]["case"]
            shape = f"{case['tokens']} tokens, {case['in_features']} → {case['out_features']}"
            _bars(times, rows, [row["versus"]["frozen"]["step"] for row in rows], "{:.2f}x")
            times.axvline(1, color="#444444", linestyle=":", linewidth=1)
            times.set(title=f"{shape}, r {case['r']}, {rows[0]['types']['compute']}")
            times.set_xlabel("step time against the frozen layer's (median, p20–p80)")
            _memory_bars(memory, rows)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _memory_bars(axes: Axes, rows: Sequence[Row]) -> None:
    sizes = [row["bytes"]["peak"] / 2**20 for row in rows]
    _bars(axes, rows, [{"p20": s, "median": s, "p80": s} for s in sizes], "{:.1f}")
    axes.set_xlabel("peak MiB of a step, above what is resident")
    axes.set_yticklabels([])


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
