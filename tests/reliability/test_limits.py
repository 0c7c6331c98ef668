"""Determinism, and the limits: no tokens, one feature, odd ranks, 2**31 elements, other devices."""

import os
import re
import subprocess
import sys

import pytest
import torch

from hut_kernels import hut_linear, planner
from hut_kernels.layer import Layer, Needs

from ..references import check, make, make_normal, operators, run
from .models import WIDTH, block, every_form, gradients, layer, twin

every_transform = pytest.mark.parametrize("transform", ["low_rank", "two_sided"])
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
    ),
]
ALL = "bias gamma beta"


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(model, device="cpu", steps=3):
    """The parameters after a few steps from one seed."""
    generator = torch.Generator().manual_seed(0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        x = torch.randn(2, 8, WIDTH, generator=generator).to(device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in trainable]


# Determinism


@every_form
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_deterministic_algorithms_are_all_it_needs(form, device, deterministic):
    """Nothing on the way raises under the flag, and the result is the one without it."""
    if device == "cuda" and not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        pytest.skip("cuBLAS itself needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment")
    model = block(**form).to(device)
    other = twin(model)
    ours = train(model, device)
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, ours, train(other, device)))


@every_form
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_two_runs_are_equal_to_the_bit(form, device):
    model = block(**form).to(device)
    other = twin(model)
    assert all(map(torch.equal, train(model, device), train(other, device)))


# Sizes


@every_transform
@pytest.mark.parametrize("N", [0, (2, 0), (0, 3)], ids=str)
def test_no_tokens_give_no_output_and_zero_gradients(transform, N):
    case = make(N, 12, 8, 3, vectors=ALL, transform=transform)
    results = run(case)
    check(case, results)
    assert results["y"].shape == (*case.x.shape[:-1], 8)
    assert not any(results[name].any() for name in ("hut_A", "hut_B", "gamma", "beta"))


@every_transform
@pytest.mark.parametrize("r", [1, 3, 17, 128])
def test_any_rank(transform, r):
    case = make_normal(9, 200, 130, r, vectors=ALL, transform=transform)
    check(case, run(case))


@every_transform
@pytest.mark.parametrize(("K", "O"), [(1, 1), (1, 7), (7, 1), (1, 4096), (4096, 1)])
def test_one_feature_in_or_out(transform, K, O):
    case = make(5, K, O, 1, vectors=ALL, transform=transform)
    check(case, run(case))


# Addresses: what 32 bits cannot say

FAR = 2**28  # a stride that fits; sixteen of them do not


def far_apart(tensor, memory, along):
    """The same values with rows (or columns) FAR elements apart, in memory touched nowhere else."""
    view = memory.as_strided(tensor.shape, (FAR, 1) if along == "rows" else (1, FAR))
    return view.copy_(tensor)


def memories(count):
    """Separate pieces of 8 GiB each, of which the system provides only what is written to."""
    numpy = pytest.importorskip("numpy")
    try:
        pieces = [numpy.empty(16 * FAR, dtype=numpy.float16) for _ in range(count)]
    except MemoryError:
        pytest.skip("this system does not give out memory that is not there")
    return [torch.from_numpy(piece) for piece in pieces]


def spread(case, along):
    """The case with its matrices far apart."""
    names = ("x", "weight", "hut_A", "hut_B", "grad")
    (memory,) = memories(1)
    # One element between them: the matrices share the memory, but no element of it.
    shifted = (memory[17 * i :] for i in range(len(names)))
    return case.replace(
        **{n: far_apart(getattr(case, n), m, along) for n, m in zip(names, shifted, strict=True)}
    )


FAR_CASE = {"dtype": torch.float16, "factor_dtype": torch.float16, "vectors": "gamma", "seed": 0}


@every_transform
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_matrices_whose_elements_lie_beyond_2_to_the_31(transform, along):
    case = make(16, 16, 16, 2, transform=transform, **FAR_CASE)
    check(case, operators(spread(case, along), "torch"))


INTERPRETED = """
import sys
from hut_kernels import planner
from tests.reliability.test_limits import FAR_CASE, check, make, operators, spread
for transform in ("low_rank", "two_sided"):
    for r in (1, 2):  # of which 1 has group vectors in place of tiles
        for along in ("rows", "columns"):
            case = make(16, 16, 16, r, transform=transform, **FAR_CASE)
            for strategy in (("fused",) * 3, ("staged", "staged", "chunked")):
                parts = dict(zip(("forward", "grad_input", "grad_factors"), strategy))
                with planner.force(**parts):
                    check(case, operators(spread(case, along), "triton"))
print("right")
"""


def test_kernels_read_matrices_whose_elements_lie_beyond_2_to_the_31():
    """In Triton's interpreter, whose 32-bit integers wrap as a GPU's do."""
    pytest.importorskip("triton", reason="triton is not installed")
    memories(1)
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "right", done.stderr[-2000:]


@pytest.mark.parametrize("variant", ["plain", "two_sided", "unaligned", "ragged", "transposed"])
@pytest.mark.parametrize(
    "kernel", ["forward", "grad_input", "grad_factors", "grad_reduce", "weight"]
)
def test_every_stride_is_widened_before_it_multiplies(kernel, variant):
    """Read from the compiler's own representation of a real launch: nothing is left in 32 bits."""
    pytest.importorskip("triton", reason="triton is not installed: nothing to compile with")
    from hut_kernels.triton.launch import LaunchConfig
    from tools import gate

    tiles = LaunchConfig(BN=16, BO=16, BK=16, warps=4, stages=1)
    config = gate.Config("sm_80", kernel, "bf16", 16, 64, tiles, variant)
    source = gate.compile_config(config).asm["ttir"]
    body = source[source.index("tt.func public") :].split("\n", 1)[1]
    uses = [line.strip() for line in body.splitlines() if re.search(r"%stride_\w+\b[^:]*:", line)]
    assert uses
    assert all("arith.extsi" in line and "i32 to i64" in line for line in uses), uses


def launches(monkeypatch, module, kernel, launch):
    """The grid and the arguments that a launcher gives its kernel; nothing is compiled."""
    found = []

    def record(*args, grid, warmup, **options):
        found.append((grid, args))

    monkeypatch.setattr(getattr(module, kernel), "run", record)
    launch(module)
    return found


@every_transform
def test_grids_stay_within_the_hardwares_limits(transform, monkeypatch):
    """One dimension of at most 2**31 - 1 programs, and strides passed as they are."""
    pytest.importorskip("triton", reason="triton is not installed")
    from hut_kernels.triton import forward, grad_factors, grad_input, weight
    from hut_kernels.triton.tables import launch_config

    # Four million tokens, a vocabulary of a million: 2**42 outputs, 2**34 weights.
    N, K, O, r = 2**22, 2**14, 2**20, 16
    meta = {"device": "meta", "dtype": torch.bfloat16}
    x, grad, W = (torch.empty(*s, **meta) for s in ((N, K), (N, O), (O, K)))
    A, B = torch.empty(r, K, **meta), torch.empty(O, r, **meta)
    layer = Layer(W, A, B, spec=make(1, 16, 16, 1, transform=transform).spec)
    needs = Needs(True, True, False)

    def config(kernel):
        return launch_config(kernel, "sm_80", N, r, "bf16")

    calls = [
        (forward, "hut_forward_kernel",
         lambda m: m.launch_forward(x, layer, config("forward"))),
        (grad_input, "hut_grad_input_kernel",
         lambda m: m.launch_grad_input(grad, layer, config("grad_input"))),
        (grad_factors, "hut_grad_factors_kernel",
         lambda m: m.launch_grad_factors(grad, x, layer, needs, config("grad_factors"), (8, 8))),
        (weight, "hut_weight_kernel",
         lambda m: m.launch_weight(layer, torch.bfloat16, config("weight"))),
    ]  # fmt: skip
    for module, kernel, launch in calls:
        ((grid, arguments),) = launches(monkeypatch, module, kernel, launch)
        assert len(grid) == 1
        assert 0 < grid[0] < 2**31
        integers = {a for a in arguments if isinstance(a, int)}
        assert {K, O, r, *W.stride(), *A.stride(), *B.stride()} <= integers


# On a device


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("strategy", ["fused", "staged"])
def test_more_than_2_to_the_31_elements(device, strategy):
    """The last tokens of very many: y and dx as without the others."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    N, K, O, tail = 2**20 + 3, 2048 + 16, 2048 + 16, 77
    case = make_normal(1, K, O, 8, dtype=torch.bfloat16, device=device)
    x = torch.zeros(N, K, dtype=torch.bfloat16, device=device)
    x[-tail:].normal_()
    assert x.numel() > 2**31
    with planner.force(forward=strategy, grad_input=strategy):
        y = hut_linear(x, case.weight, case.hut_A, case.hut_B)
        alone = hut_linear(x[-tail:].clone(), case.weight, case.hut_A, case.hut_B)
    torch.testing.assert_close(y[-tail:], alone)
    assert not y[:-tail].any()


@pytest.mark.parametrize("device", [pytest.param("cuda:1", marks=gpu)])
def test_a_device_other_than_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    assert torch.cuda.current_device() == 0
    case = make(33, 64, 48, 3, vectors=ALL, device=device)
    results = run(case)
    assert all(out.device == torch.device(device) for out in results.values())
    check(case, results)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@every_form
def test_another_stream_than_the_default(form, device):
    """Kernels are enqueued behind the stream's own work, and nothing is read before it is there."""
    model = layer(**form).to(device)
    x = torch.randn(64, WIDTH, device=device)
    expected = model(2 * x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = 2 * x
        y = model(doubled)
        y.square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, expected)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@every_form
def test_a_training_step_in_a_cuda_graph_is_the_step_without(form, device):
    model = block(**form).to(device)
    plain = twin(model)
    inputs = [torch.randn(2, 8, WIDTH, device=device) for _ in range(3)]

    def step(which, optimizer, x):
        which(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def sgd(which):
        return torch.optim.SGD([p for p in which.parameters() if p.requires_grad], lr=0.1)

    eager = sgd(plain)
    for x in (inputs[0], inputs[0], *inputs):
        step(plain, eager, x)

    optimizer, static = sgd(model), inputs[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # two steps to warm up, as PyTorch asks
        for _ in range(2):
            step(model, optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer, static)
    for x in inputs:
        static.copy_(x)
        graph.replay()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
