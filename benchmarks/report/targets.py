"""The project's targets: limits for ratios of times and of memory, and the verdict of records."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bases import BASES, DENSE
from ..measure import FEWEST
from ..providers import PROVIDERS
from ..records import busy
from .tables import NONE, Table, at, grouped, measured, where_of

Row = dict[str, Any]
MET, MISSED, UNDECIDED, UNMEASURED = "met", "MISSED", "within the spread", "not measured"
BUSY = "not judged: busy machine"
# Divisors that are no provider's figure.
PRODUCTS, WEIGHT, LIBRARY = "products", "weight", "library"
FIGURES = {
    "forward": "forward",
    "step": "step",
    "saved": "kept for backward",
    "peak": "peak memory",
    "resident": "resident high-water mark",
    "peak_above": "peak memory above the frozen experts'",
    "dequantize": "W0 from its codes",
}
_LABELS = {
    PRODUCTS: "its plain products",
    WEIGHT: "one weight",
    LIBRARY: "bitsandbytes' own",
    "plain": "the product without T",
}


@dataclass(frozen=True)
class Target:
    """A limit for the ratio of two providers' figures, on every case that it is meant for.

    Attributes:
        suite: Of which records.
        place: Its cases, in words.
        where: Allowed values of a case; `dtype` is the compute type.
        over, under: Whose figure is divided by whose; `under` may be `PRODUCTS`, `WEIGHT` or
            `LIBRARY` too.
        limit: Bound of the ratio.
        least: Whether it is the least that the ratio may be; else the most.
        figure: A key of `FIGURES`.
        workspace: Whether one weight in the compute type is added to the divisor.
        device: `"cuda"` or `"cpu"`.
        base: How the frozen weights are stored, of `bases.BASES`.
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
    device: str = "cuda"
    base: str = DENSE

    @property
    def words(self) -> str:
        """The ratio in words."""
        more = " and one weight" if self.workspace else ""
        more += f", over {self.base}" if self.base != DENSE else ""
        labels = (
            _LABELS.get(name) or (PROVIDERS[name].label if name in PROVIDERS else name)
            for name in (self.over, self.under)
        )
        return f"{self.suite}, {FIGURES[self.figure]}: {' / '.join(labels)}{more}"

    @property
    def bound(self) -> str:
        return f"{'>=' if self.least else '<='} {self.limit:g}"

    def meant_for(self, row: Row) -> bool:
        """True for a row of one of its cases, whoever provides it."""
        case = {**row["case"], "dtype": at(row, "types.compute")}
        stored = at(row, "types.weight")
        return (
            row["suite"] == self.suite
            and at(row, "environment.device") == self.device
            and self.base == (stored if stored in BASES else DENSE)
            and all(case.get(key) in allowed for key, allowed in self.where.items())
        )

    def ratio(self, by: Mapping[str, Row]) -> Mapping[str, float] | None:
        """The ratio on one case with its spread, from rows by provider; None if not measured."""
        over, under = by.get(self.over, {}), by.get(self.under, {})
        if self.under == LIBRARY:
            return at(over, f"{self.figure}.over_library")
        if self.figure not in ("step", "forward"):
            return self._bytes_ratio(over, under)
        if self.under == PRODUCTS:
            return _inverse(at(over, f"floor_share.{self.figure}"))
        q = at(over, f"versus.{self.under}.{self.figure}")
        return (
            q
            or _inverse(at(under, f"versus.{self.over}.{self.figure}"))
            or _quotient(*(at(row, f"seconds.{self.figure}") for row in (over, under)))
        )

    def _bytes_ratio(self, over: Row, under: Row) -> Mapping[str, float] | None:
        weight = 0
        if over and (self.under == WEIGHT or self.workspace):
            weight = over["case"]["width"] ** 2 * (
                4 if "float32" in over["types"]["compute"] else 2
            )
        a = at(over, f"bytes.{self.figure}")
        b = weight if self.under == WEIGHT else at(under, f"bytes.{self.figure}")
        if not a or not b:
            return None
        value = a / (b + (weight if self.workspace else 0))
        return {"p20": value, "median": value, "p80": value, "samples": FEWEST}  # it has no spread

    def verdict(self, q: Mapping[str, float]) -> str:
        """The side of the limit that the ratio is on, if spread and samples can tell."""
        if q["samples"] < FEWEST:
            return f"{UNDECIDED}: {q['samples']} samples"
        low, high = q["p20"], q["p80"]
        if (low >= self.limit) if self.least else (high <= self.limit):
            return MET
        if (high < self.limit) if self.least else (low > self.limit):
            return MISSED
        return UNDECIDED


def _layer(K: int, O: int, tokens: range, dtype: str = "bfloat16", r: int = 16) -> dict[str, Any]:
    """Cases of the layer suite; where a range ends at `_ANY` there is no upper bound."""
    most = f"to {tokens[-1]}" if tokens.stop < _ANY else "and more"
    place = f"{K} → {O}, {tokens[0]} tokens{f' {most}' if len(tokens) > 1 else ''}, {dtype}"
    sizes = {"in_features": [K], "out_features": [O], "tokens": tokens}
    return {"suite": "layer", "place": place, "where": {**sizes, "r": [r], "dtype": [dtype]}}


def _kernels(suite: str, tokens: range, **case: str) -> dict[str, Any]:
    """Cases of `make gpu`: 4096 → 4096, r 16, bfloat16, both transforms."""
    place = {**_layer(4096, 4096, tokens), "suite": suite}
    return {**place, "where": {**place["where"], **{key: [value] for key, value in case.items()}}}


_ANY = 1 << 40
_ONE = (range(1, 2), range(16, 17), range(512, 513), range(2048, 2049))
_MANY = range(4096, _ANY)
_STACK: dict[str, Any] = {
    "suite": "memory",
    "place": "4 layers 4096x4096 and more",
    "where": {"width": [4096], "depth": range(4, _ANY), "r": [16], "dtype": ["bfloat16"]},
}
_ROBERTA: dict[str, Any] = {
    "suite": "model",
    "place": "roberta-large, query+value, all blocks",
    "where": {
        "model": ["roberta-large"], "targets": ["query+value"], "blocks": [24], "r": [16],
        "dtype": ["bfloat16"],
    },
}  # fmt: skip
_LAUNCHING: dict[str, Any] = {"suite": "launching", "place": "1024 → 1024", "where": {}}
HUT, PAPER, LORA, PEFT = "hut_low_rank", "hut_paper", "lora", "peft_lora"
ON_GPU = (
    Target(**_layer(4096, 4096, _MANY), over=HUT, under=PEFT, limit=1.3),
    Target(**_layer(4096, 4096, _MANY), over=HUT, under=LORA, limit=1.55),
    Target(**_layer(4096, 4096, _MANY), over="peft_hira_cast", under=HUT, limit=1.6, least=True),
    Target(
        **_layer(4096, 4096, range(512, 513)), over=f"{HUT}_eager_compiled", under=HUT, limit=1.3,
        least=True,
    ),
    Target(
        **_layer(1024, 1024, range(1, 2049)), over=f"{HUT}_graph", under="lora_graph", limit=1.5
    ),
    Target(**_layer(1024, 1024, range(1, 2049)), over=HUT, under=PEFT, limit=1.1),
    Target(**_STACK, over=HUT, under=PEFT, limit=1, figure="saved"),
    Target(**_STACK, over=HUT, under=PEFT, limit=1, figure="peak"),
    # "Equal", but for what an allocator rounds.
    Target(**_STACK, over=HUT, under=LORA, limit=1.02, figure="peak", workspace=True),
    # The time of PEFT's step over ours is our tokens a second over PEFT's.
    Target(**_ROBERTA, over=PEFT, under=HUT, limit=0.95, least=True),
    Target(**_ROBERTA, over=HUT, under=PEFT, limit=1, figure="peak"),
)  # fmt: skip
KERNELS = (
    *(
        Target(**_kernels("tokens", tokens, part=part), over="planned", under="plain", limit=limit)
        for part, tokens, limit in (
            ("forward", range(1, 17), 1.10),
            ("forward", _MANY, 1.10),
            ("grad_input", _MANY, 1.10),
            ("grad_factors", _MANY, 1.25),
        )
    ),
    Target(**_kernels("step", _MANY), over="planned", under="plain", limit=1.15),
    Target(**_LAUNCHING, over="cuda", under="peft_lora", limit=1.0),
    Target(**_LAUNCHING, over="cuda", under="triton", limit=0.5),
)
_TINY: dict[str, Any] = {
    "suite": "overhead",
    "place": "16 → 16",
    "where": {"tokens": [16], "dtype": ["float32"]},
}
_CHAIN: dict[str, Any] = {
    "suite": "memory",
    "place": "6 layers 4096x4096, 64 tokens",
    "where": {"width": [4096], "depth": [6], "tokens": [64], "dtype": ["float32"]},
}
ON_CPU = tuple(
    Target(**given, device="cpu")
    for given in (
        {**_TINY, "over": HUT, "under": PEFT, "limit": 1.0},
        {**_TINY, "over": PAPER, "under": HUT, "limit": 1.3},
        *(
            {**_layer(1024, 4096, _ONE[1], dtype), "over": PAPER, "under": LORA, "limit": limit}
            for dtype, limit in (("float32", 2.5), ("bfloat16", 3.5))
        ),
        *(
            {**_layer(1024, 4096, _ONE[2], dtype), "over": over, "under": PRODUCTS, "limit": limit}
            for dtype, over, limit in (
                ("float32", HUT, 1.2), ("bfloat16", HUT, 1.15), ("bfloat16", PAPER, 1.22),
            )
        ),
        *(
            {**_layer(1024, 1024, _ONE[3], dtype), "over": over, "under": PRODUCTS, "limit": limit}
            for dtype, limit in (("float32", 1.05), ("bfloat16", 1.1))
            for over in (HUT, PAPER)
        ),
        *(
            {
                **_layer(4096, 4096, _ONE[0], dtype, r=8),
                "over": HUT, "under": "frozen", "limit": 2.0, "figure": "forward",
            }
            for dtype in ("float32", "bfloat16")
        ),
        *(
            {**_layer(1024, 1024, _ONE[3], "float32"), **ratio}
            for ratio in (
                {"over": "hira", "under": HUT, "limit": 1.5, "least": True},
                {"over": HUT, "under": f"{HUT}_eager", "limit": 1.1},
                {"over": LORA, "under": PEFT, "limit": 1.15},  # as lean as it is called
            )
        ),
        {
            **_layer(1024, 4096, _ONE[2]), "over": HUT, "under": "peft_hira", "limit": 0.75,
            "base": "nf4",
        },
        *(
            {
                **_layer(K, O, _ONE[2]), "over": HUT, "under": LIBRARY, "limit": 4.5,
                "figure": "dequantize", "base": "nf4",
            }
            for K, O in ((1024, 4096), (2048, 2048))
        ),
        *(
            {**_CHAIN, "over": over, "under": WEIGHT, "limit": 1.85, "figure": figure}
            for over in (HUT, PAPER)
            for figure in ("peak", "resident")
        ),
    )
)  # fmt: skip
_EXPERTS: dict[str, Any] = {"suite": "experts", "device": "cpu"}
EXPERTS = tuple(
    Target(**_EXPERTS, place=place, where={"tokens": tokens, "r": [8]} | more, **ratio)
    for place, tokens, more, ratio in (
        ("256 and 1024 tokens", [256, 1024], {}, {"over": HUT, "under": PEFT, "limit": 0.8}),
        ("4096 tokens", [4096], {}, {"over": HUT, "under": PEFT, "limit": 0.95}),
        (
            "any number of tokens", range(1, _ANY), {},
            {"over": HUT, "under": PEFT, "limit": 0.3, "figure": "peak_above"},
        ),
        (
            "64 experts of which 8 have tokens", [256, 1024], {"experts": [8]},
            {"over": "hut_idle", "under": HUT, "limit": 1.2},
        ),
    )
)  # fmt: skip
TARGETS = (*ON_GPU, *KERNELS, *ON_CPU, *EXPERTS)


def table(rows: Sequence[Row], among: Sequence[Target]) -> Table:
    """Every target: a line for each case in the rows, or that there is none."""
    body = []
    for target in among:
        found = list(lines(target, rows))
        body += found or [[target.words, target.bound, target.place, NONE, UNMEASURED]]
    return Table(
        "Targets: ratios, medians (p20–p80)",
        ["", "limit", "at", "ratio", "verdict"],
        body,
        ["Met or missed: the whole of p20 to p80 lies on that side of the limit."],
    )


def lines(target: Target, rows: Sequence[Row]) -> Iterator[list[str]]:
    """A target's lines: its ratio and the verdict on each case of each run."""
    for _, run in grouped(measured(rows), "environment.device_name", "environment.date"):
        cases: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in run:
            if target.meant_for(row):
                key = (*row["case"].items(), at(row, "types.compute"))
                cases.setdefault(key, {})[row["provider"]] = row
        for by in cases.values():
            q = target.ratio(by)
            if q is None:
                continue
            row, shown = next(iter(by.values())), f"{q['median']:.2f}"
            if q["p20"] < q["p80"]:
                shown += f" ({q['p20']:.2f}–{q['p80']:.2f})"
            # A graph's replay does not wait for the host.
            timed = target.figure in ("step", "forward", "dequantize") and target.suite not in (
                "tokens",
                "step",
            )
            said = BUSY if timed and busy(row["environment"]) else target.verdict(q)
            where = f"{where_of(row['case'])}, {at(row, 'types.compute')}"
            yield [target.words, target.bound, where, shown, said]


def _inverse(q: Mapping[str, float] | None) -> dict[str, float] | None:
    """The quantiles of the ratio the other way round."""
    if q is None:
        return None
    p20, median, p80 = (1 / q[key] for key in ("p80", "median", "p20"))
    return {"p20": p20, "median": median, "p80": p80, "samples": q["samples"]}


def _quotient(
    q: Mapping[str, float] | None, p: Mapping[str, float] | None
) -> dict[str, float] | None:
    """The ratio of two samples that were not taken in the same rounds, at its widest."""
    if q is None or p is None:
        return None
    p20, median, p80 = (q[a] / p[b] for a, b in (("p20", "p80"), ("median",) * 2, ("p80", "p20")))
    samples = min(q["samples"], p["samples"])
    return {"p20": p20, "median": median, "p80": p80, "samples": samples}
