"""Fine-tunes' records: tables of the methods and of their learning rates, and what these say."""

import statistics
from collections.abc import Sequence
from typing import Any

from .tables import Table
from .text import mebibytes

Row = dict[str, Any]
NAMES = {  # of the metrics, each of which is shown a hundredfold
    "accuracy": "accuracy in %",
    "matthews": "Matthews correlation × 100",
    "pearson": "Pearson correlation × 100",
    "bleu": "BLEU",
}
# Student's t for 95 %, by the number of values: with three, the normal's 1.96 would flatter.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
# Methods that are given LoRA's rate, and those with the same function whose rate is their own.
OF_LORAS_RATE = {"hut_low_rank_scaled": "hut_low_rank", "hut_paper_grouped": "hut_paper"}
NEAR = 3.4  # a rung of a ladder of 1 and 3


def interval(values: Sequence[float]) -> Row:
    """Mean of the seeds' values and half the width of its 95 % interval, None for one seed."""
    n, margin = len(values), None
    if n > 1:
        margin = T95.get(n, 2.262) * statistics.stdev(values) / n**0.5
    return {"mean": statistics.fmean(values), "margin": margin, "values": list(values)}


def tables(record: Row) -> list[Table]:
    """The methods at their best rates, and the loss at every rate."""
    metric, rows = record["metric"], record["methods"]
    lora = _named(rows, "lora")
    best = Table(
        f"At the rate that is best on the validation part; {NAMES[metric]} and loss on the test "
        f"part, with 95 % intervals over {len(lora['runs'])} seeds",
        ["", "r", "rate", "over LoRA's", NAMES[metric], "loss", "peak MiB"],
        [
            [
                row["label"],
                "–" if row["r"] is None else str(row["r"]),
                f"{row['rate']:g}",
                "–" if row["r"] is None else f"{row['rate'] / lora['rate']:.3g}",
                _shown(row[metric], 100, 1),
                _shown(row["loss"], 1, 3),
                mebibytes(row["peak_bytes"]) if row.get("peak_bytes") else "–",
            ]
            for row in rows
        ],
    )
    swept = [row for row in rows if row["r"] is not None]
    rates = sorted({one["rate"] for row in swept for one in row["sweep"]})
    sweep = Table(
        "Loss on the validation part at each rate (* the best); one seed where no interval stands",
        ["", *(f"{rate:g}" for rate in rates)],
        [[row["label"], *_losses(row, rates)] for row in swept],
    )
    return [best, sweep]


def _losses(row: Row, rates: Sequence[float]) -> list[str]:
    found = {one["rate"]: one["validation"]["loss"] for one in row["sweep"]}
    return [
        _shown(found[rate], 1, 3) + ("*" if rate == row["rate"] else "") if rate in found else "–"
        for rate in rates
    ]


def sentences(record: Row) -> list[str]:
    """Sentences on LoRA's learning rate, given to each method that is made for it.

    Only of a sweep, in which every method was trained at the same rates.
    """
    if not record["recipe"].get("rates"):
        return []
    rows = {row["method"]: row for row in record["methods"]}
    return [line for name in OF_LORAS_RATE for line in _on_rates(rows, name)]


def _on_rates(rows: Row, name: str) -> list[str]:
    mine, lora, plain = rows[name], rows["lora"], rows[OF_LORAS_RATE[name]]
    given, own, own_plain = (row["rate"] for row in (lora, mine, plain))
    ratio, plains = f"{own / given:.3g}", f"{own_plain / given:.3g}"
    near = "" if 1 / NEAR <= own / given <= NEAR else ", MORE than a factor of 3"
    at_loras, at_own, over_plain = (
        _told(difference(mine, rate, other, others))
        for rate, other, others in (
            (given, lora, given),
            (own, lora, given),
            (own, plain, own_plain),
        )
    )
    label, others = mine["label"], plain["label"]
    return [
        f"{label} at LoRA's best rate, {given:g}: validation loss less LoRA's there {at_loras}.",
        f"{label} at its own best rate, {own:g}, {ratio} times LoRA's{near}: loss less LoRA's best "
        f"{at_own}; less the best of {others}, at {own_plain:g}, {plains} times LoRA's rate, "
        f"{over_plain}.",
    ]


def difference(one: Row, rate: float, other: Row, others_rate: float) -> Row:
    """Validation losses of one method less those of another, paired by seed."""
    a, b = (
        next(o["validation"]["loss"]["values"] for o in row["sweep"] if o["rate"] == at)
        for row, at in ((one, rate), (other, others_rate))
    )
    return interval([x - y for x, y in zip(a, b, strict=True)])


def _told(q: Row) -> str:
    """A difference with its interval, and what that tells."""
    if q["margin"] is None:
        return f"{q['mean']:+.3f} (one seed, no interval)"
    word = "HIGHER" if q["mean"] > 0 else "lower"
    if abs(q["mean"]) <= q["margin"]:
        word = "not told apart"
    return f"{q['mean']:+.3f} ± {q['margin']:.3f} ({word})"


def _named(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row["method"] == name)


def _shown(q: Row, times: float, digits: int) -> str:
    margin = "" if q["margin"] is None else f" ± {times * q['margin']:.{digits}f}"
    return f"{times * q['mean']:.{digits}f}{margin}"
