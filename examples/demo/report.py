"""The demo's tables, and plain sentences about what its numbers say: written from them only."""

from collections.abc import Sequence
from typing import Any

from benchmarks.report.text import mebibytes, milliseconds, ratio, table

Row = dict[str, Any]
MERGED_LIMIT = 1e-4  # nats per byte: fp32 rounding is hundreds of times smaller


def adaptation_table(rows: Sequence[Row]) -> str:
    """The methods at their best learning rates."""
    return table(
        "Adapted to English, each at its best rate; held-out loss in nats per byte",
        ["", "r", "trainable", "rate", "held out", "merged", "step ms", "step / LoRA", "peak MiB"],
        [
            [
                row["label"],
                str(row["r"]),
                f"{row['trainable']:,}",
                f"{row['rate']:g}",
                f"{row['held_out']:.4f}",
                f"{row['merged_held_out']:.4f}",
                milliseconds(row["step"]),
                ratio(row["step_ratio"]),
                mebibytes(row["peak_bytes"]),
            ]
            for row in rows
        ],
    )


def sweep_table(rows: Sequence[Row]) -> str:
    """Every learning rate that was tried."""
    count = max(len(row["sweep"]) for row in rows)
    return table(
        "The rates tried: validation loss at the end (* the best)",
        ["", *("rate: loss" for _ in range(count))],
        [
            [
                row["label"],
                *(
                    f"{one['rate']:g}: {one['validation']:.4f}"
                    + ("*" if one["rate"] == row["rate"] else " ")
                    for one in row["sweep"]
                ),
            ]
            for row in rows
        ],
    )


def layer_sentences(rows: Sequence[Row]) -> list[str]:
    """Sentences on one shape: HUT's rows compared with all others."""
    by = {row["provider"]: row for row in rows}
    case = rows[0]["case"]
    where = f"{case['tokens']}x{case['in_features']}x{case['out_features']}"
    times = ", ".join(
        f"{row['label']} {row['versus']['frozen']['step']['median']:.2f}x"
        for row in rows
        if row != by["frozen"]
    )
    others = [name for name in rows[0]["versus"] if name != "frozen"]
    lines = [f"At {where} a step takes, against the frozen layer's: {times}."]
    for name in ("hut_low_rank", "hut_paper"):
        versus = [_versus(by[name], by[other]) for other in others]
        lines.append(f"There {by[name]['label']} is {', '.join(versus)}.")
    memory = ", ".join(f"{by[name]['label']} {_peak(by[name])}" for name in others)
    fused = by["hut_low_rank"]
    lines.append(
        f"{fused['label']} holds {_peak(fused)} MiB at the step's peak above what is resident; "
        f"{memory}."
    )
    return lines


def _peak(row: Row) -> str:
    return mebibytes(row["bytes"]["peak"])


def _versus(row: Row, other: Row) -> str:
    """A comparison of two steps; level where p20 to p80 of the ratio holds 1."""
    q, label = row["versus"][other["provider"]]["step"], other["label"]
    if q["p20"] <= 1 <= q["p80"]:
        return f"level with {label} within the spread ({q['p20']:.2f}–{q['p80']:.2f}x its time)"
    word = "faster" if q["median"] < 1 else "slower"
    return f"{word} than {label} ({q['median']:.2f}x its time)"


def adaptation_sentences(rows: Sequence[Row], frozen: float) -> list[str]:
    """Sentences on the training."""
    by = {row["method"]: row for row in rows}
    ends = ", ".join(f"{row['label']} at {row['held_out']:.4f}" for row in rows)
    counts = sorted({row["trainable"] for row in rows})
    same = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    lines = [
        f"The frozen model reads the held-out English at {frozen:.4f} nats per byte; with {same} "
        f"trainable parameters it ends with {ends}."
    ]
    others = [row for row in rows if row["method"] != "lora"]
    lines += [_loss_sentence(row, by["lora"]) for row in others]
    lines += [_cost_sentence(row, by["lora"]) for row in others]
    lines += [_edge_sentence(row) for row in rows if row["on_edge"]]
    worst = max(row["merged_difference"] for row in rows)
    lines.append(
        f"Merging changes no window's loss by more than {worst:.1e}."
        if worst <= MERGED_LIMIT
        else f"A merged model's loss DIFFERS from the adapted one's, by up to {worst:.1e}."
    )
    lines.append(
        "One seed of one small model: what HUT costs and whether it learns, not how it ranks."
    )
    return lines


def _loss_sentence(row: Row, lora: Row) -> str:
    gap = row["held_out_minus_baseline"]
    mean, error = gap["mean"], gap["standard_error"]
    verdict = "lower than LoRA's" if mean < 0 else "higher than LoRA's"
    if not abs(mean) > 2 * error:
        verdict = "not told apart from LoRA's"
    return (
        f"{row['label']}'s loss is {verdict} ({mean:+.4f}, standard error {error:.4f} over the "
        f"windows), at {row['rate'] / lora['rate']:.1f} times its learning rate."
    )


def _cost_sentence(row: Row, lora: Row) -> str:
    memory = row["peak_bytes"] / max(1, lora["peak_bytes"])
    return (
        f"{row['label']}'s training step takes {row['step_ratio']['median']:.2f}x LoRA's time and "
        f"{memory:.2f}x its peak memory."
    )


def _edge_sentence(row: Row) -> str:
    return (
        f"The best rate of {row['label']}, {row['rate']:g}, is at the edge of its sweep: "
        "a better one may lie beyond (--rate-scale moves the sweeps)."
    )


def cut_sentences(what: str, done: int, planned: int) -> list[str]:
    """A word where the machine was too slow for a whole training."""
    if done >= planned:
        return []
    return [
        f"The time for {what} was up after {done} of {planned} steps: the losses would be lower "
        "on a faster machine."
    ]
