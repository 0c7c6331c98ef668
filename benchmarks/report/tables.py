"""Tables of the suites' rows, for terminals and for Markdown, and the sentences under them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bases import BASES
from ..data_sheets import Sheet
from ..records import machine
from ..suites import cost
from ..suites import estimate as estimates
from ..suites.layer import PASSES
from . import text as texts

Row = dict[str, Any]
NONE = "–"
COLUMNS = 3  # baselines that a table has room for: the first ones; the others stand in the record


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of cells, and lines to stand under them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)

    def text(self) -> str:
        return "\n".join([texts.table(self.title, self.header, self.rows), *self.notes])

    def markdown(self) -> str:
        aligned = ["---", *("---:" for _ in self.header[1:])]
        lines = [self.header, aligned, *self.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join([f"**{self.title}**", body, *self.notes])


def of(rows: Sequence[Row]) -> list[Table]:
    """Every table that the rows make, those of one suite together."""
    makers: dict[str, Callable[[Sequence[Row]], list[Table]]] = {
        "layer": _layer,
        "overhead": _overhead,
        "memory": _memory,
        "model": _model,
        "experts": _experts,
        "cost": _cost,
    }
    return [table for suite, some in grouped(rows, "suite") for table in makers[suite](some)]


def grouped(rows: Iterable[Row], *paths: str | Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by what stands at dotted paths, in order of appearance; one path gives a bare key."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(at(row, path) if isinstance(path, str) else path(row) for path in paths)
        groups.setdefault(key if len(paths) > 1 else key[0], []).append(row)
    return list(groups.items())


def at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where it leads nowhere."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def types_of(row: Row) -> str:
    """The compute type, and the storage of frozen weights in few bits."""
    dtype, weight = at(row, "types.compute"), at(row, "types.weight")
    return f"{dtype} over {weight}" if weight in BASES else str(dtype)


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows with figures."""
    return [row for row in rows if "left_out" not in row]


def left_out(rows: Sequence[Row]) -> list[str]:
    """One line for each reason, with the labels that it holds for; and where, if not everywhere."""
    seen = {(row["label"], at(row, "types.compute")) for row in measured(rows)}
    somewhere = {label for label, _ in seen}
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if "left_out" not in row:
            continue
        label, dtype = row["label"], at(row, "types.compute")
        where = ""
        if (label, dtype) in seen:
            where = f" at {where_of(row['case'])}"
        elif label in somewhere:
            where = f" in {dtype}"
        reasons.setdefault(row["left_out"], {})[f"{label}{where}"] = None
    return [f"Left out: {'; '.join(labels)} ({reason})." for reason, labels in reasons.items()]


def where_of(case: Mapping[str, Any]) -> str:
    """A case in a few words."""
    if "width" in case:
        return f"{case['depth']} x {case['width']}, {case['tokens']} tokens"
    if "top_k" in case:
        return _experts_of(case)
    if "model" in case:
        checkpointing = ", checkpointing" if case["checkpointing"] else ""
        return f"{case['model']}, {case['targets']}{checkpointing}"
    more = [str(case[name]) for name in ("part", "transform") if name in case]
    shape = f"{case['tokens']}x{case['in_features']}x{case['out_features']}"
    return ", ".join([shape, *more])


def provenance(rows: Sequence[Row]) -> str:
    """The machine, versions and commit of one run's rows, in a sentence."""
    found = rows[0]["environment"]
    versions = found["versions"]
    names = [name for name in ("torch", "triton", "peft") if versions.get(name)]
    commit = f"commit {found['commit'][:10]}" if found["commit"] else "no commit known"
    if found["dirty"]:
        commit += " with uncommitted changes"
    where = found["device_name"]
    if found["device"] == "cpu":
        threads = found["threads"]
        where += f", {threads} thread{'s' if threads > 1 else ''} of {found['cpu_count']} CPUs"
    else:
        where += f", driver {found['driver']}, CUDA {found['cuda']}"
    busy = found.get("other_programs_share")
    if busy is not None:
        where += f", other programs at {100 * busy:.0f} %"
    software = ", ".join(f"{name} {versions[name]}" for name in names)
    return f"Measured on {where}; {software}; {commit}; {found['date'][:10]}."


# One maker for each suite


def _layer(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (tokens, K, O, r, dtype), some in grouped(
        rows, "case.tokens", "case.in_features", "case.out_features", "case.r", types_of
    ):
        baselines = _baselines(some)
        tables.append(
            Table(
                f"Layer: {tokens} tokens, {K} → {O}, r {r}, {dtype}; "
                "milliseconds, medians (p20–p80)",
                [
                    "",
                    *PASSES,
                    *(f"step / {label}" for label in baselines.values()),
                    "TFLOP/s",
                    "of the floor",
                    "peak MiB",
                ],
                [
                    [
                        row["label"],
                        _milliseconds(row, "forward", spread=False),
                        _milliseconds(row, "backward", spread=False),
                        _milliseconds(row, "step"),
                        *(_versus(row, name) for name in baselines),
                        _rate(row),
                        _percent(at(row, "floor_share.step.median")),
                        _mebibytes(at(row, "bytes.peak")),
                    ]
                    for row in measured(some)
                ],
                [_types(some), *_graph_note(some)],
            )
        )
    return tables


def _overhead(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (r, dtype), some in grouped(rows, "case.r", "types.compute"):
        baselines = _baselines(some)
        tables.append(
            Table(
                f"Host time of a call on 16x16 tensors, r {r}, {dtype}; microseconds, medians",
                ["", *PASSES, *(f"step / {label}" for label in baselines.values())],
                [
                    [
                        row["label"],
                        *(_microseconds(at(row, f"seconds.{one}.median")) for one in PASSES),
                        *(_versus(row, name) for name in baselines),
                    ]
                    for row in measured(some)
                ],
                [_types(some), *_graph_note(some)],
            )
        )
    return tables


def _memory(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (tokens, width, r, dtype), some in grouped(
        rows, "case.tokens", "case.width", "case.r", types_of
    ):
        depths = list(dict.fromkeys(row["case"]["depth"] for row in some))
        deepest = depths[-1]
        body = []
        for name, own in grouped(measured(some), "provider"):
            by_depth = {row["case"]["depth"]: row for row in own}
            last = by_depth.get(deepest)
            body.append(
                [
                    own[0]["label"] if name else "",
                    own[0]["types"]["adapter"],
                    _mebibytes(at(last or {}, "bytes.saved")),
                    _mebibytes(at(last or {}, "bytes.saved_by_theory")),
                    *(_mebibytes(at(by_depth.get(depth, {}), "bytes.peak")) for depth in depths),
                ]
            )
        tables.append(
            Table(
                f"Memory of a stack of {width}x{width} layers, {tokens} tokens, r {r}, {dtype}; "
                "MiB above what is resident",
                [
                    "",
                    "adapters",
                    f"kept after forward, {deepest} layers",
                    "by theory",
                    *(f"step's peak, {depth}" for depth in depths),
                ],
                body,
            )
        )
    return tables


def _model(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for some in by_setting(rows):
        baselines = _baselines(some)
        tables.append(
            Table(
                f"Training {setting_of(some[0])}",
                [
                    "",
                    "step ms",
                    "tokens/s",
                    *(f"step / {label}" for label in baselines.values()),
                    "products alone / LoRA",
                    "peak MiB",
                    "trainable",
                ],
                [
                    [
                        row["label"],
                        _milliseconds(row, "step"),
                        f"{row['tokens_per_second']['median']:,.0f}",
                        *(_versus(row, other) for other in baselines),
                        _number(at(row, "counts.products_over_lora")),
                        _mebibytes(at(row, "bytes.peak")),
                        f"{row['counts']['trainable']:,}",
                    ]
                    for row in measured(some)
                ],
                [_types(some)],
            )
        )
    return tables


def _experts(rows: Sequence[Row]) -> list[Table]:
    tables = []
    keys = ("tokens", "experts", "top_k", "hidden", "intermediate", "r")
    for (*_, r, dtype), some in grouped(rows, *(f"case.{key}" for key in keys), "types.compute"):
        baselines = _baselines(some)
        tables.append(
            Table(
                f"{_experts_of(some[0]['case'])}, r {r}, {dtype}; a step",
                ["", "ms", *(f"/ {label}" for label in baselines.values()), "peak MiB",
                 "above frozen", "kept above frozen"],
                [
                    [
                        row["label"],
                        _milliseconds(row, "step"),
                        *(_versus(row, other) for other in baselines),
                        *(
                            _mebibytes(at(row, f"bytes.{key}"))
                            for key in ("peak", "peak_above", "saved_above")
                        ),
                    ]
                    for row in measured(some)
                ],
                [_types(some)],
            )
        )  # fmt: skip
    return tables


def _experts_of(case: Mapping[str, Any]) -> str:
    return (
        f"{case['experts']} experts, top {case['top_k']}, {case['hidden']} → "
        f"2x{case['intermediate']} → {case['hidden']}, {case['tokens']} tokens"
    )


def by_setting(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the model suite, those of one case and type together."""
    keys = ("model", "targets", "checkpointing", "blocks", "batch", "sequence", "r")
    groups = grouped(rows, *(f"case.{key}" for key in keys), types_of)
    return [some for _, some in groups]


def setting_of(row: Row) -> str:
    """The model of a row, and how it is trained."""
    case = row["case"]
    blocks = f"{case['blocks']} of {case['blocks_of']} blocks"
    if case["blocks"] == case["blocks_of"]:
        blocks = f"all {case['blocks']} blocks"
    return (
        f"{case['model']}, {case['targets']} adapted, "
        f"{'with' if case['checkpointing'] else 'without'} activation checkpointing: {blocks}, "
        f"{case['batch']} x {case['sequence']} tokens, r {case['r']}, {types_of(row)}"
    )


def _cost(rows: Sequence[Row]) -> list[Table]:
    """Three tables: a layer, the adaptation over the rank, whole models."""
    layers = [row for row in rows if row["case"]["what"] == "layer"]
    models = [row for row in rows if row["case"]["what"] == "model"]
    return [*_layer_costs(layers), *_rank_costs(layers), *_model_costs(models)]


def _layer_costs(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (tokens, K, O), some in grouped(
        rows, "case.tokens", "case.in_features", "case.out_features"
    ):
        r = some[0]["case"]["r"]
        tables.append(
            Table(
                f"By count: a training step at {tokens} tokens, {K} → {O}, r {r}, 16-bit",
                [
                    "",
                    "full products",
                    "GFLOP",
                    "/ LoRA",
                    "MB moved at least",
                    "weight-sized temporaries",
                    "trainable",
                ],
                [
                    [
                        row["label"],
                        f"{counts['forward_products']} + {counts['backward_products']}",
                        f"{counts['step_operations'] / 1e9:.2f}",
                        f"{counts['step_over_lora']:.2f}",
                        f"{counts['step_bytes'] / 1e6:.1f}",
                        str(counts["temporaries"]),
                        f"{counts['trainable']:,}",
                    ]
                    for row in some
                    if row["case"]["r"] == r
                    for counts in [row["counts"]]
                ],
                [
                    "Bytes and temporaries of HUT are those of its fused kernels. Where the "
                    "planner stages W, with many tokens or on a CPU, one temporary more is written "
                    "and read in each direction: `explain` has the plan's own numbers.",
                    "HUT's third full product makes its training step dearer than LoRA's; full "
                    "fine-tuning has the same three, and an optimizer state of the weight's size.",
                ],
            )
        )
    return tables


def _rank_costs(rows: Sequence[Row]) -> list[Table]:
    if not rows:
        return []
    ranks = sorted({row["case"]["r"] for row in rows})
    body = []
    for _, some in grouped(rows, "provider"):
        by_rank = {row["case"]["r"]: row["counts"]["adaptation_per_weight"] for row in some}
        if by_rank[ranks[0]] is not None and not some[0]["provider"].endswith("_eager"):
            body.append([some[0]["label"], *(str(by_rank[r]) for r in ranks)])
    return [
        Table(
            "By count: operations per weight that adapt a weight, over the rank",
            ["", *(f"r {r}" for r in ranks)],
            body,
            [
                "This is the saving of HUT's paper: its two-sided form adapts a weight with 2 "
                "multiplications whatever the rank is. Beside the full products of a training step "
                "(twice the number of tokens for each weight, each) it is small."
            ],
        )
    ]


def _model_costs(rows: Sequence[Row]) -> list[Table]:
    return [_model_cost(some) for _, some in grouped(rows, "case.tokens", "case.r")]


def _model_cost(rows: Sequence[Row]) -> Table:
    body = []
    paths = ("case.model", "case.targets", "case.checkpointing")
    for (name, targets, checkpointing), some in grouped(rows, *paths):
        by = {row["provider"]: row["counts"] for row in some if row["case"] == some[0]["case"]}
        hut = by["hut_low_rank"]
        body.append(
            [
                name,
                targets,
                "yes" if checkpointing else "no",
                _percent(hut["adapted_share"]),
                f"{hut['third_product_alone']:.2f}",
                f"{hut['step_over_lora']:.2f}",
                *(f"{by[other]['step_over_lora']:.2f}" for other in OTHERS),
            ]
        )
    labels = [f"{cost.METHODS[name].label} / LoRA" for name in OTHERS]
    case = rows[0]["case"]
    return Table(
        f"By count: a step of a model's linear layers over LoRA's, {case['tokens']} tokens, "
        f"r {case['r']}",
        [
            "",
            "adapted",
            "checkpointing",
            "f",
            "(2 + c + f) / (2 + c)",
            "HUT low_rank / LoRA",
            *labels,
        ],
        body,
        ["Full fine-tuning trains every layer, whichever are adapted."],
    )


def estimate(
    found: Sequence[estimates.Estimate], request: estimates.Request, sheet: Sheet, model: str
) -> Table:
    """Memory and time of a training step by each method on a GPU."""
    parts = ("weights", "adapters", "gradients", "optimizer", "kept", "workspace", "total")
    full = (sheet.memory - estimates.RESERVED) * estimates.GIB
    notes = [
        "GiB at a step's peak; what is kept goes as gradients come, so parts may exceed the total. "
        f"Fits: with {estimates.RESERVED:g} GiB for CUDA, into {sheet.memory:g}.",
        estimates.FORMULA,
    ]
    if not sheet.has_kernels:
        notes.append(f"{sheet.name} ({sheet.arch}) runs none of HUT's kernels: PyTorch path.")
    again = ", checkpointing" if request.checkpointing else ""
    return Table(
        f"ESTIMATE: {model}, {request.targets} adapted, r {request.r}, {request.base} base, "
        f"{request.batch} x {request.sequence} tokens{again}, on {sheet.name}",
        [
            "", "trained", "weights", "adapters", "gradients", "optimizer", "kept for backward",
            "workspace", "total", "fits", "step ms, ESTIMATE", "tokens/s, ESTIMATE",
        ],
        [
            [
                one.label,
                f"{one.trained / 1e6:,.1f} M",
                *(f"{getattr(one, part) / estimates.GIB:.2f}" for part in parts),
                "yes" if one.total <= full else "NO",
                f"{1e3 * one.seconds:.0f}",
                f"{request.tokens / one.seconds:,.0f}",
            ]
            for one in found
        ],
        notes,
    )  # fmt: skip


OTHERS = ("hut_two_sided", "peft_hira", "full")


# Short forms, for README.md and docs/


def brief(layers: Sequence[Row], memory: Sequence[Row]) -> Table:
    """Time and memory of each provider in four columns.

    The time is that of the largest weight, with the fewest tokens and with the most, over PEFT's
    LoRA; the memory that of the deepest stack in the same type.
    """
    layers = measured(layers)
    largest = max(layers, key=lambda row: row["case"]["in_features"] * row["case"]["out_features"])
    K, O, r = (largest["case"][key] for key in ("in_features", "out_features", "r"))
    dtype = largest["types"]["compute"]
    same = ("case.in_features", "case.out_features", "case.r", "types.compute")
    (own,) = (some for key, some in grouped(layers, *same) if key == (K, O, r, dtype))
    tokens = sorted({row["case"]["tokens"] for row in own})
    times = {(row["provider"], row["case"]["tokens"]): row for row in own}
    stacks = [row for row in measured(memory) if row["types"]["compute"] == dtype]
    deepest = max(stacks, key=lambda row: row["case"]["depth"])["case"]
    sizes = {row["provider"]: row for row in stacks if row["case"] == deepest}
    stack = f"{deepest['depth']} layers {deepest['width']}x{deepest['width']}"
    return Table(
        f"Step of a layer {K} → {O} over that of LoRA (PEFT), median (p20–p80), below 1 is faster; "
        f"MiB of {stack}, {deepest['tokens']} tokens; {dtype}, r {r}",
        ["", *(f"step, {n} tokens" for n in (tokens[0], tokens[-1])), "kept for backward", "peak"],
        [
            [
                label,
                *(_versus(times.get((name, n), {}), "peft_lora") for n in (tokens[0], tokens[-1])),
                *(_mebibytes(at(sizes.get(name, {}), f"bytes.{one}")) for one in ("saved", "peak")),
            ]
            for name, label in {row["provider"]: row["label"] for row in own}.items()
        ],
    )


def all_wins(rows: Sequence[Row], ours: str = "hut_low_rank") -> str:
    """`who_wins` against every baseline of the rows but graphs."""
    names = dict.fromkeys(name for row in measured(rows) for name in row["versus"])
    others = [name for name in names if name != ours and not name.endswith("_graph")]
    return " ".join(who_wins(rows, ours, other) for other in others)


def who_wins(rows: Sequence[Row], ours: str, theirs: str) -> str:
    """Counts where one provider's step is faster than another's, and the reverse, with ratios.

    Raises:
        ValueError: The rows do not compare the two.
    """
    found = [at(row, f"versus.{theirs}.step") for row in measured(rows) if row["provider"] == ours]
    quantiles = [q for q in found if q is not None]
    if not quantiles:
        raise ValueError(f"no row compares {ours} with {theirs}: measure it with --baseline")
    labels = {row["provider"]: row["label"] for row in rows}
    us, them = labels[ours], labels[theirs]
    slower = [q["median"] for q in quantiles if q["p20"] > 1]
    faster = [q["median"] for q in quantiles if q["p80"] < 1]
    level = len(quantiles) - len(slower) - len(faster)
    where = _configurations(len(quantiles))
    parts = []
    if slower:
        parts.append(
            f"{them} is faster in {where(len(slower))} ({us} takes {_span(slower)} as long)"
        )
    if faster:
        parts.append(
            f"{us} is faster than {them} in {where(len(faster))} (it takes {_span(faster)} as long)"
        )
    if level:
        parts.append(f"{us} and {them} differ by less than the spread in {where(level)}")
    return f"{'; '.join(parts)}."


def _configurations(total: int) -> Callable[[int], str]:
    def words(count: int) -> str:
        if total == 1:
            return "the one configuration measured"
        some = f"all {total}" if count == total else f"{count} of {total}"
        return f"{some} configurations"

    return words


def _span(medians: Sequence[float]) -> str:
    low, high = (f"{x:.2f}" if x < 1.1 else f"{x:.1f}" for x in (min(medians), max(medians)))
    return f"{low}×" if low == high else f"{low}–{high}×"


def by_machine(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one machine together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(machine(row["environment"]).values()), []).append(row)
    return list(groups.values())


# Cells


def _baselines(rows: Sequence[Row]) -> dict[str, str]:
    """The providers that these rows are compared with, and their labels."""
    labels = {row["provider"]: row["label"] for row in rows}
    names = dict.fromkeys(
        name.removesuffix("_graph") for row in measured(rows) for name in row.get("versus", {})
    )
    return {name: labels.get(name, name) for name in list(names)[:COLUMNS]}


def _types(rows: Sequence[Row]) -> str:
    """In which types the adapters are."""
    by: dict[str, dict[str, None]] = {}
    for row in measured(rows):
        by.setdefault(row["types"]["adapter"], {})[row["label"]] = None
    most = max(by, key=lambda dtype: len(by[dtype]))
    others = [f"; in {dtype}: {', '.join(names)}" for dtype, names in by.items() if dtype != most]
    autocast = at(rows[0], "types.autocast")
    return f"Adapters in {most}{''.join(others)}. {autocast or 'No'} autocast."


def _graph_note(rows: Sequence[Row]) -> list[str]:
    """A note on graphs, where there are any."""
    if not any(name.endswith("_graph") for row in rows for name in row.get("versus", {})):
        return []
    return ["The ratios of a graph are to the other method's graph, not to its eager step."]


def _milliseconds(row: Row, one: str, spread: bool = True) -> str:
    q = at(row, f"seconds.{one}")
    if q is None:
        return NONE
    return _quantiles(q, 1e3) if spread else _significant(1e3 * q["median"])


def _microseconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{1e6 * seconds:.0f}"


def _versus(row: Row, baseline: str) -> str:
    q = at(row, f"versus.{baseline}.step") or at(row, f"versus.{baseline}_graph.step")
    return NONE if q is None else texts.ratio(q)


def _quantiles(q: Mapping[str, float], scale: float) -> str:
    p20, median, p80 = (_significant(scale * q[key]) for key in ("p20", "median", "p80"))
    return f"{median} ({p20}–{p80})" if q["p20"] < q["p80"] else median


def _rate(row: Row) -> str:
    operations, seconds = at(row, "operations.step"), at(row, "seconds.step.median")
    return NONE if not operations or not seconds else _significant(operations / seconds / 1e12)


def _significant(value: float) -> str:
    """Three digits, without an exponent."""
    return (
        f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
        if value >= 0.1
        else f"{value:.3f}"
    )


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"


def _mebibytes(size: int | None) -> str:
    return NONE if size is None else f"{size / 2**20:.1f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
