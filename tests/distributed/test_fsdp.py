"""HUT layers under FSDP2, `fully_shard`: as one process on the whole batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hut_kernels import PAPER, HUTBackendError, HUTLinear, merge, parameter_groups
from tests.distributed.training import (
    FORMS,
    assert_trained_alike,
    error,
    full,
    make_batch,
    make_model,
    own_part,
    sgd,
    train,
)

HOW = {
    "blocks": {},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def shard(model, **options):
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def has_the_rates_of_one_process(form):
    model = make_model(**FORMS[form])
    rates = [group["lr"] for group in parameter_groups(model, 1e-3)]
    shard(model)
    groups = parameter_groups(model, 1e-3)
    assert [group["lr"] for group in groups] == pytest.approx(rates)
    found = {id(tensor) for group in groups for tensor in group["params"]}
    assert found == {id(tensor) for tensor in model.parameters() if tensor.requires_grad}


@pytest.mark.parametrize("form", FORMS)
def test_parameter_groups_of_a_sharded_model_are_those_of_one_process(ranks, form):
    ranks.run(has_the_rates_of_one_process, form)


def trains_as_one_process(form, how, recomputed, clip):
    initial = make_model(**FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    for block in model:
        block.recomputed = recomputed
    train(reference, clip=clip)
    train(shard(model, **HOW[how]), own_part(), clip=clip)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert_trained_alike(model, reference, initial, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_fsdp_trains_as_one_process(ranks, form):
    ranks.run(trains_as_one_process, form, "blocks", False, None)


@pytest.mark.parametrize("how", ["kept", "offloaded"])
def test_fsdp_trains_as_one_process_kept_whole_or_offloaded(ranks, how):
    ranks.run(trains_as_one_process, "paper", how, False, None)


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_fsdp_trains_as_one_process_recomputed_and_clipped(ranks, form):
    ranks.run(trains_as_one_process, form, "blocks", True, 0.01)


def shards_each_layer():
    initial = make_model(**FORMS["residual"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    for block in model:
        fully_shard(block.up)
        fully_shard(block.down)
    train(reference)
    train(fully_shard(model), own_part())
    assert_trained_alike(model, reference, initial, 1e-12)


def test_fsdp_shards_a_hut_layer_on_its_own(ranks):
    ranks.run(shards_each_layer)


def trains_in_mixed_types():
    initial = make_model(torch.bfloat16, torch.float32, **FORMS["paper"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference, dtype=torch.bfloat16, optimizer=sgd(reference))
    shard(model)
    train(model, own_part(), dtype=torch.bfloat16, optimizer=sgd(model))
    assert_trained_alike(model, reference, initial, 8e-3)


def test_fsdp_trains_fp32_factors_over_a_bf16_base(ranks):
    ranks.run(trains_in_mixed_types)


def trains_under_a_policy(form):
    initial = make_model(torch.float32, **FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    optimizer = sgd(reference)
    for step in range(4):  # what the policy does: float32 parameters, computed with in bfloat16
        x, target = make_batch(step, torch.float32)
        values = {name: p.to(torch.bfloat16) for name, p in reference.named_parameters()}
        y = torch.func.functional_call(reference, values, (x.to(torch.bfloat16),))
        F.mse_loss(y.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    shard(model, mp_policy=policy)
    train(model, own_part(), dtype=torch.float32, optimizer=sgd(model))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_trained_alike(model, reference, initial, 8e-3)


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_fsdp_trains_under_a_bf16_policy(ranks, form):
    ranks.run(trains_under_a_policy, form)


def keeps_factors_in_float32():
    seen = {}
    model = nn.Sequential(HUTLinear(8, 6, 2, dtype=torch.float32))
    policy = MixedPrecisionPolicy(
        torch.bfloat16, param_dtype_override_fn=lambda p: p.dtype if p.requires_grad else None
    )
    model[0].register_forward_pre_hook(
        lambda layer, _: seen.update({n: p.dtype for n, p in layer.named_parameters()})
    )
    fully_shard(model, mp_policy=policy)
    model(torch.randn(4, 8)).float().square().sum().backward()
    assert seen["weight"] == torch.bfloat16
    assert seen["hut_A"] == seen["hut_B"] == torch.float32
    assert model[0].hut_B.grad.dtype == torch.float32


@pytest.mark.skipif(
    not hasattr(MixedPrecisionPolicy(), "param_dtype_override_fn"),
    reason="MixedPrecisionPolicy has no param_dtype_override_fn before torch 2.15",
)
def test_fsdp_factors_may_stay_float32_under_a_bf16_policy(ranks):
    ranks.run(keeps_factors_in_float32)


def starts_from_meta(options):
    with torch.device("meta"):
        model = nn.Sequential(HUTLinear(8, 6, 4, dtype=torch.float64, **options))
    fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        torch.manual_seed(0)
        weight, bias = torch.randn(6, 8).double(), torch.randn(6).double()
        for parameter, value in ((model[0].weight, weight), (model[0].bias, bias)):
            local = torch.distributed.tensor.distribute_tensor(
                value, parameter.device_mesh, parameter.placements
            )
            parameter.copy_(local)
    model[0].reset_factors()
    x = torch.randn(3, 8).double()
    assert error(model(x), F.linear(x, weight, bias)) <= 1e-12
    rows = full(model[0].hut_A)
    if options.get("transform") != "two_sided":
        assert len(rows.unique(dim=0)) == 4, "ranks drew the same rows"


@pytest.mark.parametrize("options", [{}, {"offset": 0}, PAPER], ids=["residual", "direct", "paper"])
def test_fsdp_layer_made_on_meta_starts_as_its_base(ranks, options):
    ranks.run(starts_from_meta, options)


def refuses_to_read_shards():
    model = nn.Sequential(HUTLinear(8, 6, 2))
    fully_shard(model)
    for read in (model[0].merged_weight, model[0].to_linear, lambda: merge(model)):
        with pytest.raises(HUTBackendError, match=r"weight is sharded .*full_tensor"):
            read()
    with pytest.raises(HUTBackendError, match="weight is sharded"):
        model[0](torch.zeros(1, 8))  # the root gathers, and it was not called


def test_sharded_weight_is_refused_outside_its_forward(ranks):
    ranks.run(refuses_to_read_shards)
