"""The checks that `make gpu` makes on a device, made to pass and to fail on a CPU."""

import dataclasses
import json
import math
import stat
import subprocess
import sys
import time

import pytest
import torch

from .. import references
from . import cases, lists, sanitizer, workers
from .cases import FUSED, STAGED, Check

CPU = torch.device("cpu")
triton_only = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

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
    case = Check(**{"N": 24, "K": 40, "O": 36, "r": 4, "dtype": "float32", **TORCH, **form})
    result = cases.check(case, CPU)
    assert result["status"] == "passed", result
    assert json.loads(json.dumps(result)) == result
    assert all(error <= result["limits"][name] for name, error in result["errors"].items())
    wanted = {"y", "x", "hut_A", "hut_B", *case.vectors} if case.update is None else set()
    assert wanted <= set(result["errors"])


def test_a_staged_case_looks_at_the_merged_weight_too():
    result = cases.check(Check(8, 24, 32, 4, "float32", strategies=STAGED, backend="torch"), CPU)
    assert result["status"] == "passed", result
    assert "W" in result["errors"]


def test_a_sample_of_the_reference_is_the_whole_at_it(monkeypatch):
    for form in FORMS[:5]:
        case = Check(30, 200, 220, 5, "float32", **{**TORCH, **form})
        inputs = cases.make(case, CPU)
        whole = inputs.exact()
        monkeypatch.setattr(references, "SAMPLED", 1 << 10)
        at = cases.sample(case, CPU)
        monkeypatch.undo()
        assert len(at.rows) < 220
        for name, value in inputs.exact(at).items():
            picked = at.pick(name, whole[name]) if name != "W" else whole[name][at.rows]
            assert references.error(picked, value) < 1e-14, name


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
    result = cases.check(Check(24, 40, 36, 4, "float32", **TORCH), CPU)
    assert result["status"] == "failed"
    assert any(problem in one for one in result["problems"]), result


def test_memory_that_nobody_wrote_shows():
    with cases.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        torch.empty(3, dtype=torch.int64)


def test_raised_errors_are_told_apart(monkeypatch):
    def raising(error):
        def run(case, inputs):
            raise error

        monkeypatch.setattr(cases, "run", run)

    case = Check(8, 24, 24, 2, "float32", **TORCH)
    raising(torch.OutOfMemoryError("no room"))
    assert cases.check(case, CPU)["status"] == "skipped"
    raising(RuntimeError("CUDA error: an illegal memory access\nsecond line"))
    result = cases.check(case, CPU)
    assert result["status"] == "failed"
    assert "illegal memory access second line" in result["problems"][0]
    other = dataclasses.replace(case, kernel="forward", row={"BN": 16})
    assert cases.check(other, CPU)["status"] == "unfit"


def test_a_case_too_large_for_the_device_is_skipped_with_the_reason(monkeypatch):
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
        assert Check.load(json.loads(json.dumps(dataclasses.asdict(case)))) == case


def test_shifted_tensors_are_contiguous_at_an_odd_address():
    inputs = cases.make(Check(4, 32, 16, 2, layout="shifted"), CPU)
    for tensor in (inputs.x, inputs.weight, inputs.grad):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == tensor.element_size()


def test_limits_are_those_of_the_definition():
    bf16, fp16, fp32 = (Check(8, 14336, 64, 4, kind) for kind in ("bfloat16", "float16", "float32"))
    assert cases.limit(bf16, torch.bfloat16) == cases.limit(bf16, torch.float32) == 8e-3
    assert cases.limit(fp16, torch.float16) == 2e-3
    assert cases.limit(fp32, torch.float32) == 2e-6 * math.sqrt(14336 / 4096)
    assert cases.limit(dataclasses.replace(fp32, tf32=True), torch.float32) == 2e-3
    assert cases.limit(fp32, torch.bfloat16) > 2e-6 + 1e-3


# Lists


def test_the_lists_are_complete():
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
    some = [Check(n, 16, 16, 1) for n in range(20)]
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
        assert arguments[1:] == ["-m", "tests.gpu.workers", "cpu"]
        assert options["env"]["SOME"] == "thing"
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    worker = workers.Worker("cpu", {"SOME": "thing"})
    try:
        results = [worker.check(Check(n, 16, 16, 1), 20.0 if n != 3 else 1.5) for n in (1, 2, 3, 4)]
        other = Check(2, 16, 16, 1, kernel="forward", row={"BN": 16})
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
def test_reports_of_the_sanitizer(output, code, status):
    found = sanitizer.verdict("memcheck", output, code)
    assert found["status"] == status
    assert status == "clean" or found["detail"]


def test_the_sanitizers_try_another_filter(tmp_path):
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
    assert all(line.endswith("-m tests.gpu.sanitizer") for line in lines)


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
