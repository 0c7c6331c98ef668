"""HUT layers under tensor parallelism: as the layer, and the training, of one process."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from hut_kernels import PAPER, HUTBackendError, HUTLinear, merge
from hut_kernels.definition import group_index
from hut_kernels.distributed import HUTColwiseParallel, HUTRowwiseParallel, shard_groups
from tests.distributed.training import (
    FORMS,
    assert_trained_alike,
    error,
    full,
    make_model,
    randomise,
    sgd,
    train,
)

STYLES = {"colwise": HUTColwiseParallel, "rowwise": HUTRowwiseParallel}
PLAN = {"*.up": HUTColwiseParallel(), "*.down": HUTRowwiseParallel()}

every_form = pytest.mark.parametrize("form", FORMS)
every_style = pytest.mark.parametrize("style", STYLES)


class Conv1D(nn.Module):
    """A stand-in for transformers' Conv1D: weight `[in, out]`, and `nf`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / math.sqrt(nx))
        self.bias = nn.Parameter(torch.randn(nf))


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def trains_as_one_process(form, recomputed):
    initial = make_model(**FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    for block in model:
        block.recomputed = recomputed
    train(reference, clip=1.0)
    train(parallelize_module(model, mesh(), PLAN), clip=1.0)
    assert_trained_alike(model, reference, initial, 1e-12)


@pytest.mark.parametrize("recomputed", [False, True], ids=["saved", "recomputed"])
@every_form
def test_tensor_parallel_trains_as_one_process(ranks, form, recomputed):
    ranks.run(trains_as_one_process, form, recomputed)


def trains_in_mixed_types():
    initial = make_model(torch.bfloat16, torch.float32, **FORMS["paper"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference, dtype=torch.bfloat16, optimizer=sgd(reference))
    parallelize_module(model, mesh(), PLAN)
    train(model, dtype=torch.bfloat16, optimizer=sgd(model))
    assert_trained_alike(model, reference, initial, 8e-3)


def test_tensor_parallel_trains_fp32_factors_over_a_bf16_base(ranks):
    ranks.run(trains_in_mixed_types)


def trains_over_two_dimensions(form):
    initial = make_model(**FORMS[form])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference)
    grid = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, grid["tp"], PLAN)
    for block in model:
        fully_shard(block, mesh=grid["dp"])
    fully_shard(model, mesh=grid["dp"])
    half = 4 * grid["dp"].get_local_rank()
    train(model, slice(half, half + 4))
    assert_trained_alike(model, reference, initial, 1e-12)
    with pytest.raises(HUTBackendError, match="past its hooks"):
        model[0].up.forward(torch.zeros(1, 16).double())


@every_form
def test_tensor_parallel_within_fsdp_trains_as_one_process(ranks, form):
    ranks.run(trains_over_two_dimensions, form)


def trains_beside_plain_layers():
    initial = make_model(targets=["up"], **FORMS["paper"])
    reference, model = copy.deepcopy(initial), copy.deepcopy(initial)
    train(reference)
    parallelize_module(model, mesh(), {**PLAN, "*.down": RowwiseParallel()})
    for block in model:
        block.down.requires_grad_(False)  # PyTorch 2.10's own styles unfreeze what they shard
    train(model)
    assert_trained_alike(model, reference, initial, 1e-12)


def test_styles_stand_in_one_plan_with_torchs(ranks):
    ranks.run(trains_beside_plain_layers)


def make_layer(in_features=24, out_features=20, conv1d=False, **options):
    torch.manual_seed(0)
    options = {"factor_dtype": torch.float64, **options}
    base = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features)
    layer = HUTLinear.from_linear(base.double(), **options)
    randomise(layer)
    layer.bias.requires_grad_()
    return layer


def part_of(tensor, layout):
    """This rank's part of a tensor in this layout."""
    return (
        tensor
        if layout.is_replicate()
        else tensor.chunk(dist.get_world_size(), layout.dim)[dist.get_rank()]
    )


def has_the_layers_output_and_gradients(style, layouts, options):
    reference = make_layer(**options)
    layer = copy.deepcopy(reference)
    parallelize_module(layer, mesh(), STYLES[style](**layouts))
    x, grad = torch.randn(4, 8, 24).double(), torch.randn(4, 8, 20).double()
    colwise = style == "colwise"
    entry = layouts.get("input_layouts", Replicate() if colwise else Shard(-1))
    exit_ = layouts.get("output_layouts", Shard(-1) if colwise else Replicate())

    x.requires_grad_()
    y = reference(x)
    y.backward(grad)
    own_x = part_of(x.detach(), entry).clone().requires_grad_()
    own_y = layer(own_x)
    own_y.backward(part_of(grad, exit_))

    assert error(own_y, part_of(y, exit_)) <= 1e-12
    assert error(own_x.grad, part_of(x.grad, entry)) <= 1e-12
    for name, parameter in layer.named_parameters():
        wanted = reference.get_parameter(name).grad
        if wanted is None:
            assert parameter.grad is None
            continue
        assert parameter.grad.placements == parameter.placements, name
        assert error(full(parameter.grad), wanted) <= 1e-12, name


@every_form
@every_style
def test_sharded_layer_has_the_layers_output_and_gradients(ranks, style, form):
    ranks.run(has_the_layers_output_and_gradients, style, {}, FORMS[form])


@pytest.mark.parametrize(
    "options",
    [{"precision": "split"}, {"fused": False}, {"conv1d": True}, {"conv1d": True, **PAPER}],
    ids=["split", "unfused", "conv1d", "conv1d-paper"],
)
@every_style
def test_sharded_layer_of_every_kind(ranks, style, options):
    ranks.run(has_the_layers_output_and_gradients, style, {}, {"r": 2, **options})


@pytest.mark.parametrize("form", ["residual", "paper"])
@pytest.mark.parametrize(
    ("style", "layouts"),
    [
        ("colwise", {"input_layouts": Shard(1)}),
        ("colwise", {"input_layouts": Shard(-1), "output_layouts": Replicate()}),
        ("rowwise", {"output_layouts": Shard(1)}),
        ("rowwise", {"input_layouts": Replicate(), "output_layouts": Shard(-1)}),
        ("rowwise", {"input_layouts": Shard(1), "output_layouts": Shard(1)}),
    ],
)
def test_sharded_layer_in_other_layouts(ranks, style, layouts, form):
    ranks.run(has_the_layers_output_and_gradients, style, layouts, FORMS[form])


def takes_and_gives_dtensors():
    reference = make_layer(**FORMS["paper"])
    x = torch.randn(4, 8, 24).double()
    for style, entry, left in (
        (HUTColwiseParallel, Shard(1), Shard(2)),
        (HUTRowwiseParallel, Replicate(), Replicate()),
    ):
        layer = copy.deepcopy(reference)
        parallelize_module(layer, mesh(), style(use_local_output=False))
        y = layer(distribute_tensor(x, mesh(), [entry]))
        assert isinstance(y, DTensor)
        assert y.placements == (left,)
        assert error(full(y), reference(x)) <= 1e-12


def test_sharded_layer_takes_and_gives_dtensors(ranks):
    ranks.run(takes_and_gives_dtensors)


def holds_only_its_shards(style, sharded):
    layer = make_layer(r=2, scale_shift=True)
    parallelize_module(layer, mesh(), STYLES[style]())
    world = dist.get_world_size()
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == (name != "weight")
        parts = world if name in sharded else 1
        assert parameter.to_local().numel() * parts == parameter.numel(), name


@pytest.mark.parametrize(
    ("style", "sharded"),
    [
        ("colwise", {"weight", "bias", "hut_B", "gamma", "beta"}),
        ("rowwise", {"weight", "hut_A"}),
    ],
)
def test_rank_holds_only_its_shards(ranks, style, sharded):
    ranks.run(holds_only_its_shards, style, sharded)


@pytest.mark.parametrize("size", range(1, 6))
def test_groups_of_a_shard_are_those_of_the_layer(size):
    for n, r in itertools.product(range(1, 8), repeat=2):
        if r > n:
            continue
        groups = torch.arange(r)  # a factor that says which group it belongs to
        wanted = groups[group_index(size * n, r, "cpu")].chunk(size)
        for rank in range(size):
            for dim in (0, 1):
                factor = groups.unsqueeze(1 - dim).expand(*(3, r)[:: 2 * dim - 1])
                own = shard_groups(factor, dim, rank, size).select(1 - dim, 0)
                assert torch.equal(own[group_index(n, r, "cpu")], wanted[rank]), (n, r, rank)


def refuses(layer, style, kind, message, shape=None):
    with pytest.raises(kind, match=message):
        parallelize_module(layer, shape or mesh(), style)


def refuses_what_it_cannot_shard():
    world = dist.get_world_size()
    for style, side in ((HUTColwiseParallel(), "out"), (HUTRowwiseParallel(), "in")):
        refuses(nn.Linear(8, 8), style, TypeError, "is for HUTLinear; got Linear")
        refuses(HUTLinear(8 * world + 1, 8 * world + 1), style, ValueError, f"{side}_features to")
        refuses(HUTLinear(8, 8, dropout=0.1), style, ValueError, "one mask over all ranks")
        r = 8 // world + 1
        layer = HUTLinear(8, 8, r, transform="two_sided")
        refuses(layer, style, ValueError, f"r <= {side}_features / ranks.*got r={r} with 8")
        assert not any(isinstance(p, DTensor) for p in layer.parameters()), "changed all the same"
        grid = init_device_mesh("cpu", (1, world))
        refuses(HUTLinear(8, 8), style, ValueError, "mesh of one dimension", grid)
        layer = parallelize_module(HUTLinear(8, 8), mesh(), style)
        refuses(layer, style, HUTBackendError, "sharded already")
        refuses(fully_shard(HUTLinear(8, 8)), style, HUTBackendError, "goes before fully_shard")


def test_styles_refuse_unshardable_layers(ranks):
    ranks.run(refuses_what_it_cannot_shard)


def dropout_set_later_is_refused():
    for style in STYLES.values():
        layer = parallelize_module(HUTLinear(8, 8), mesh(), style())
        layer.dropout = 0.1
        x = torch.zeros(2, layer.hut_A.to_local().shape[1])
        with pytest.raises(ValueError, match=r"dropout=0\.1 .*one mask over all ranks"):
            layer(x)
        layer.eval()(x)


def test_dropout_that_is_set_later_is_refused(ranks):
    ranks.run(dropout_set_later_is_refused)


def infinities_stay_infinite():
    layer = make_layer(scale_shift=True)
    with torch.no_grad():
        layer.bias[0], layer.beta[1] = math.inf, -math.inf
    x = torch.randn(4, 24).double()
    expected = layer(x)
    parallelize_module(layer, mesh(), HUTRowwiseParallel(input_layouts=Replicate()))
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y[:, 2:].sum().backward()
    assert torch.equal(full(layer.beta.grad)[2:], torch.full((18,), 4.0).double())


def test_infinite_bias_and_beta_stay_infinite_in_a_rowwise_layer(ranks):
    ranks.run(infinities_stay_infinite)


def torchs_styles_are_refused():
    for style in (ColwiseParallel(), RowwiseParallel()):
        refuses(HUTLinear(8, 8), style, NotImplementedError, "only support nn.Linear")
    layer = parallelize_module(HUTLinear(8, 8), mesh(), SequenceParallel())
    with pytest.raises(HUTBackendError, match="weight is sharded"):
        layer(torch.zeros(2, 2, 8))
    linear = parallelize_module(nn.Linear(8, 8), mesh(), ColwiseParallel())
    with pytest.raises(HUTBackendError, match="unshard"):
        HUTLinear.from_linear(linear)


def test_torchs_own_styles_are_refused_on_a_hut_layer(ranks):
    ranks.run(torchs_styles_are_refused)


def shards_are_never_taken_for_the_layer(style):
    layer = parallelize_module(HUTLinear(8, 8, scale_shift=True), mesh(), STYLES[style]())
    for read in (layer.merged_weight, layer.to_linear, lambda: merge(layer)):
        with pytest.raises(HUTBackendError, match="weight is sharded"):
            read()
    colwise = style == "colwise"
    with pytest.raises(ValueError, match="in_features"):  # the input in another layout than agreed
        layer(torch.zeros(2, 8 // dist.get_world_size() if colwise else 8))
    layer.beta = nn.Parameter(torch.zeros(8))
    with pytest.raises(HUTBackendError, match="replaced"):
        layer(torch.zeros(2, 8 if colwise else 8 // dist.get_world_size()))


@every_style
def test_shards_are_never_taken_for_the_layer(ranks, style):
    ranks.run(shards_are_never_taken_for_the_layer, style)


def refuses_a_mixture():
    """A DTensor beside plain tensors: named, where PyTorch speaks of its own operators."""
    layer = make_layer(r=2, scale_shift=True)
    sharded = distribute_tensor(torch.randn(2, 24).double(), mesh(), (Replicate(),))
    with pytest.raises(HUTBackendError, match=r"x is sharded \(DTensor\) and weight is not"):
        layer(sharded)
    layer.hut_A = nn.Parameter(distribute_tensor(layer.hut_A.detach(), mesh(), (Replicate(),)))
    with pytest.raises(HUTBackendError, match=r"hut_A is sharded .*hut_kernels\.distributed"):
        layer(torch.randn(2, 24).double())


def test_dtensors_mixed_with_plain_tensors_are_refused(ranks):
    ranks.run(refuses_a_mixture)


def starts_from_meta(style):
    with torch.device("meta"):
        layer = HUTLinear(8, 8, 2, dtype=torch.float64, factor_dtype=torch.float64)
    parallelize_module(
        layer, mesh(), STYLES[style](input_layouts=Replicate(), output_layouts=Replicate())
    )
    layer.to_empty(device="cpu").reset_factors()
    torch.manual_seed(0)
    weight = torch.randn(8, 8).double()
    with torch.no_grad():
        layer.weight.copy_(distribute_tensor(weight, mesh(), layer.weight.placements))
        layer.bias.zero_()
    x = torch.randn(3, 8).double()
    assert error(layer(x), x @ weight.t()) <= 1e-12
    assert len(full(layer.hut_A).unique(dim=1)[0]) == 8, "ranks drew the same columns"


@every_style
def test_layer_made_on_meta_starts_as_its_base(ranks, style):
    ranks.run(starts_from_meta, style)
