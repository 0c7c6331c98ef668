"""The planner: pure, total, within its bounds, and readable."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels import devices, planner, versions
from hut_kernels.devices import DEVICES, Device
from hut_kernels.planner import CHUNKED, FUSED, PARTS, STAGED, Problem

from .strategies import examples

SIZES = st.one_of(st.integers(0, 5), st.integers(0, 1 << 17))
PROBLEMS = st.builds(
    Problem,
    N=SIZES,
    K=SIZES,
    O=SIZES,
    r=st.one_of(st.integers(1, 8), st.integers(1, 5000)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    weight_dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64", "nf4", "int8"]),
    aligned=st.booleans(),
    transform=st.sampled_from(["low_rank", "two_sided"]),
    precision=st.sampled_from(["merged", "split"]),
    experts=st.sampled_from([0, 0, 1, 64]),
)
BACKENDS = st.sampled_from(["torch", "triton", "cuda", "auto"])
STRANGE = Device("a device of the future", "sm_999", 1, 1 << 10, 0)
ANY_DEVICE = st.sampled_from((*DEVICES, devices.CPU, STRANGE))
A100 = DEVICES[0]


def problem(N=64, K=1024, O=512, r=8, dtype="bfloat16", weight_dtype="bfloat16", **options):
    return Problem(N, K, O, r, dtype, weight_dtype, **options)


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_forced():
    assert planner._forced == {}
    yield
    assert planner._forced == {}


# Plans


@given(problem=PROBLEMS, device=ANY_DEVICE, backend=BACKENDS)
@examples(200)
def test_there_is_always_a_plan_and_always_the_same(problem, device, backend):
    plan = planner.plan(problem, device, backend)
    assert plan.problem == problem
    assert plan.device == device
    assert plan.forward in (FUSED, STAGED)
    assert plan.grad_input in (FUSED, STAGED)
    assert plan.grad_factors in (FUSED, CHUNKED)
    assert plan.chunk >= 1
    named = {"auto": ("torch", "triton", "cuda")}.get(backend, ("torch", backend))
    assert plan.backend in named
    planner._plan.cache_clear()
    assert planner.plan(problem._replace(), device, backend) == plan
    # No kernel of ours for what a kernel could not do.
    empty = 0 in (problem.N, problem.K, problem.O)
    one_by_one = problem.experts and backend == "cuda"
    if empty or one_by_one or (problem.r > planner.MAX_RANK and backend == "triton"):
        assert plan.backend == "torch"
    if problem.experts:  # the grouped GEMM's
        assert (plan.forward, plan.grad_input, plan.grad_factors) == (STAGED, STAGED, CHUNKED)
    if plan.backend != "triton":
        assert (plan.forward, plan.grad_input, plan.grad_factors) == (STAGED, STAGED, CHUNKED)
    if problem.precision == "split" or not problem.aligned:
        assert (plan.forward, plan.grad_input) == (STAGED, STAGED)


@given(problem=PROBLEMS, device=ANY_DEVICE, backend=BACKENDS)
@examples(100)
def test_figures_are_counts_and_the_text_holds_them(problem, device, backend):
    plan = planner.plan(problem, device, backend)
    text = str(plan)
    for figures in (plan.operations, plan.bytes, plan.workspace):
        assert tuple(figures) == PARTS
        assert all(isinstance(value, int) and value >= 0 for value in figures.values())
    for part in PARTS:
        row = next(line for line in text.splitlines() if line.startswith(part + " "))
        assert getattr(plan, part) in row
        assert plan.backend_of(part) in row
        assert f"{plan.operations[part] / 1e9:.3f}" in row
        assert f"{plan.bytes[part] / 1e6:.2f}" in row
        assert f"{plan.workspace[part] / 1e6:.2f}" in row
    for word in (problem.transform, f"r = {problem.r}", problem.precision, device.arch):
        assert word in text
    assert plan.source in text
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_break_evens_of_a_known_device_decide(device):
    """Fused up to its break-even, staged from one token more on."""
    even = devices.BREAK_EVENS[device.arch]
    for part, beyond in zip(PARTS, (STAGED, STAGED, CHUNKED), strict=True):
        tokens = even.tokens(part, problem().r)
        assert getattr(planner.plan(problem(N=tokens), device), part) == FUSED
        assert getattr(planner.plan(problem(N=tokens + 1), device), part) == beyond
    assert planner.plan(problem(), device).source == even.source


def test_an_unknown_architecture_has_a_default_that_says_so():
    plan = planner.plan(problem(N=1), STRANGE)
    assert plan.forward == FUSED
    assert planner.plan(problem(N=1 << 14), STRANGE).forward == STAGED
    assert "unknown" in plan.source


def test_unfusable_problems_are_not_fused():
    assert planner.plan(problem(N=1), A100).forward == FUSED
    assert planner.plan(problem(N=1, aligned=False), A100).forward == STAGED
    assert planner.plan(problem(N=1, aligned=False), A100).grad_factors == CHUNKED
    split = planner.plan(problem(N=1, precision="split"), A100)
    assert (split.forward, split.grad_input, split.grad_factors) == (STAGED, STAGED, FUSED)
    assert planner.plan(problem(r=planner.MAX_RANK), A100).backend == "triton"
    assert planner.plan(problem(r=planner.MAX_RANK + 1), A100).backend == "torch"


def test_operations_by_hand():
    """A full product is 2 N O K; T costs 2 r O K in low_rank, and no product in two_sided."""
    N, K, O, r = 64, 1024, 512, 8
    full, weight = 2 * N * K * O, K * O
    plan = planner.plan(problem(), A100)
    assert plan.operations == {
        "forward": full + 2 * r * weight,
        "grad_input": full + 2 * r * weight,
        "grad_factors": full + 4 * r * weight,
    }
    two_sided = planner.plan(problem(transform="two_sided"), A100)
    assert set(two_sided.operations.values()) == {full}
    split = planner.plan(problem(precision="split"), A100)
    assert split.operations["forward"] == 2 * full + 2 * r * weight
    assert split.operations["grad_factors"] == full + 4 * r * weight


def test_bytes_and_workspace_by_hand():
    N, K, O, r = 64, 1024, 512, 8
    weight, factors, activations = 2 * K * O, 4 * r * (K + O), 2 * N * (K + O)
    fused = planner.plan(problem(), A100)
    assert fused.bytes["forward"] == weight + factors + activations
    assert fused.workspace["forward"] == fused.workspace["grad_input"] == 0
    partials = weight * 5 // 4  # at most
    assert fused.workspace["grad_factors"] <= partials
    staged = planner.plan(problem(aligned=False), A100)
    assert staged.bytes["forward"] == weight + factors + activations + 2 * weight
    assert staged.workspace["forward"] == weight  # one shared workspace
    assert staged.workspace["grad_factors"] == min(staged.chunk, O) * K * 4 + partials


def test_few_tokens_over_four_bits_are_fused_and_told_why():
    """Bound by what the device has less of for a weight, where Triton is trusted."""
    for name, bound in (("4090", "memory"), ("5090", "memory"), ("H200", "instructions")):
        device = devices.find_device(name)
        one = planner.plan(problem(N=16, weight_dtype="nf4"), device)
        assert (one.forward, one.grad_input, one.grad_factors) == (FUSED, STAGED, CHUNKED)
        assert one.workspace["forward"] == 0
        assert "fused, 0.56 bytes a weight instead of 4.56; bound by " + bound in str(one)
        assert ("saves memory only" in str(one)) == (bound == "instructions")
        more = planner.plan(problem(N=17, weight_dtype="nf4"), device)
        assert more.bytes["forward"] - one.bytes["forward"] > 4 * 512 * 1024
        with planner.force(forward=STAGED):
            assert planner.plan(problem(N=16, weight_dtype="nf4"), device).forward == STAGED


def test_no_bound_is_told_of_a_device_without_figures():
    plan = planner.plan(problem(N=1, weight_dtype="nf4"), STRANGE)
    assert plan.reason == "fused, 0.56 bytes a weight instead of 4.56"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"N": 17}, "more than 16 tokens"),
        ({"weight_dtype": "int8"}, "only four bits"),
        ({"dtype": "float32"}, "not in float32"),
        ({"precision": "split"}, "two products"),
        ({"aligned": False}, "double quantization"),
    ],
)
def test_other_forwards_over_quantized_weights_are_staged_and_told_why(changes, words):
    plan = planner.plan(problem(**{"N": 16, "weight_dtype": "nf4", **changes}), A100)
    assert plan.forward == STAGED
    assert f"over {plan.problem.weight_dtype}: forward staged, for " in str(plan)
    assert words in plan.reason


def test_a_fused_forward_over_four_bits_is_passed_by_where_it_cannot_run():
    call = problem(N=16, weight_dtype="nf4")
    small = dataclasses.replace(A100, misfits=(devices.Misfit("stored_forward", call.row, "x"),))
    assert planner.plan(call, small).forward == STAGED
    assert "does not fit" in planner.plan(call, small).reason
    B200 = devices.find_device("B200")
    raced = dataclasses.replace(B200, miscompiles=versions.MISCOMPILES)
    assert "not trusted" in planner.plan(call, raced).reason
    assert planner.plan(problem(N=16), A100).reason == ""


@given(K=st.integers(1, 1 << 20), device=ANY_DEVICE)
@examples(60)
def test_a_chunk_of_G_fits_half_of_L2_or_is_one_tile(K, device):
    rows = planner.plan(problem(N=4096, K=K), device).chunk
    assert rows % 128 == 0
    assert rows == 128 or rows * K * 4 <= device.l2 // 2


def test_a_chunk_of_G_is_whole_waves_of_the_products_tiles():
    """On an H200 1,536 rows of 4,096 columns would be 192 tiles for 132 multiprocessors."""
    H200 = next(device for device in DEVICES if "H200" in device.name)
    assert planner.plan(problem(N=4096, K=4096), H200).chunk == 1024
    assert planner.plan(problem(N=4096, K=1024), H200).chunk == 4224  # 132 tiles


# The compiled extension


def large(**options):
    return problem(K=4096, O=4096, **options)


@pytest.mark.parametrize(
    ("asked", "compiled"),
    [
        (problem(), PARTS),  # bound by launching
        (problem(N=1, K=2048), PARTS),
        (large(), ()),
        (large(aligned=False), PARTS),
        (large(precision="split"), PARTS[:2]),
        (large(N=400), PARTS[:2]),  # beyond the first two break-evens
        (large(N=1 << 14), PARTS),
        (large(r=planner.MAX_RANK + 1), PARTS),  # Triton has no kernel
        (large(N=0), ()),
    ],
    ids=str,
)
def test_the_extension_takes_small_layers_and_unfused_parts(asked, compiled):
    triton = planner.plan(asked, A100)
    plan = planner.plan(asked, A100, "auto")
    if compiled == PARTS:
        assert plan == planner.plan(asked, A100, "cuda")
        assert plan.backend == "cuda"
        assert "backend cuda" in str(plan)
    else:
        assert plan.compiled == compiled
        assert plan.backend == triton.backend
    if asked.N:
        assert tuple(part for part in PARTS if planner.extension_wins(part, triton)) == compiled
    with planner.force(forward="staged"):
        assert not planner.extension_wins("forward", triton)
        assert not planner.launch_bound(8, 8)
        assert planner.plan(asked, A100, "cuda").source != "forced"  # strategies are Triton's
        assert planner.plan(asked, A100, "auto") == planner.plan(asked, A100)


# Forced strategies


def test_force_decides_within_its_block_and_nests():
    free = planner.plan(problem(), A100)
    assert free.forward == FUSED
    with planner.force(forward="staged", grad_factors="chunked"):
        forced = planner.plan(problem(), A100)
        assert (forced.forward, forced.grad_factors) == (STAGED, CHUNKED)
        assert forced.grad_input == free.grad_input
        assert forced.source == "forced"
        with planner.force(forward="fused"):
            inner = planner.plan(problem(N=1 << 14), A100)
            assert (inner.forward, inner.grad_factors) == (FUSED, CHUNKED)
        assert planner.plan(problem(), A100) == forced
    assert planner.plan(problem(), A100) == free


def test_force_ends_with_an_error_too():
    with pytest.raises(KeyError), planner.force(forward="staged"):
        raise KeyError
    assert planner.plan(problem(), A100).source != "forced"


def test_force_keeps_impossible_parts_as_planned():
    with planner.force(forward="fused", grad_input="fused", grad_factors="fused"):
        split = planner.plan(problem(precision="split"), A100)
        assert (split.forward, split.grad_input, split.grad_factors) == (STAGED, STAGED, FUSED)
        assert planner.plan(problem(r=200), A100).forward == STAGED
        assert planner.plan(problem(aligned=False), A100).forward == FUSED


@pytest.mark.parametrize(
    "strategies",
    [{"forward": "chunked"}, {"grad_factors": "staged"}, {"weight": "fused"}, {"forward": ""}],
)
def test_force_refuses_unknown_strategies(strategies):
    ((part, strategy),) = strategies.items()
    with pytest.raises(ValueError, match=f"{part}='{strategy}'"), planner.force(**strategies):
        pass


@pytest.mark.parametrize(
    "sizes", [(2**31 - 1024, 64, 64, 8), (8, 2**24, 64, 128), (8, 64, 2**24, 128)], ids=str
)
def test_sizes_beyond_int32_go_to_pytorch(sizes):
    N, K, O, r = sizes
    beyond = Problem(N, K, O, r, "bfloat16", "bfloat16")
    assert planner.plan(beyond, A100).backend == "torch"
    within = Problem(N // 2, K // 2, O // 2, r, "bfloat16", "bfloat16")
    assert planner.plan(within, A100).backend == "triton"
