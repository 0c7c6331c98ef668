"""The project's targets on a GPU (bf16, r 16, adapters float32), and what records say of each."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure import FEWEST
from ..providers import PROVIDERS
from .tables import NONE, Table, at, grouped, measured, where_of

Row = dict[str, Any]
MET, MISSED, UNDECIDED, UNMEASURED = "met", "MISSED", "within the spread", "not measured"


@dataclass(frozen=True)
class Target:
    """A limit for the ratio of two providers' figures, on every case that it is meant for.

    Attributes:
        suite: Of which records.
        place: Its cases, in words.
        where: What a case's numbers may be.
        over, under: Whose figure is divided by whose.
        limit: What the ratio may be.
        least: Whether it is the least that it may be; else the most.
        figure: `"step"`, whose spread counts, or a count of bytes.
        workspace: Whether one weight in the compute type is added to the divisor.
    """

    suite: str
    place: str
    where: Mapping[str, Container[Any]]
    over: str
    under: str
    limit: float
    least: bool = False
    figure: str = "step"
    workspace: bool = False

    @property
    def words(self) -> str:
        """The ratio in words."""
        figure = {"step": "step", "saved": "kept for backward", "peak": "peak memory"}[self.figure]
        more = " and one weight" if self.workspace else ""
        labels = (PROVIDERS[name].label for name in (self.over, self.under))
        return f"{self.suite}, {figure}: {' / '.join(labels)}{more}"

    @property
    def bound(self) -> str:
        return f"{'>=' if self.least else '<='} {self.limit:g}"

    def meant_for(self, row: Row) -> bool:
        """Whether a row is one of its cases, whoever provides it."""
        return (
            row["suite"] == self.suite
            and at(row, "types.compute") == "bfloat16"
            and row["case"]["r"] == 16
            and all(row["case"][key] in allowed for key, allowed in self.where.items())
        )


def _layer(K: int, tokens: range) -> dict[str, Any]:
    """Square layers; where a range ends at `_ANY` there is no upper bound."""
    most = f"to {tokens[-1]}" if tokens.stop < _ANY else "and more"
    place = f"{K} → {K}, {tokens[0]} tokens{f' {most}' if len(tokens) > 1 else ''}"
    where = {"in_features": [K], "out_features": [K], "tokens": tokens}
    return {"suite": "layer", "place": place, "where": where}


_ANY = 1 << 40
_MANY, _SHORT = _layer(4096, range(4096, _ANY)), _layer(4096, range(512, 513))
_SMALL = _layer(1024, range(1, 2049))
_STACK: dict[str, Any] = {
    "suite": "memory",
    "place": "4 layers 4096x4096 and more",
    "where": {"width": [4096], "depth": range(4, _ANY)},
}
_ROBERTA: dict[str, Any] = {
    "suite": "model",
    "place": "roberta-large, query+value, all blocks",
    "where": {"model": ["roberta-large"], "targets": ["query+value"], "blocks": [24]},
}
HUT, LORA, PEFT = "hut_low_rank", "lora", "peft_lora"
TARGETS = (
    Target(**_MANY, over=HUT, under=PEFT, limit=1.3),
    Target(**_MANY, over=HUT, under=LORA, limit=1.55),
    Target(**_MANY, over="peft_hira_cast", under=HUT, limit=1.6, least=True),
    Target(**_SHORT, over="hut_low_rank_eager_compiled", under=HUT, limit=1.3, least=True),
    Target(**_SMALL, over="hut_low_rank_graph", under="lora_graph", limit=1.5),
    Target(**_SMALL, over=HUT, under=PEFT, limit=1.1),
    Target(**_STACK, over=HUT, under=PEFT, limit=1, figure="saved"),
    Target(**_STACK, over=HUT, under=PEFT, limit=1, figure="peak"),
    # "Equal", but for what an allocator rounds.
    Target(**_STACK, over=HUT, under=LORA, limit=1.02, figure="peak", workspace=True),
    # The time of PEFT's step over ours is our tokens a second over PEFT's.
    Target(**_ROBERTA, over=PEFT, under=HUT, limit=0.95, least=True),
    Target(**_ROBERTA, over=HUT, under=PEFT, limit=1, figure="peak"),
)


def table(rows: Sequence[Row], suites: Sequence[str] = ("layer", "memory", "model")) -> Table:
    """Every target of some suites: a line for each case in the rows, or that there is none."""
    runs = grouped(measured(rows), "environment.device_name", "environment.date")
    body = []
    for target in TARGETS:
        if target.suite not in suites:
            continue
        found = [line for _, run in runs for line in _lines(target, run)]
        body += found or [[target.words, target.bound, target.place, NONE, UNMEASURED]]
    return Table(
        "Targets on a GPU: bfloat16, r 16, adapters in float32; ratios, medians (p20–p80)",
        ["", "limit", "at", "ratio", "verdict"],
        body,
        ["Met or missed: the whole of p20 to p80 lies on that side of the limit."],
    )


def _lines(target: Target, run: Sequence[Row]) -> Iterator[list[str]]:
    """One run's lines of a target."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in run:
        if at(row, "environment.device") == "cuda" and target.meant_for(row):
            cases.setdefault(tuple(row["case"].items()), {})[row["provider"]] = row
    for case, by in cases.items():
        q = ratio(target, by)
        if q is not None:
            shown = f"{q['median']:.2f} ({q['p20']:.2f}–{q['p80']:.2f})"
            yield [target.words, target.bound, where_of(dict(case)), shown, verdict(target, q)]


def ratio(target: Target, by: Mapping[str, Row]) -> Mapping[str, float] | None:
    """The ratio on one case with its spread; None where it is not measured."""
    over, under = by.get(target.over), by.get(target.under)
    if target.figure == "step":
        q = at(over or {}, f"versus.{target.under}.step")
        return q or inverse(at(under or {}, f"versus.{target.over}.step"))
    a, b = (at(row or {}, f"bytes.{target.figure}") for row in (over, under))
    if not a or not b:
        return None
    if target.workspace:
        b += over["case"]["width"] ** 2 * 2
    return {"p20": a / b, "median": a / b, "p80": a / b, "samples": FEWEST}  # it has no spread


def inverse(q: Mapping[str, float] | None) -> dict[str, float] | None:
    """The quantiles of the ratio the other way round."""
    if q is None:
        return None
    p20, median, p80 = (1 / q[key] for key in ("p80", "median", "p20"))
    return {"p20": p20, "median": median, "p80": p80, "samples": q["samples"]}


def verdict(target: Target, q: Mapping[str, float]) -> str:
    """Which side of the limit the ratio is on, if its spread and its samples can tell."""
    if q["samples"] < FEWEST:
        return f"{UNDECIDED}: {q['samples']} samples"
    low, high = q["p20"], q["p80"]
    if (low >= target.limit) if target.least else (high <= target.limit):
        return MET
    if (high < target.limit) if target.least else (low > target.limit):
        return MISSED
    return UNDECIDED
