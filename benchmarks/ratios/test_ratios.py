"""Times that must not get worse, as ratios within one run: `pytest benchmarks`.

A reference runs before each round of what is benchmarked, so both see the same machine at the same
time. No absolute time is compared. Limits leave room for a machine that is not quite idle; for what
the code reaches on an idle one see `make bench-cpu` and benchmarks/results/.
"""

import statistics
import time

import pytest
import torch
from torch import nn

from benchmarks.measure import Case, settle_threads, step_case
from benchmarks.providers import PROVIDERS

SHAPE, TINY = (256, 1024, 1024), (16, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before, _ = settle_threads()
    yield
    torch.set_num_threads(before)


def step_of(name, shape):
    """A training step of one layer, and the layer's input with it."""
    if name.startswith("peft"):
        pytest.importorskip("peft")
    tokens, in_features, out_features = shape
    layer = PROVIDERS[name].make(nn.Linear(in_features, out_features), 16)
    x = torch.randn(tokens, in_features, requires_grad=True)
    return step_case(layer, x, torch.randn(tokens, out_features))


def products(shape):
    """The three full products of a HUT step."""
    tokens, in_features, out_features = shape
    x, g = torch.randn(tokens, in_features), torch.randn(tokens, out_features)
    weight = torch.randn(out_features, in_features)
    return Case(lambda: (x @ weight.t(), g @ weight, g.t() @ x))


def ratio(benchmark, case, reference, rounds):
    """The median over rounds of the case's time over the reference's just before."""
    references = []

    def before():
        reference.prepare()
        begin = time.perf_counter()
        reference.run()
        references.append(time.perf_counter() - begin)
        case.prepare()

    benchmark.pedantic(case.run, setup=before, rounds=rounds, warmup_rounds=3)
    if benchmark.stats is None:  # --benchmark-disable: it ran, and that is all
        return 0.0
    times = benchmark.stats.stats.data
    found = statistics.median(a / b for a, b in zip(times, references[-len(times) :], strict=True))
    benchmark.extra_info["ratio"] = found
    return found


class TestCPUPath:
    @pytest.mark.parametrize(("name", "limit"), [("hut_low_rank", 1.6), ("hut_paper", 2.2)])
    def test_a_step_is_near_its_three_products(self, benchmark, name, limit):
        assert ratio(benchmark, step_of(name, SHAPE), products(SHAPE), 20) <= limit

    @pytest.mark.parametrize("other", ["peft_hira", "hira"])
    def test_a_step_takes_less_than_hiras(self, benchmark, other):
        case = step_of("hut_low_rank", SHAPE)
        assert ratio(benchmark, case, step_of(other, SHAPE), 20) <= 0.9

    def test_a_step_takes_no_more_than_plain_pytorch(self, benchmark):
        case = step_of("hut_low_rank", SHAPE)
        assert ratio(benchmark, case, step_of("hut_low_rank_eager", SHAPE), 20) <= 1.1

    def test_lean_lora_is_as_lean_as_pefts(self, benchmark):
        assert ratio(benchmark, step_of("lora", SHAPE), step_of("peft_lora", SHAPE), 20) <= 1.15


class TestHostOverhead:
    @pytest.mark.parametrize(("other", "limit"), [("peft_lora", 1.8), ("peft_hira", 2.0)])
    def test_a_call_on_tiny_tensors_costs_what_pefts_do(self, benchmark, other, limit):
        case = step_of("hut_low_rank", TINY)
        assert ratio(benchmark, case, step_of(other, TINY), 500) <= limit
