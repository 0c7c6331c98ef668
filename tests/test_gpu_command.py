"""`make gpu` where there is no GPU: the part without one, its arithmetic, and its way with fakes.

The next machine that runs the command has minutes of GPU time. So whatever can be run here is run
here: the device's calls are replaced, and all else is the command's own.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, findings, lists, sanitizer, suites, timing, workers
from benchmarks.gpu.cases import FUSED, STAGED, Case
from benchmarks.gpu.suites import Layer
from benchmarks.measure import Quantiles
from hut_kernels import planner

ROOT = Path(__file__).resolve().parent.parent
H200 = planner.find_device("H200")
CPU = torch.device("cpu")
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
triton_only = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


def python(code, env=None):
    """Runs code in a fresh interpreter at the checkout's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )


# Without a device


@triton_only
def test_without_a_gpu_it_checks_in_the_interpreter_and_prints_plans(tmp_path):
    """And needs neither tqdm nor matplotlib nor anything else beyond torch, triton and numpy."""
    code = (
        "import runpy, sys\n"
        "for name in ('tqdm', 'matplotlib', 'safetensors', 'peft', 'transformers', 'hypothesis'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['gpu', '--quick', '--out', {str(tmp_path)!r}]\n"
        "import benchmarks.gpu.workers\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No GPU to run on: no CUDA device" in done.stdout
    assert f"{len(lists.tiny_cases(True))} passed" in done.stdout
    for device in planner.DEVICES:
        assert device.name in done.stdout
    assert "estimate" in done.stdout
    assert not list(tmp_path.iterdir()), "a record of nothing"


def test_a_failure_in_the_interpreter_is_a_failure(monkeypatch, capsys):
    def wrong(some, device, jobs, until, env):
        assert (device, env["TRITON_INTERPRET"]) == ("cpu", "1")
        result = {"status": "passed", "errors": {}, "limits": {}, "rows": {}, "problems": []}
        bad = {"status": "failed", "problems": ["y: error 1"]}
        return [(case, bad if n == 1 else result) for n, case in enumerate(some)]

    monkeypatch.setattr(workers, "check_all", wrong)
    assert command.without_device("no CUDA device", quick=True) == 1
    assert "FAILED" in capsys.readouterr().out


def test_without_triton_the_plans_are_still_printed(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.without_device("no CUDA device", quick=True) == 0
    assert "Triton is not installed" in capsys.readouterr().out


# Cases


TORCH = {"backend": "torch", "strategies": None}
FORMS = [
    {},
    {"transform": "two_sided"},
    {"offset": 0.0},
    {"vectors": ("bias", "gamma", "beta")},
    {"transform": "two_sided", "vectors": ("bias", "gamma", "beta")},
    {"layout": "sliced"},
    {"layout": "transposed"},
    {"layout": "expanded"},
    {"precision": "split"},
    {"weight_dtype": "bfloat16"},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "factor_dtype": "float16", "vectors": ("gamma",)},
    {"update": 5e-2},
    {"update": 5e-2, "transform": "two_sided"},
    {"update": 5e-2, "offset": 0.0},
    {"update": 1e-3, "precision": "split", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_right_layer_passes(form):
    case = Case(**{"N": 24, "K": 40, "O": 36, "r": 4, "dtype": "float32", **TORCH, **form})
    result = cases.check(case, CPU)
    assert result["status"] == "passed", result
    assert json.loads(json.dumps(result)) == result
    assert all(error <= result["limits"][name] for name, error in result["errors"].items())
    wanted = {"y", "x", "hut_A", "hut_B", *case.vectors} if case.update is None else set()
    assert wanted <= set(result["errors"])


def test_a_staged_case_looks_at_the_merged_weight_too():
    result = cases.check(Case(8, 24, 32, 4, "float32", strategies=STAGED, backend="torch"), CPU)
    assert result["status"] == "passed", result
    assert "W" in result["errors"]


def test_the_reference_is_the_definition():
    """At all indices and at a sample of them."""
    from hut_kernels import definition

    for form in FORMS[:5]:
        case = Case(30, 200, 220, 5, "float32", **{**TORCH, **form})
        inputs = cases.make(case, CPU)
        double = [
            None if value is None else value.double().requires_grad_()
            for value in (
                inputs.x, inputs.weight, inputs.hut_A, inputs.hut_B,
                inputs.bias, inputs.gamma, inputs.beta,
            )
        ]  # fmt: skip
        y = definition.linear(*double, definition.Spec(**case.spec))
        names = ("x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta")
        leaves = {n: v for n, v in zip(names, double, strict=True) if v is not None}
        grads = torch.autograd.grad(y, list(leaves.values()), inputs.grad.double())
        right = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
        for most in (1 << 26, 1 << 10):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cases, "_SAMPLED", most)
                wanted = cases.expected(case, inputs)
            for name in set(right) - {"weight"}:
                assert cases.error(right[name], wanted[name]) < 1e-12, name
            assert most > 1 << 20 or len(wanted["hut_B"][1][0]) < 220


def test_a_sample_has_its_ends():
    index = cases._sample(50_000, 200, CPU)
    assert 96 < len(index) <= 200
    assert index[0] == 0
    assert index[-1] == 49_999
    assert torch.equal(cases._sample(70, 1, CPU), torch.arange(70))


@pytest.mark.parametrize(
    ("defect", "problem"),
    [
        (lambda y: y * 1.02, "y: error"),
        (lambda y: y.masked_fill(torch.rand(y.shape) < 0.01, math.nan), "y: error inf"),
        (lambda y: y * (1 + 1e-7 * torch.randn(())), "y: two runs differ"),
        (lambda y: y[:-1], "y: error inf"),
    ],
)
def test_a_wrong_layer_does_not_pass(monkeypatch, defect, problem):
    right = cases.run

    def wrong(case, inputs):
        return {**right(case, inputs), "y": defect(right(case, inputs)["y"])}

    monkeypatch.setattr(cases, "run", wrong)
    result = cases.check(Case(24, 40, 36, 4, "float32", **TORCH), CPU)
    assert result["status"] == "failed"
    assert any(problem in one for one in result["problems"]), result


def test_memory_that_nobody_wrote_shows():
    with cases.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        torch.empty(3, dtype=torch.int64)


def test_what_raises_is_told_apart(monkeypatch):
    def raising(error):
        def run(case, inputs):
            raise error

        monkeypatch.setattr(cases, "run", run)

    case = Case(8, 24, 24, 2, "float32", **TORCH)
    raising(torch.OutOfMemoryError("no room"))
    assert cases.check(case, CPU)["status"] == "skipped"
    raising(RuntimeError("CUDA error: an illegal memory access\nsecond line"))
    result = cases.check(case, CPU)
    assert result["status"] == "failed"
    assert "illegal memory access second line" in result["problems"][0]
    other = dataclasses.replace(case, kernel="forward", row={"BN": 16})
    assert cases.check(other, CPU)["status"] == "unfit"


def test_what_has_no_room_on_the_device_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    result = cases.check(lists.large_cases(True)[0], torch.device("cuda", 0))
    assert result["status"] == "skipped"
    assert "GB are free" in result["problems"][0]


def test_cases_travel_as_json():
    for case in (
        *lists.device_cases(False),
        *lists.tiny_cases(False),
        *sanitizer.small_cases(True),
    ):
        assert Case.load(json.loads(json.dumps(dataclasses.asdict(case)))) == case


def test_what_is_shifted_is_contiguous_at_an_odd_address():
    inputs = cases.make(Case(4, 32, 16, 2, layout="shifted"), CPU)
    for tensor in (inputs.x, inputs.weight, inputs.grad):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == tensor.element_size()


def test_limits_are_those_of_the_definition():
    bf16, fp16, fp32 = (Case(8, 14336, 64, 4, kind) for kind in ("bfloat16", "float16", "float32"))
    assert cases.limit(bf16, torch.bfloat16) == cases.limit(bf16, torch.float32) == 8e-3
    assert cases.limit(fp16, torch.float16) == 2e-3
    assert cases.limit(fp32, torch.float32) == 2e-6 * math.sqrt(14336 / 4096)
    assert cases.limit(dataclasses.replace(fp32, tf32=True), torch.float32) == 2e-3
    assert cases.limit(fp32, torch.bfloat16) > 2e-6 + 1e-3
    assert cases.update_limit(dataclasses.replace(bf16, precision="split")) == 5e-3
    assert cases.update_limit(dataclasses.replace(bf16, transform="two_sided")) == 6e-2


# Lists


def test_the_lists_cover_what_they_say():
    full = lists.device_cases(False)
    table = [case for case in full if (case.K, case.O) == (1168, 1040)]
    for strategies, tokens in ((FUSED, set(lists.TOKENS)), (STAGED, {16, 2048})):
        some = [case for case in table if case.strategies == strategies]
        assert {case.N for case in some} == tokens
        assert {case.r for case in some} == set(lists.RANKS)
        kinds = {(case.dtype, case.tf32) for case in some}
        assert kinds == {
            ("bfloat16", False), ("float16", False), ("float32", False), ("float32", True)
        }  # fmt: skip
        assert len(some) == len(tokens) * len(lists.RANKS) * len(kinds)
    assert max(case.K for case in full) == max(case.O for case in full) == 14336
    assert {case.transform for case in full} == {"low_rank", "two_sided"}
    assert {case.layout for case in full} == {
        "", "transposed", "expanded", "sliced", "shifted",
    }  # fmt: skip
    assert {case.offset for case in full} == {0.0, 1.0}
    assert len({case.seed for case in full}) == len(full)
    assert all(case.row is None for case in full)
    assert set(map(str, lists.device_cases(True))) <= set(map(str, full))
    updates = [case for case in full if case.update is not None]
    assert {case.precision for case in updates} == {"merged", "split"}


def test_the_large_cases_are_beyond_32_bit_indices():
    weight, tokens = lists.large_cases(True)
    assert weight.K * weight.O > 2**31
    assert weight.K % 16 == 0
    assert tokens.N * tokens.K > 2**31
    assert tokens.N * tokens.O > 2**31
    assert {case.strategies for case in lists.large_cases(False)} == {FUSED, STAGED}
    assert max(case.bytes for case in lists.large_cases(False)) < 75e9


# Workers


class FakeWorker:
    made = 0

    def __init__(self, device, env):
        FakeWorker.made += 1

    def check(self, case, seconds):
        if case.N == 13:
            raise OSError("no process to be had")
        time.sleep(0.01)
        return {"status": "passed", "problems": [], "n": case.N}

    def close(self):
        pass


def test_results_come_in_the_cases_order_and_late_ones_are_left_out():
    some = [Case(n, 16, 16, 1) for n in range(20)]
    seen = []
    until = time.monotonic() + 60
    done = list(
        workers.check_all(
            some, "cpu", 4, until, make_worker=FakeWorker, on_result=lambda c, r: seen.append(c.N)
        )
    )
    assert [case.N for case, _ in done] == list(range(20))
    assert sorted(seen) == list(range(20))
    assert done[13][1]["status"] == "failed"
    assert "no process" in done[13][1]["problems"][0]
    assert all(result["n"] == case.N for case, result in done if case.N != 13)
    late = list(workers.check_all(some, "cpu", 4, time.monotonic() - 1, make_worker=FakeWorker))
    assert {result["status"] for _, result in late} == {"left out"}


def test_a_worker_outlives_a_death_and_a_hang(monkeypatch):
    """The real process, with stand-ins for its program."""
    program = (
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    n = json.loads(line)['N']\n"
        "    print('a line of a library', flush=True)\n"
        "    if n == 2: print('it broke', file=sys.stderr, flush=True); os._exit(7)\n"
        "    if n == 3: time.sleep(60)\n"
        "    answer = {'status': 'passed', 'problems': [], 'n': n}\n"
        "    print('hut-case ' + json.dumps(answer), flush=True)\n"
    )  # fmt: skip
    real = subprocess.Popen

    def popen(arguments, **options):
        assert arguments[1:] == ["-m", "benchmarks.gpu.workers", "cpu"]
        assert options["env"]["SOME"] == "thing"
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    worker = workers.Worker("cpu", {"SOME": "thing"})
    try:
        results = [worker.check(Case(n, 16, 16, 1), 20.0 if n != 3 else 1.5) for n in (1, 2, 3, 4)]
        other = Case(2, 16, 16, 1, kernel="forward", row={"BN": 16})
        assert worker.check(other, 20.0)["status"] == "unfit"
    finally:
        worker.close()
    assert [result["status"] for result in results] == ["passed", "failed", "failed", "passed"]
    assert "died (7): it broke" in results[1]["problems"][0]
    assert "no answer in 2 s" in results[2]["problems"][0]
    assert results[3]["n"] == 4


@triton_only
def test_a_changed_row_reaches_the_kernels():
    """Each kernel with other tiles, in the interpreter; and a row that cannot be is `unfit`."""
    some = [
        lists.candidate(kernel, 20, 48, 80, 4, change, dtype="float32")
        for kernel, change in (
            ("forward", {"BN": 16, "BK": 16}),
            ("grad_input", {"BO": 16}),
            ("grad_factors", {"BK": 32, "GROUP": 4}),
            ("weight", {"BO": 32}),
            ("grad_reduce", {"BK": 16}),
            ("forward", {"no such field": 1}),
        )
    ]
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    *right, wrong = workers.check_all(some, "cpu", 1, time.monotonic() + 200, env)
    for case, result in right:
        assert result["status"] == "passed", (case, result)
        assert result["missing"] == []
        row = result["rows"][case.kernel]
        assert all(row[name] == value for name, value in case.row.items())
    assert wrong[1]["status"] == "unfit"


# Sanitizer


CLEAN = "========= COMPUTE-SANITIZER\nhut-sanitized 12\n========= ERROR SUMMARY: 0 errors\n"
BROKEN = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    "=========     at hut_forward_kernel+0x10\n========= ERROR SUMMARY: 3 errors\n"
)
RACE = (
    "========= Error: Race reported between Write access and Read access\nhut-sanitized 12\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)
REFUSED = "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error\n"


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        (CLEAN, 0, "clean"),
        (BROKEN, 1, "findings"),
        (RACE, 0, "findings"),
        (REFUSED, 1, "did not run"),
        ("Unknown option --kernel-name", 1, "did not run"),
        ("========= COMPUTE-SANITIZER\n", None, "did not run"),
    ],
)
def test_what_the_sanitizer_says(output, code, status):
    found = sanitizer.verdict("memcheck", output, code)
    assert found["status"] == status
    assert status == "clean" or found["detail"]


def test_the_sanitizers_run_beside_and_try_another_filter(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    log = tmp_path / "log"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        'case "$*" in *--kernel-name*) echo unknown option; exit 1;; esac\n'
        'test -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" || exit 2\n'
        "echo hut-sanitized 12; echo '========= ERROR SUMMARY: 0 errors'\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    found = sanitizer.Sanitizers(time.monotonic() + 60, str(tool)).results()
    assert {one["status"] for one in found.values()} == {"clean"}
    assert set(found) == {"memcheck", "racecheck"}
    lines = log.read_text().splitlines()
    assert len(lines) == 4
    assert all(line.endswith("-m benchmarks.gpu.sanitizer") for line in lines)


def test_a_sanitizer_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    late = tmp_path / "late"
    tool.write_text(f"#!/bin/sh\n(sleep 4; touch {late}) &\nwait\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    begin = time.monotonic()
    found = sanitizer.Sanitizers(time.monotonic() + 1, str(tool)).results()
    assert time.monotonic() - begin < 3.5
    assert {one["status"] for one in found.values()} == {"did not run"}
    assert "out of time" in found["memcheck"]["detail"]
    time.sleep(max(0.0, 5 - (time.monotonic() - begin)))
    assert not late.exists()


def test_only_a_hazard_that_no_result_shows_lets_times_be_taken():
    race = {"case": "compute-sanitizer racecheck", "problems": ["1"]}
    access = {"case": "compute-sanitizer memcheck", "problems": ["1"]}
    assert not command._blocking([])
    assert not command._blocking([race])
    assert command._blocking([race, access])


def test_without_a_sanitizer_it_says_so(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    found = sanitizer.Sanitizers(time.monotonic()).results()
    assert {one["status"] for one in found.values()} == {"not installed"}


def test_the_sanitized_cases_are_right_cases():
    compiled = [case for case in sanitizer.small_cases(True) if case.backend == "cuda"]
    assert {case.transform for case in compiled} == {"low_rank", "two_sided"}
    assert {case.strategies for case in compiled} == {cases.STAGED}
    assert "shifted" in {case.layout for case in compiled}
    triton = sanitizer.small_cases(False)
    assert [*triton, *compiled] == sanitizer.small_cases(True)
    for case in triton:
        some = dataclasses.replace(case, backend="torch", dtype="float32")
        assert cases.check(some, CPU)["status"] == "passed"


# Timers


class FakeCuda:
    """The part of torch.cuda that the timers use; a call takes the time it says."""

    def __init__(self):
        self.clock, self.captured, self.log = 0.0, None, []
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = fake.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                for call in self.calls:
                    call()

            def reset(self):
                fake.log.append("reset")

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                assert isinstance(other, Stream)

        @contextlib.contextmanager
        def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
            assert isinstance(stream, Stream)
            fake.captured = cuda_graph.calls = []
            yield
            fake.captured = None

        @contextlib.contextmanager
        def stream(of):
            yield

        self.names = {
            "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": graph, "stream": stream,
            "current_stream": lambda device=None: Stream(),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (1 << 30, 1 << 31),
        }  # fmt: skip

    def call(self, seconds):
        def run():
            if self.captured is None:
                self.clock += seconds
            else:
                self.captured.append(run)

        return run

    def install(self, patch):
        for name, value in self.names.items():
            assert hasattr(torch.cuda, name)
            patch.setattr(torch.cuda, name, value)


def test_graph_times_are_per_call(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    timer = timing.GraphTimer(CPU)
    found = timer([fake.call(1e-3), fake.call(3e-3)], 0.1)
    assert found.median == pytest.approx(2e-3)
    assert found.samples == pytest.approx(0.1 / 8e-3, abs=1)  # four calls a replay
    assert timer([fake.call(1e-6)], 0.1).samples == 200
    assert timer([fake.call(1.0)], 0.1).samples == 9
    assert fake.log == ["reset"] * 3


def test_the_cuda_names_exist_with_the_arguments_used():
    """What the fakes stand for, in the installed torch."""
    import inspect

    assert {"stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
    for name in ("replay", "reset"):
        assert callable(getattr(torch.cuda.CUDAGraph, name))
    for name in ("record", "synchronize", "elapsed_time"):
        assert callable(getattr(torch.cuda.Event, name))
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_host_times_are_per_call():
    timer = timing.HostTimer(CPU, min_rounds=3)
    found = timer([lambda: time.sleep(0.002)] * 2, 0.0)
    assert 0.002 <= found.median < 0.05
    assert found.samples == 3


def test_as_many_sets_as_the_cache_needs():
    assert timing.sets_for(1 << 20, 50 << 20, 1 << 34) == 64
    assert timing.sets_for(32 << 20, 64 << 20, 1 << 34) == 9
    assert timing.sets_for(1 << 30, 64 << 20, 1 << 34) == 2
    assert timing.sets_for(1 << 34, 64 << 20, 1 << 34) == 1


# Findings


def test_a_break_even_is_where_the_curves_cross():
    """Fused 1 + N/100, staged 3 + N/200: equal at N = 400."""
    points = [(n, (1 + n / 100) / (3 + n / 200)) for n in (1, 16, 64, 256, 512, 1024)]
    found = findings.break_even(points)
    assert found.kind == "crossed"
    assert 380 <= found.tokens <= 420
    assert found.regret == 0
    assert findings.break_even(reversed(points)) == found


def test_a_break_even_at_the_ends():
    assert findings.break_even([(1, 1.2), (64, 1.5)]).kind == "never"
    assert findings.break_even([(1, 1.2), (64, 1.5)]).tokens == 0
    assert findings.break_even([(1, 0.5), (64, 0.7)]) == findings.Crossing(64, "always", 0)
    assert findings.break_even([(8, 0.9)]).tokens == 8
    assert findings.break_even([(8, 1.0), (64, 1.0)]).tokens == 64
    with pytest.raises(ValueError, match="no points"):
        findings.break_even([])
    with pytest.raises(ValueError, match="positive"):
        findings.break_even([(1, math.nan)])


def test_a_break_even_of_noisy_curves_loses_least():
    """A single point out of order does not decide."""
    points = [(1, 0.5), (2, 1.03), (4, 0.5), (64, 0.8), (256, 1.3), (512, 0.99), (1024, 2.0)]
    found = findings.break_even(points)
    assert 64 <= found.tokens < 256
    assert 0 < found.regret < 0.02


def tokens_row(part, N, plain, fused, other, **more):
    layer = Layer(4096, 4096, **more)
    figures = {"plain": plain, "fused": fused, findings.OTHER[part]: other}
    return {
        "suite": "tokens",
        **layer.as_dict(),
        "N": N,
        "part": part,
        "floor": plain / 2,
        **{name: Quantiles(v, v, v, 9).as_dict() for name, v in figures.items()},
    }


def curves(**more):
    """Fused up to 300, staged beyond; on the H200's estimates fused is planned up to 400."""
    return [
        tokens_row(part, N, 1.0, 1.05 if N <= 256 else 1.6, 1.3 if N <= 256 else 1.08, **more)
        for part in findings.OTHER
        for N in (1, 16, 256, 350, 512, 4096)
    ]


def test_crossings_and_the_proposed_entry():
    found = findings.crossings([*curves(), *curves(transform="two_sided")])
    assert len(found) == 6
    assert all(one["kind"] == "crossed" and 256 < one["tokens"] < 350 for one in found)
    proposed = findings.proposal(found, H200, "gpu-nvidia-h200-2030-01-01.json")
    assert all(256 <= tokens < 350 for tokens in proposed["tokens"].values())
    entry = eval("{" + proposed["entry"] + "}", {"BreakEven": planner.BreakEven})
    assert list(entry) == ["NVIDIA H200"]
    assert entry["NVIDIA H200"].source == "gpu-nvidia-h200-2030-01-01.json"
    assert proposed["now"]["source"] == planner.break_even(H200).source
    assert findings.proposal(found[:1], H200, "x")["entry"] is None
    assert findings.proposal([], H200, "x")["entry"] is None


def test_a_measured_entry_goes_before_the_architectures(monkeypatch):
    own = planner.BreakEven(7, 8, 9, "record.json")
    monkeypatch.setitem(planner.BREAK_EVENS, "NVIDIA H200", own)
    assert planner.break_even(H200) is own
    driver = dataclasses.replace(H200, name="NVIDIA H200 NVL")
    assert planner.break_even(driver) is own
    assert planner.break_even(planner.find_device("H100")) is planner.BREAK_EVENS["sm_90"]
    assert "unknown" in planner.break_even(planner.Device("?", "sm_999", 1, 1, 1)).source


def test_verdicts():
    judged = findings.verdicts(curves(), H200)
    by = {(one["target"], one["transform"]): one for one in judged}
    assert len(by) == 2 * len(findings.TARGETS)
    for target in findings.TARGETS:
        assert by[target.name, "two_sided"]["met"] is None
        one = by[target.name, "low_rank"]
        if target.suite == "step":
            assert one["met"] is None
        elif target.most == 16:
            assert one["met"] is True
            assert one["planned"] == pytest.approx(1.05)
            assert one["tokens"] == [1, 16]
        else:
            assert one["planned"] == pytest.approx(1.08)
            assert one["met"] is True
    slow = [tokens_row("forward", N, 1.0, 1.3, 1.05) for N in (1, 16)]
    one = findings.verdicts(slow, H200)[0]
    assert (one["met"], one["planned"], one["best"]) == (False, 1.3, 1.05)
    step = {"suite": "step", **Layer(4096, 4096).as_dict(), "N": 4096}
    step |= {"plain": {"median": 2.0}, "planned": {"median": 2.2}, "fused": {"error": "no"}}
    assert findings.verdicts([step], H200)[-2]["planned"] == pytest.approx(1.1)


def tiles_row(before, after, *candidates):
    return {
        "suite": "tiles",
        **Layer(4096, 4096).as_dict(),
        "kernel": "forward",
        "N": 16,
        "row": {"BN": 16, "BO": 64, "BK": 128, "warps": 4, "stages": 3},
        "before": {"median": before},
        "after": {"median": after},
        "candidates": [
            {"change": {"BO": size}, "status": "passed", "time": {"median": value}}
            for size, value in candidates
        ],
    }


def test_tile_changes_must_beat_the_noise():
    (found,) = findings.tile_changes([tiles_row(1.0, 1.01, (32, 0.8), (128, 0.9))])
    assert found["worth_it"]
    assert found["change"] == {"BO": 32}
    assert found["ratio"] == pytest.approx(0.8)
    assert not findings.tile_changes([tiles_row(1.0, 1.01, (32, 0.98))])[0]["worth_it"]
    assert not findings.tile_changes([tiles_row(1.0, 1.2, (32, 0.8))])[0]["worth_it"]
    assert findings.tile_changes([tiles_row(1.0, 1.0)]) == []
    wrong = tiles_row(1.0, 1.0, (32, 0.9))
    wrong["candidates"].append({"change": {"BK": 64}, "status": "failed", "problems": ["y"]})
    assert findings.tile_changes([wrong])[0]["wrong"] == [{"BK": 64}]


@dataclasses.dataclass(frozen=True)
class RowOfTheFuture:
    """A row with fields that a later table may have."""

    BN: int = 16
    BO: int = 64
    BK: int = 256
    warps: int = 4
    stages: int = 1
    TMA: bool = False
    SPLIT_K: int = 2
    GROUP: int = 8
    maxnreg: int | None = 128

    def __post_init__(self):
        if self.TMA and self.BO > 64:
            raise ValueError("no such row")


@dataclasses.dataclass(frozen=True)
class RowWithSwitches(RowOfTheFuture):
    W_FIRST: bool = False
    settle: bool = True


def test_alternatives_are_other_possible_rows():
    row = RowOfTheFuture()
    changes = suites.alternatives(row, "forward")
    rows = [dataclasses.replace(row, **change) for change in changes]
    assert len(set(rows)) == len(rows)
    assert row not in rows
    for change in (
        {"BN": 32}, {"BO": 32}, {"BO": 128}, {"BK": 128}, {"warps": 8}, {"stages": 2},
        {"TMA": True}, {"SPLIT_K": 1}, {"SPLIT_K": 4}, {"maxnreg": None},
    ):  # fmt: skip
        assert change in changes, change
    assert all(one.BN >= 16 and one.BK <= 256 and one.stages >= 1 for one in rows)
    assert {"BN": 8} not in changes
    assert suites.alternatives(RowWithSwitches(W_FIRST=True), "grad_input").count({"settle": False})
    assert {"W_FIRST": True} in suites.alternatives(RowWithSwitches(), "forward")
    assert {"W_FIRST": True} not in suites.alternatives(RowWithSwitches(), "weight")
    for kernel in ("weight", "grad_reduce"):
        assert not any("BN" in change for change in suites.alternatives(row, kernel))


@triton_only
@pytest.mark.parametrize("device", planner.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("kernel", suites.TILES)
def test_every_row_of_the_table_has_alternatives(device, kernel):
    bench = bench_of(limits=device)
    for N in suites.TILE_TOKENS[kernel]:
        for r in (16, 64):
            row = suites.current_row(bench, Layer(4096, 4096, r), kernel, N)
            changes = suites.alternatives(row, kernel)
            assert len(changes) >= 3
            for change in changes:
                assert dataclasses.replace(row, **change) != row
    some = suites.tile_cases(bench, Layer(4096, 4096), {kernel: suites.TILE_TOKENS[kernel]})
    assert {case.kernel for case in some} == {kernel}


# The whole command with a fake device


def constant_timer(calls, seconds):
    """Runs every call once, and says that it took a time that depends on nothing."""
    for call in calls[:1]:
        call()
    return Quantiles(1e-3, 1e-3, 1e-3, 9)


def bench_of(limits=H200, backend="torch", **more):
    return suites.Bench(CPU, limits, constant_timer, constant_timer, backend=backend, **more)


def fake_run(folder, backend="torch", dtype="bfloat16", quick=False, broken=(), **options):
    """`on_device` itself, with the device's calls replaced, on a small layer.

    `broken`: suites that raise.
    """
    layer = Layer(48, 64, 4, dtype=dtype)
    layers = (layer, dataclasses.replace(layer, transform="two_sided"))
    properties = SimpleNamespace(major=9, minor=0, total_memory=1 << 37)
    patch = pytest.MonkeyPatch()
    real_check_all = workers.check_all
    checked = []

    def check_all(some, device, jobs, until, **more):
        """In this process, at a small size, on the CPU."""
        assert device == "cuda"
        assert jobs >= 1
        checked.extend(some)
        small = [
            dataclasses.replace(
                case, N=min(case.N, 20), K=48, O=64, r=min(case.r, 4), dtype="float32",
                weight_dtype=None, factor_dtype="float32", backend=backend, update=None, tf32=False,
            )
            for case in some[:6]
        ]  # fmt: skip

        class Here:
            def __init__(self, device, env):
                pass

            def check(self, case, seconds):
                return cases.check(case, CPU)

            def close(self):
                pass

        return real_check_all(small, "cpu", 1, until, make_worker=Here, **more)

    def breaks(*args, **kwargs):
        raise RuntimeError("planted")

    FakeCuda().install(patch)
    for owner, name, value in (
        (torch.cuda, "get_device_properties", lambda device: properties),
        (torch.cuda, "get_device_name", lambda device: H200.name),
        (command, "_device", lambda: CPU),
        (command.dispatch, "gpu", lambda device: H200),
        (command, "GraphTimer", lambda device: constant_timer),
        (command, "HostTimer", lambda device: constant_timer),
        (command, "LAYERS", layers),
        (command, "QUICK_LAYERS", layers),
        (command, "STEP_TOKENS", (5,)),
        (command, "QUICK_STEP_TOKENS", (5,)),
        (command.gc, "freeze", lambda: None),
        (command.extension, "missing", lambda: "not built"),
        (suites, "TOKENS", (1, 16, 20)),
        (suites, "QUICK_TOKENS", (1, 16)),
        (suites, "TILE_TOKENS", dict.fromkeys(suites.TILES, (16,))),
        (workers, "check_all", check_all),
        (sanitizer.shutil, "which", lambda name: None),
        (signal, "signal", lambda *args: None),
        *((suites, name, breaks) for name in broken),
    ):
        patch.setattr(owner, name, value)
    real_ceilings, real_bench_of = suites.ceilings, command.bench_of
    patch.setattr(
        suites, "ceilings", lambda bench, size: real_ceilings(bench, size=64, copy_bytes=1 << 16)
    )
    patch.setattr(
        command,
        "bench_of",
        lambda *args: dataclasses.replace(real_bench_of(*args), backend=backend, cache=1 << 12),
    )
    given = {"quick": quick, "out": folder, "seconds": 200.0, "jobs": None, "keep_going": False}
    try:
        code = command.on_device(argparse.Namespace(**{**given, **options}))
    finally:
        patch.undo()
    (file,) = folder.glob("*.json")
    return code, json.loads(file.read_text()), checked


@triton_only
def test_the_whole_command_on_a_fake_device(tmp_path, capsys):
    code, record, checked = fake_run(tmp_path)
    out = capsys.readouterr().out
    assert code == 0, out
    assert record["complete"] is True
    assert record["schema_version"] == records.SCHEMA_VERSION
    assert record["suite"] == "gpu"
    assert [phase["name"] for phase in record["phases"]] == [
        "correctness", "large", "sanitizer", "ceilings", "tokens", "steps", "weight", "launching",
        "tiles", "tile checks", "conclusions", "summary",
    ]  # fmt: skip
    assert not any("broke off" in phase["note"] for phase in record["phases"]), record["phases"]
    wanted = {"driver", "commit", "dirty", "date", "versions", "device_name", "capability"}
    assert wanted <= set(record["environment"])
    assert record["correctness"]["counts"]["passed"] > 0
    assert record["correctness"]["failures"] == []
    assert record["extension"] == "not built"
    suites_seen = {row["suite"] for row in record["rows"]}
    assert suites_seen == {"tokens", "step", "weight", "tiles"}
    for row in record["rows"]:
        if row["suite"] == "tokens":
            names = {"plain", "fused", findings.OTHER[row["part"]]}
            assert all(row[name]["median"] == 1e-3 for name in names), row
            assert row["floor"] > 0
    assert any(one.get("time") for row in record["rows"] for one in row.get("candidates", []))
    for word in (
        "Ceilings",
        "fused/plain",
        "Targets",
        "planner.BREAK_EVENS",
        "tables.py",
        "Record",
    ):
        assert word in out, word
    assert "H200" in record["proposal"]["entry"]
    assert len(checked) > len(lists.device_cases(False))


@triton_only
def test_the_whole_command_through_the_interpreted_kernels(tmp_path):
    """Rows, launchers and forced strategies as on a device; only the clock is not one."""
    code = (
        "from pathlib import Path\n"
        "from tests.test_gpu_command import fake_run\n"
        f"code, record, _ = fake_run(Path({str(tmp_path)!r}), 'triton', 'float16')\n"
        "assert code == 0, record['phases']\n"
        "broken = [p for p in record['phases'] if 'broke off' in p['note']]\n"
        "assert not broken, broken\n"
        "errors = [v for row in record['rows'] for v in row.values() if isinstance(v, dict)"
        " and 'error' in v]\n"
        "assert not errors, errors\n"
        "assert set(record['correctness']['rows_checked']) == {'forward', 'weight', 'grad_input',"
        " 'grad_factors', 'grad_reduce'}\n"
        "assert record['correctness']['elsewhere'] == []\n"
        "tiles = [row for row in record['rows'] if row['suite'] == 'tiles']\n"
        "assert any('time' in one for row in tiles for one in row['candidates']), tiles\n"
    )
    done = python(code, INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quick_leaves_tiles_out_and_says_so(tmp_path, capsys):
    code, record, _ = fake_run(tmp_path, quick=True)
    assert code == 0
    assert "--quick" in next(p for p in record["phases"] if p["name"] == "tiles")["note"]
    assert "left out by --quick" in capsys.readouterr().out
    assert next(tmp_path.iterdir()).stem.endswith("-quick")


def test_a_failed_check_stops_the_measuring(tmp_path, monkeypatch, capsys):
    right = cases.run
    monkeypatch.setattr(
        cases, "run", lambda case, inputs: {n: 1.1 * v for n, v in right(case, inputs).items()}
    )
    code, record, _ = fake_run(tmp_path)
    assert code == 1
    assert record["rows"] == []
    assert record["complete"] is False
    assert record["correctness"]["failures"]
    assert "A check FAILED" in capsys.readouterr().out


@triton_only
def test_a_failed_check_and_keep_going_measures_but_fails(tmp_path, monkeypatch):
    right = cases.run
    monkeypatch.setattr(
        cases, "run", lambda case, inputs: {n: 1.1 * v for n, v in right(case, inputs).items()}
    )
    code, record, _ = fake_run(tmp_path, keep_going=True)
    assert code == 1
    assert record["rows"]


@triton_only
@pytest.mark.parametrize("suite", ["over_tokens", "steps", "weights", "tile_cases", "tiles"])
def test_a_phase_that_breaks_off_leaves_the_others(tmp_path, suite):
    code, record, _ = fake_run(tmp_path, broken=[suite])
    assert code == 2
    assert record["complete"] is True
    assert any("planted" in phase["note"] for phase in record["phases"])
    assert {row["suite"] for row in record["rows"]}
    assert record["verdicts"]


def test_time_that_is_up_is_said(tmp_path, capsys):
    code, record, _ = fake_run(tmp_path, seconds=1e-6)
    assert code == 1  # not one check ran
    assert record["correctness"]["counts"] == {"left out": 10}
    assert "did not fit into the time" in capsys.readouterr().out


def test_record_files_do_not_overwrite_each_other(tmp_path):
    first = command.record_file(tmp_path, "NVIDIA H200", False)
    assert first.name.startswith("gpu-nvidia-h200-20")
    first.write_text("{}")
    second = command.record_file(tmp_path, "NVIDIA H200", False)
    assert second.name == first.name.replace(".json", "-2.json")
    assert "quick" in command.record_file(tmp_path, "NVIDIA H200", True).name


def interrupted(run):
    run.add({"suite": "tokens", "N": 1, "bad": math.inf})
    raise KeyboardInterrupt


def test_a_record_survives_its_way_through_json(tmp_path):
    run = command.Run(tmp_path / "gpu.json", 10.0, {"quick": False})
    with pytest.raises(KeyboardInterrupt), run.phase("ceilings"):
        interrupted(run)
    record = json.loads(run.out.read_text())
    assert record["rows"] == [{"suite": "tokens", "N": 1, "bad": None}]
    assert record["complete"] is False
    assert record["phases"][0]["name"] == "ceilings"


def test_the_driver_may_be_silent(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert command._driver(("driver_version",), 0) == []
    answer = SimpleNamespace(stdout="580.1, 1980 MHz\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    assert command._driver(("driver_version", "clocks.max.sm"), 0) == ["580.1", "1980 MHz"]
    assert command._driver(("driver_version",), 3) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_timer_on_a_device():
    device = torch.device("cuda", 0)
    a = torch.randn(512, 512, device=device)
    found = timing.GraphTimer(device)([lambda: a @ a, lambda: a + a], 0.01)
    assert 0 < found.p20 <= found.median <= found.p80
