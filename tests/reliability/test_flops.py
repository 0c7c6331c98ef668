"""FlopCounterMode counts what the operators do: three full products a step, and the thin ones."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import hut_kernels
from hut_kernels import explain, hut_linear, hut_weight

from .models import layer

N, K, O, R = 32, 24, 40, 3
PRODUCT, THIN = 2 * N * K * O, 2 * O * K * R


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step(model, x, run=None):
    (run or model)(x).sum().backward()


def inputs(**options):
    return layer((K, O), r=R, **options), torch.randn(4, N // 4, K, requires_grad=True)


def test_a_two_sided_step_is_three_products():
    model, x = inputs(transform="two_sided", scale_shift=True)
    assert count(lambda: step(model, x)) == 3 * PRODUCT


def test_a_low_rank_step_is_three_products_and_four_thin_ones():
    """T in forward and again for dx; a reduction of G for each factor."""
    model, x = inputs()
    assert count(lambda: step(model, x)) == 3 * PRODUCT + 4 * THIN


def test_it_is_the_count_of_the_definition_but_for_the_T_made_again():
    fused, x = inputs()
    eager, _ = inputs(fused=False)
    assert count(lambda: step(fused, x)) == count(lambda: step(eager, x)) + THIN


@pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
@pytest.mark.parametrize("precision", ["merged", "split"])
def test_it_equals_the_count_of_explain(transform, precision):
    model, x = inputs(transform=transform, precision=precision)
    plan = explain(
        N, K, O, R, dtype=torch.float32, transform=transform, precision=precision,
        device_name="cpu",
    )  # fmt: skip
    assert count(lambda: step(model, x)) == sum(plan.operations.values())


@pytest.mark.parametrize(
    ("trained", "operations"),
    [
        ((), PRODUCT + THIN),
        (("x",), 2 * (PRODUCT + THIN)),
        (("hut_A",), 2 * (PRODUCT + THIN)),
        (("hut_B", "gamma"), 2 * (PRODUCT + THIN)),
        (("hut_A", "hut_B"), 2 * PRODUCT + 3 * THIN),
    ],
    ids=str,
)
def test_only_executed_products_are_counted(trained, operations):
    model, x = inputs(scale_shift=True)
    leaves = {"x": x, **dict(model.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)

    def run():
        y = model(x)
        if trained:
            y.sum().backward()

    assert count(run) == operations


def test_checkpointing_adds_a_forward():
    model, x = inputs()
    again = count(lambda: step(model, x, lambda x: checkpoint(model, x, use_reentrant=False)))
    assert again == count(lambda: step(model, x)) + PRODUCT + THIN


def test_merging_is_a_thin_product():
    case = torch.ones(O, K), torch.ones(R, K), torch.ones(O, R)
    assert count(lambda: hut_weight(*case)) == THIN


@pytest.mark.parametrize("first", ["hut_kernels", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter(first):
    second = {"hut_kernels", "torch.utils.flop_counter"} - {first}
    code = (
        f"import {first}, {second.pop()}, torch\n"
        "ones = torch.ones\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
        "    hut_kernels.hut_linear(ones(2, 3), ones(4, 3), ones(1, 3), ones(4, 1))\n"
        "assert counter.get_total_flops() == 2 * 2 * 3 * 4 + 2 * 3 * 4, counter.flop_counts\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reloading_the_package_registers_nothing_twice():
    importlib.reload(hut_kernels)


def test_hut_linear_itself_is_counted():
    x, weight, A, B = torch.ones(N, K), torch.ones(O, K), torch.ones(R, K), torch.ones(O, R)
    assert count(lambda: hut_linear(x, weight, A, B)) == PRODUCT + THIN
