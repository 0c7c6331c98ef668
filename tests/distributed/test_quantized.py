"""HUT layers over bases in few bits, sharded: as one process under FSDP2, or refused in words."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hut_kernels import (
    HUTBackendError,
    HUTLinear,
    adapter_options,
    inject,
    load_adapter,
    merge,
    parameter_groups,
    save_adapter,
    versions,
)
from hut_kernels.distributed import HUTColwiseParallel, HUTRowwiseParallel
from tests.distributed.training import (
    FORMS,
    HIDDEN,
    WIDTH,
    Block,
    assert_trained_alike,
    error,
    full,
    make_batch,
    own_part,
    sgd,
    train,
)

pytest.importorskip("bitsandbytes")

TARGETS = ["up", "down"]


def in_few_bits(make=None, **options):
    """Two blocks whose linear layers are quantized, and computed with in x's type."""
    from tests.formats.weights import linear4bit

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    for block in model:
        for name, sizes in (("up", (HIDDEN, WIDTH)), ("down", (WIDTH, HIDDEN))):
            setattr(block, name, (make or linear4bit)(*sizes, **options))
    return model


def adapted(model, how, **options):
    """The model with random factors in float64, by `inject` or by PEFT's `HUTConfig`."""
    if how == "inject":
        inject(model, TARGETS, **options)
    else:
        peft = pytest.importorskip("peft")
        from hut_kernels.integrations.peft import HUTConfig

        options["hut_alpha"] = options.pop("alpha", None)
        peft.get_peft_model(model, HUTConfig(target_modules=TARGETS, init_weights=False, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) / 8)
    return model


def shard(model, **options):
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def trains_as_one_process(storage, how, form, recomputed, options):
    initial = adapted(in_few_bits(storage=storage), how, **FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    for block in model:
        block.recomputed = recomputed
    train(reference)
    train(shard(model, **options), own_part())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert_trained_alike(model, reference, initial, 1e-12)


shards_integers = pytest.mark.skipif(
    versions.release(torch.__version__) < (2, 11, 0),
    reason="FSDP2 of PyTorch 2.10 shards floating parameters alone",
)
BYTES = pytest.param(torch.uint8, marks=shards_integers)


@pytest.mark.parametrize("how", ["inject", "peft"])
@pytest.mark.parametrize("storage", [torch.bfloat16, BYTES, torch.float32], ids=str)
def test_fsdp_trains_as_one_process(ranks, storage, how):
    ranks.run(trains_as_one_process, storage, how, "residual", False, {})


@pytest.mark.parametrize("how", ["inject", "peft"])
def test_fsdp_trains_as_one_process_recomputed_and_offloaded(ranks, how):
    offloaded = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    ranks.run(trains_as_one_process, torch.bfloat16, how, "paper", True, offloaded)


def trains_under_ddp(make):
    initial = adapted(make(), "inject", **FORMS["paper"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference)
    model = DistributedDataParallel(model)
    train(model, own_part())
    assert_trained_alike(model, reference, initial, 1e-12)


def in_eight_bits():
    from tests.formats.weights import linear8bit

    return in_few_bits(linear8bit)


@pytest.mark.parametrize("make", [in_few_bits, in_eight_bits])
def test_ddp_trains_as_one_process(ranks, make):
    ranks.run(trains_under_ddp, make)


def trains_under_a_policy():
    """The policy casts every parameter to bfloat16 to compute with; codes of that type stay."""
    initial = adapted(in_few_bits(storage=torch.bfloat16), "inject", **FORMS["paper"])
    for parameter in initial.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data.float()
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    optimizer = sgd(reference)
    for step in range(4):
        x, target = make_batch(step, torch.float32)
        values = {
            name: p if name.endswith(("up.weight", "down.weight")) else p.to(torch.bfloat16)
            for name, p in reference.named_parameters()
        }
        y = torch.func.functional_call(reference, values, (x.to(torch.bfloat16),))
        F.mse_loss(y.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    train(shard(model, mp_policy=policy), own_part(), dtype=torch.float32, optimizer=sgd(model))
    assert_trained_alike(model, reference, initial, 8e-3)


def test_fsdp_trains_under_a_policy_of_the_storage_type(ranks):
    ranks.run(trains_under_a_policy)


def refuses_another_policy():
    model = adapted(in_few_bits(storage=torch.float16), "inject", r=2)
    shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    with pytest.raises(HUTBackendError, match=r"stored as torch\.float16.*quant_storage"):
        model(make_batch(0, torch.float64)[0])


def test_codes_that_a_policy_casts_as_numbers_are_refused(ranks):
    ranks.run(refuses_another_policy)


def saves(folder):
    model = adapted(in_few_bits(storage=torch.bfloat16), "inject", r=2)
    other = adapted(in_few_bits(storage=torch.bfloat16), "inject", r=2)
    x = make_batch(0, torch.float64)[0]
    expected, before = model(x), {name: v.clone() for name, v in model.state_dict().items()}
    shard(model)
    file = f"{folder}/{dist.get_rank()}.safetensors"
    save_adapter(model, file)
    load_adapter(other, file)
    assert error(other(x), expected) <= 1e-12
    state = {name: full(value) for name, value in model.state_dict().items()}
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert adapter_options(file)["r"] == 2


def test_a_sharded_model_saves_all_of_itself(ranks, tmp_path):
    ranks.run(saves, str(tmp_path))


def refuses_to_read_shards():
    for how in ("inject", "peft"):
        model = shard(adapted(in_few_bits(storage=torch.bfloat16), how, r=2))
        with pytest.raises(HUTBackendError, match=r"weight is sharded .*before fully_shard"):
            parameter_groups(model, 1e-3)
        with pytest.raises(HUTBackendError, match="weight is sharded"):
            model[0].up(make_batch(0, torch.float64)[0])  # the root gathers, and was not called
    model = shard(adapted(in_few_bits(storage=torch.bfloat16), "inject", r=2))
    for read in (model[0].up.merged_weight, model[0].up.to_linear, lambda: merge(model)):
        with pytest.raises(HUTBackendError, match="weight is sharded"):
            read()


def test_parts_of_codes_are_refused(ranks):
    ranks.run(refuses_to_read_shards)


def refuses_int8():
    for how in ("inject", "peft"):
        model = shard(adapted(in_eight_bits(), how, r=2))
        with pytest.raises(TypeError, match=r"torch\.int8.*FSDP"):
            model(make_batch(0, torch.float64)[0])


@shards_integers
def test_fsdp_over_int8_is_refused(ranks):
    ranks.run(refuses_int8)


def refuses_tensor_parallelism():
    from tests.formats.weights import linear4bit, linear8bit

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for make in (linear4bit, linear8bit):
        for style in (HUTColwiseParallel(), HUTRowwiseParallel()):
            layer = HUTLinear.from_linear(make(64, 64), r=2)
            with pytest.raises(HUTBackendError, match=r"is quantized .*fully_shard"):
                parallelize_module(layer, mesh, style)


def test_tensor_parallelism_is_refused(ranks):
    ranks.run(refuses_tensor_parallelism)
