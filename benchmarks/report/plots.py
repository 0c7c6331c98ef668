"""Pictures of records: time over tokens, share of the floor, memory, training."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..providers import PROVIDERS
from . import compare, tables

Row = dict[str, Any]
# A method has a color; how it is run shows in the line.
COLORS = {
    "frozen": "#9a9a9a",
    "lora": "#e0a100",
    "peft_lora": "#b5651d",
    "peft_lora_cast": "#d9a066",
    "hira": "#7a8450",
    "peft_hira": "#4f7942",
    "peft_hira_cast": "#a3b18a",
    "peft_loha": "#7b4b94",
    "peft_loha_cast": "#b39bc8",
    "peft_rslora": "#8c6d31",
    "peft_dora": "#c49c94",
    "peft_vera": "#17a398",
    "peft_oft": "#5f5f9e",
    "peft_ia3": "#b0b04a",
    "peft_lokr": "#d68fd6",
    "lycoris_loha": "#4b2c5e",
    "full": "#333333",
    "peft_hira_accelerated": "#00a676",
    "hut_low_rank": "#0b6e99",
    "hut_low_rank_config": "#3f88c5",
    "hut_low_rank_eager": "#7fb7d0",
    "hut_paper": "#d1495b",
    "hut_paper_eager": "#eba3ad",
}
LINES = {"_graph": ":", "_compiled": "-.", "_staged": (0, (5, 1)), "_fused": (0, (3, 1, 1, 1))}
LORAS = ("peft_lora", "lora", "lora_graph")  # of these, the first there is: 1 in layer-time
_FORCED = ("_fused", "_staged")
# What has panels of its own: a title's addition, and whose rows.
KINDS: dict[str, Callable[[str], bool]] = {
    "": lambda name: not name.endswith((*_FORCED, "_graph")),
    ", graphs": lambda name: name.endswith("_graph"),
    ", forced": lambda name: name.endswith(_FORCED) or name == "hut_low_rank",
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


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every picture that the rows make, as PNG and SVG.

    Returns:
        The files.

    Raises:
        ValueError: Rows of suites that have no picture, or of one thing twice on one machine.
    """
    files: list[Path] = []
    for some in tables.by_machine(rows):
        compare.by_identity(some)
    suites = {row["suite"] for row in tables.measured(rows)}
    for name, (suite, _) in PICTURES.items():
        if suite in suites:
            folder.mkdir(parents=True, exist_ok=True)
            own = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
            save(name, rows, own)
            files += own
    if not files:
        raise ValueError("nothing to draw: pictures are of layer, memory and model records")
    return files


def save(name: str, rows: Sequence[Row], files: Sequence[Path], about: str | None = None) -> None:
    """Draws one of `PICTURES`; the same rows always give the same SVG, `about` in its metadata."""
    suite, picture = PICTURES[name]
    some = [row for row in tables.measured(rows) if row["suite"] == suite]
    with plt.rc_context({**STYLE, "svg.hashsalt": "hut"}):
        figure = picture(some)
        width = int(16 * figure.get_figwidth())
        lines = [textwrap.fill(tables.provenance(own), width) for own in tables.by_machine(some)]
        figure.supxlabel("\n".join(lines), fontsize=7.5, color="#666666")
        for file in files:
            svg = {"Date": None, "Description": about} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=150, metadata=svg)
        plt.close(figure)


def time_over_tokens(rows: Sequence[Row]) -> Figure:
    """A step's time over LoRA's, over the number of tokens; the band is p20 to p80."""
    figure, panels = _layer_panels([row for row in rows if row["versus"]])
    for axes, some in panels:
        baseline = next(name for name in (*LORAS, *some[0]["versus"]) if name in some[0]["versus"])
        for name, own in _over(some, "case.tokens"):
            tokens = [row["case"]["tokens"] for row in own]
            steps = [row["versus"][baseline]["step"] for row in own]
            style = _style(name)
            axes.plot(tokens, [q["median"] for q in steps], label=own[0]["label"], **style)
            low, high = ([q[key] for q in steps] for key in ("p20", "p80"))
            axes.fill_between(tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="tokens (log)")
        axes.set_ylabel(f"step / {PROVIDERS[baseline].label} (log), below 1 is faster")
    _legend(figure)
    return figure


def share_of_floor(rows: Sequence[Row]) -> Figure:
    """The time of the plain products that a formula needs, as a share of its step's."""
    figure, panels = _layer_panels(rows)
    for axes, some in panels:
        for name, own in _over(some, "case.tokens"):
            tokens = [row["case"]["tokens"] for row in own]
            shares = [100 * row["floor_share"]["step"]["median"] for row in own]
            axes.plot(tokens, shares, label=own[0]["label"], **_style(name))
        axes.axhline(100, color="#444444", linewidth=1)
        axes.set(xlabel="tokens (log)", ylabel="% of the floor")
        axes.set_ylim(0, max(110, axes.get_ylim()[1]))
    _legend(figure)
    return figure


def memory_over_depth(rows: Sequence[Row]) -> Figure:
    """Bytes that the deepest stack keeps for backward, and each stack's peak."""
    stacks = _grouped(rows, "case.tokens", "case.width", "case.r", tables.types_of)
    figure, grid = plt.subplots(
        len(stacks), 2, figsize=(13, 4.4 * len(stacks)), squeeze=False, layout="constrained"
    )
    for (kept, peak), (where, (tokens, width, r, dtype), some) in zip(grid, stacks, strict=True):
        depths = sorted({row["case"]["depth"] for row in some})
        _kept_bars(kept, [row for row in some if row["case"]["depth"] == depths[-1]])
        kept.set_title(
            f"{depths[-1]} layers, {width}x{width}, {tokens} tokens, r {r}, {dtype}{where}"
        )
        for name, own in _over(some, "case.depth"):
            sizes = [row["bytes"]["peak"] / 2**20 for row in own]
            peak.plot([row["case"]["depth"] for row in own], sizes, **_style(name))
        peak.set(xlabel="layers", ylabel="MiB above what is resident", ylim=(0, None))
        peak.set(title="A step's peak (colors as on the left)", xticks=depths)
    return figure


def _kept_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars of the bytes kept after a forward, and marks where theory puts them."""
    sizes = [row["bytes"]["saved"] / 2**20 for row in rows]
    bars(axes, rows, [{"p20": s, "median": s, "p80": s} for s in sizes], "{:.1f}")
    theory = [row["bytes"]["saved_by_theory"] for row in rows]
    known = [(s / 2**20, len(rows) - i) for i, s in enumerate(theory) if s is not None]
    axes.plot(*zip(*known, strict=True), "k|", ms=14, mew=2, label="by theory")
    axes.set_xlabel("MiB kept after the forward, above what is resident")
    axes.legend(loc="lower right")


def training(rows: Sequence[Row]) -> Figure:
    """Tokens a second and peak memory of each model and way of training."""
    machines = tables.by_machine(rows)
    settings = [
        (_where(own, machines), some) for own in machines for some in tables.by_setting(own)
    ]
    figure, grid = plt.subplots(
        len(settings), 2, figsize=(11, 2.8 * len(settings)), squeeze=False, layout="constrained"
    )
    for (speed, memory), (where, some) in zip(grid, settings, strict=True):
        bars(speed, some, [row["tokens_per_second"] for row in some], "{:,.0f}")
        speed.set_title(textwrap.fill(f"{tables.setting_of(some[0])}{where}", 60))
        speed.set_xlabel("tokens a second (median, p20–p80)")
        memory_bars(memory, some)
    return figure


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure]]] = {
    "layer-time": ("layer", time_over_tokens),
    "layer-floor": ("layer", share_of_floor),
    "memory": ("memory", memory_over_depth),
    "model": ("model", training),
}


def _layer_panels(rows: Sequence[Row]) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """Panels for each weight, three abreast: eager and compiled, graphs, forced strategies."""
    parts = []
    for where, (K, O, r, dtype), some in _grouped(
        rows, "case.in_features", "case.out_features", "case.r", tables.types_of
    ):
        for kind, chosen in KINDS.items():
            own = [row for row in some if chosen(row["provider"])]
            if len({row["provider"] for row in own}) > 1:
                parts.append((f"{K} → {O}, r {r}, {dtype}{kind}{where}", own))
    across = min(3, len(parts))
    down = -(-len(parts) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(4.5 * across + 2.5, 4.2 * down), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(parts) :]:
        axes.set_visible(False)
    for axes, (title, own) in zip(grid.flat, parts, strict=False):
        axes.set_title(title)
        tokens = sorted({row["case"]["tokens"] for row in own})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{n >> 10}k" if n % 1024 == 0 else str(n) for n in tokens])
    return figure, [(axes, own) for axes, (_, own) in zip(grid.flat, parts, strict=False)]


def _grouped(rows: Sequence[Row], *paths: Any) -> list[tuple[str, Any, list[Row]]]:
    """`tables.grouped` by machine, with what a title adds to tell machines apart."""
    machines = tables.by_machine(rows)
    return [
        (_where(own, machines), key, some)
        for own in machines
        for key, some in tables.grouped(own, *paths)
    ]


def _where(rows: Sequence[Row], machines: Sequence[Sequence[Row]]) -> str:
    return f", {rows[0]['environment']['device_name']}" if len(machines) > 1 else ""


def _over(rows: Sequence[Row], path: str) -> list[tuple[str, list[Row]]]:
    """Each provider's rows in the order of a number."""
    return [
        (name, sorted(own, key=lambda row: tables.at(row, path)))
        for name, own in tables.grouped(rows, "provider")
    ]


def _style(name: str) -> Any:
    """A provider's color, and the line of how it is run."""
    line, base = "-", name
    for ending, dashes in LINES.items():
        if name.endswith(ending):
            line, base = dashes, name.removesuffix(ending)
    return {"color": COLORS[base], "linestyle": line, "marker": "o", "markersize": 3.5}


def _legend(figure: Figure) -> None:
    """One legend for all panels, at their right."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right center")


def memory_bars(axes: Axes, rows: Sequence[Row]) -> None:
    sizes = [row["bytes"]["peak"] / 2**20 for row in rows]
    bars(axes, rows, [{"p20": s, "median": s, "p80": s} for s in sizes], "{:.1f}")
    axes.set_xlabel("peak MiB of a step, above what is resident")
    axes.set_yticklabels([])


def bars(axes: Axes, rows: Sequence[Row], values: Sequence[Row], form: str) -> None:
    """One bar per provider from above, its spread as a whisker, its median in figures beside it."""
    medians = [q["median"] for q in values]
    spread = [[q["median"] - q["p20"] for q in values], [q["p80"] - q["median"] for q in values]]
    places = range(len(rows), 0, -1)
    axes.barh(places, medians, color=[COLORS[row["provider"]] for row in rows], height=0.7)
    axes.errorbar(medians, places, xerr=spread, fmt="none", ecolor="#222222")
    widest = max(q["p80"] for q in values)
    for place, q in zip(places, values, strict=True):
        axes.text(q["p80"] + 0.015 * widest, place, form.format(q["median"]), va="center")
    axes.set_xlim(0, 1.12 * widest)
    axes.set_yticks(places, [row["label"] for row in rows])
    axes.set_axisbelow(True)
