"""torch.distributed.checkpoint: a run saved on two ranks goes on with any number of them."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from hut_kernels import adapter_state_dict, load_adapter, save_adapter
from tests.distributed.conftest import FOUR
from tests.distributed.pool import Group
from tests.distributed.test_tensor_parallel import PLAN
from tests.distributed.training import (
    BATCH,
    FORMS,
    assert_trained_alike,
    error,
    full,
    make_batch,
    make_model,
    own_part,
    train,
)

# Loading without a process group is what some tests here are about.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# The factors and their optimizer state alone; the base model has a checkpoint of its own.
ADAPTER = StateDictOptions(ignore_frozen_params=True)


def parallelise(model, engine, world):
    if engine == "tp and fsdp":
        grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        fully_shard(parallelize_module(model, grid["tp"], PLAN), mesh=grid["dp"])
        half = grid.get_local_rank("dp") * BATCH // 2
        return slice(half, half + BATCH // 2)
    if engine in ("fsdp", "policy"):
        wide = MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype=torch.float64)
        cast = {"mp_policy": wide, "reshard_after_forward": False}
        options = cast if engine == "policy" else {}
        for block in model:
            fully_shard(block, **options)
        fully_shard(model, **options)
        return own_part()
    parallelize_module(model, init_device_mesh("cpu", (world,)), PLAN)
    return slice(None)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(engine, form, folder, world):
    model = make_model(**FORMS[form])
    optimizer = train(model, parallelise(model, engine, world), steps=range(2))
    weights, moments = get_state_dict(model, optimizer, options=ADAPTER)
    assert len(weights) == len(trained(model))
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=folder)


def resume(engine, form, folder, world):
    """Loads the two steps of `save` into a fresh model, and trains two more."""
    initial = make_model(**FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference)
    part = parallelise(model, engine, world) if world > 1 else slice(None)
    optimizer = train(model, part, steps=range(4, 5))  # makes optimizer state, to be overwritten
    weights, moments = get_state_dict(model, optimizer, options=ADAPTER)
    state = {"weights": weights, "moments": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["weights"],
        optim_state_dict=state["moments"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    train(model, part, steps=range(2, 4), optimizer=optimizer)
    assert_trained_alike(model, reference, initial, 1e-12)


every_engine = pytest.mark.parametrize("engine", ["fsdp", "tp"])
every_transform = pytest.mark.parametrize("form", ["residual", "paper"])


@pytest.mark.parametrize("ranks", [2], indirect=True)
@every_engine
@every_transform
def test_checkpoint_saved_on_two_ranks_loads_on_one(ranks, tmp_path, engine, form):
    ranks.run(save, engine, form, str(tmp_path), 2)
    resume(engine, form, str(tmp_path), 1)


@pytest.mark.parametrize("ranks", [FOUR], indirect=True)
@every_engine
@every_transform
def test_checkpoint_saved_on_two_ranks_loads_on_four(ranks, two, tmp_path, engine, form):
    two.run(save, engine, form, str(tmp_path), 2)
    ranks.run(resume, engine, form, str(tmp_path), 4)


@pytest.fixture(scope="module")
def two():
    group = Group(2)
    yield group
    group.close()


def save_as_adapter(engine, folder, world):
    model = make_model(**FORMS["paper"])
    part = parallelise(model, engine, world)
    train(model, part, steps=range(2))
    with torch.no_grad():  # under the policy it leaves cast copies of the whole behind
        model(make_batch(0, torch.float64)[0][part])
    save_adapter(model, f"{folder}/{dist.get_rank()}")
    save_adapter(model, f"{folder}/all")


every_sharding = pytest.mark.parametrize("engine", ["fsdp", "policy", "tp", "tp and fsdp"])


@pytest.mark.parametrize("ranks", [2, FOUR], indirect=True)
@every_sharding
def test_adapter_of_a_sharded_model_is_gathered(ranks, tmp_path, engine):
    ranks.run(save_as_adapter, engine, str(tmp_path), ranks.world)
    files = list(tmp_path.iterdir())
    assert len(files) == ranks.world + 1
    assert len({safe_open(file, "pt").metadata()["sha256"] for file in files}) == 1
    reference, loaded = (make_model(**FORMS["paper"]) for _ in range(2))
    train(reference, steps=range(2))
    load_adapter(loaded, tmp_path / "all")
    for out, wanted in zip(trained(loaded), trained(reference), strict=True):
        assert error(out, wanted) <= (1e-3 if engine == "policy" else 1e-12)


def load_into_shards(engine, file, world):
    initial, model = (make_model(**FORMS["paper"]) for _ in range(2))
    load_adapter(initial, file)
    reference = copy.deepcopy(initial)
    part = parallelise(model, engine, world)
    with torch.no_grad():
        model(make_batch(0, torch.float64)[0][part])
    load_adapter(model, file)
    for name, factor in adapter_state_dict(model).items():
        assert torch.equal(full(factor), adapter_state_dict(initial)[name]), name
    if engine != "policy":  # whose steps are those of float32
        train(model, part)
        train(reference)
        assert_trained_alike(model, reference, initial, 1e-12)


@pytest.mark.parametrize("ranks", [2, FOUR], indirect=True)
@every_sharding
def test_adapter_is_dealt_out_to_a_sharded_model(ranks, tmp_path, engine):
    saved = make_model(**FORMS["paper"])
    train(saved, steps=range(2))
    save_adapter(saved, tmp_path / "file")
    ranks.run(load_into_shards, engine, str(tmp_path / "file"), ranks.world)


def load_into_offloaded_shards(file):
    model, reference = (make_model(**FORMS["paper"]) for _ in range(2))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    load_adapter(model, file)
    load_adapter(reference, file)
    for name, factor in adapter_state_dict(model).items():
        assert torch.equal(full(factor), adapter_state_dict(reference)[name]), name


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_adapter_is_dealt_out_to_an_offloaded_model(ranks, tmp_path):
    saved = make_model(**FORMS["paper"])
    train(saved, steps=range(1))
    save_adapter(saved, tmp_path / "file")
    ranks.run(load_into_offloaded_shards, str(tmp_path / "file"))


@pytest.mark.parametrize("ranks", [2], indirect=True)
@every_engine
def test_checkpoint_of_a_sharded_run_becomes_an_adapter_file(ranks, tmp_path, engine):
    ranks.run(save, engine, "paper", str(tmp_path), 2)
    plain, reference, loaded = (make_model(**FORMS["paper"]) for _ in range(3))
    train(reference, steps=range(2))
    weights = get_model_state_dict(plain, options=ADAPTER)
    dcp.load({"weights": weights}, checkpoint_id=str(tmp_path))
    save_adapter(plain, tmp_path / "adapter.safetensors")
    load_adapter(loaded, tmp_path / "adapter.safetensors")
    for out, wanted in zip(trained(loaded), trained(reference), strict=True):
        assert error(out, wanted) <= 1e-12
