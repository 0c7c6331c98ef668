"""HUT on experts under FSDP2: as one process on the whole batch, whatever is wrapped."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")

from hut_kernels import HUTBackendError, inject, load_adapter, save_adapter
from tests.integrations.moe_models import experts_of, tiny

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def make(peft):
    torch.manual_seed(0)
    model = tiny("qwen3_moe", experts_implementation="grouped_mm").double()
    if peft:
        from peft import get_peft_model

        from hut_kernels.integrations.peft import HUTConfig

        options = {"target_modules": [], "target_parameters": TARGETS, "init_weights": False}
        model = get_peft_model(model, HUTConfig(r=3, **options), autocast_adapter_dtype=False)
    else:
        inject(model, [], 3, target_parameters=TARGETS, factor_dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "hut_B" in name:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randint(3, 64, (4, 16))


def gradients(model, rows):
    model(rows, labels=rows).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trains_as_one_process(peft, wrapped, folder):
    model, rows = make(peft)
    expected = gradients(copy.deepcopy(model), rows)
    sharded = copy.deepcopy(model)
    kinds = {"layers": "Qwen3MoeDecoderLayer", "experts": "Qwen3MoeExperts"}
    for module in list(sharded.modules()):
        if type(module).__name__ == kinds[wrapped]:
            fully_shard(module)
    fully_shard(sharded)
    rank, world = dist.get_rank(), dist.get_world_size()
    found = gradients(sharded, rows.chunk(world)[rank])
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert isinstance(grad, DTensor)
        whole = grad.full_tensor()
        assert (whole - expected[name]).norm() <= 1e-10 * expected[name].norm(), name
    assert isinstance(experts_of(sharded)[0].down_proj, DTensor)
    if not peft:
        save_adapter(sharded, f"{folder}/{rank}.safetensors")
        load_adapter(model, f"{folder}/{rank}.safetensors")


@pytest.mark.parametrize("wrapped", ["layers", "experts"])
@pytest.mark.parametrize("peft", [False, True])
def test_fsdp_trains_as_one_process(ranks, peft, wrapped, tmp_path):
    ranks.run(trains_as_one_process, peft, wrapped, str(tmp_path))


def refuses_experts_that_are_sharded_already():
    torch.manual_seed(0)
    model = tiny("qwen3_moe")
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(HUTBackendError, match=r"gate_up_proj is sharded \(expert parallelism, DTe"):
        inject(model, [], 2, target_parameters=TARGETS)


def test_sharded_experts_are_refused(ranks):
    ranks.run(refuses_experts_that_are_sharded_already)
