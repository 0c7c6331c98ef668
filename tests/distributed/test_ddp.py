"""HUT layers under DistributedDataParallel: as one process on the whole batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from hut_kernels import adapter_state_dict, load_adapter, save_adapter
from tests.distributed.training import (
    BATCH,
    FORMS,
    assert_trained_alike,
    make_batch,
    make_model,
    own_part,
    sgd,
    train,
)


def trains_as_one_process(form, recomputed):
    initial = make_model(**FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    for block in model:
        block.recomputed = recomputed
    train(reference)
    train(DistributedDataParallel(model), own_part())
    assert_trained_alike(model, reference, initial, 1e-12)


@pytest.mark.parametrize("recomputed", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("form", FORMS)
def test_ddp_trains_as_one_process(ranks, form, recomputed):
    ranks.run(trains_as_one_process, form, recomputed)


def saves_as_the_model_within(file):
    plain = make_model(**FORMS["paper"])
    model = DistributedDataParallel(copy.deepcopy(plain))
    train(model, own_part())
    save_adapter(model, file)
    load_adapter(plain, file)
    for name, factor in adapter_state_dict(plain).items():
        assert torch.equal(factor, model.module.get_parameter(name)), name
    load_adapter(model, file)


def test_ddp_saves_as_the_model_within(ranks, tmp_path):
    ranks.run(saves_as_the_model_within, str(tmp_path / "file"))


def trains_in_mixed_types():
    initial = make_model(torch.bfloat16, torch.float32, **FORMS["paper"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference, dtype=torch.bfloat16, optimizer=sgd(reference))
    train(DistributedDataParallel(model), own_part(), dtype=torch.bfloat16, optimizer=sgd(model))
    assert_trained_alike(model, reference, initial, 8e-3)


def test_ddp_trains_fp32_factors_over_a_bf16_base(ranks):
    ranks.run(trains_in_mixed_types)


def accumulates():
    initial = make_model(**FORMS["paper"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference, steps=range(1), optimizer=sgd(reference))
    replica, optimizer = DistributedDataParallel(model), sgd(model)
    x, target = (tensor[own_part()] for tensor in make_batch(0, torch.float64))
    halves = list(zip(x.chunk(2), target.chunk(2), strict=True))
    with replica.no_sync():
        (F.mse_loss(replica(halves[0][0]), halves[0][1]) / 2).backward()
    (F.mse_loss(replica(halves[1][0]), halves[1][1]) / 2).backward()
    optimizer.step()
    assert len(halves) == 2
    assert len(x) < BATCH
    assert_trained_alike(model, reference, initial, 1e-12)


def test_ddp_accumulates_gradients_to_those_of_one_batch(ranks):
    ranks.run(accumulates)
