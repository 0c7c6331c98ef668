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
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import findings, suites, timing
from benchmarks.gpu.suites import Subject
from benchmarks.measure import Quantiles
from benchmarks.report import targets
from hut_kernels import devices

from ..gpu import cases, lists, sanitizer, workers

ROOT = Path(__file__).resolve().parents[2]
H200 = devices.find_device("H200")
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
        "import tests.gpu.workers\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No GPU to run on: no CUDA device" in done.stdout
    assert f"{len(lists.tiny_cases(True))} passed" in done.stdout
    for device in devices.DEVICES:
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


def test_only_a_hazard_that_no_result_shows_lets_times_be_taken():
    race = {"case": "compute-sanitizer racecheck", "problems": ["1"]}
    access = {"case": "compute-sanitizer memcheck", "problems": ["1"]}
    assert not command._blocking([])
    assert not command._blocking([race])
    assert command._blocking([race, access])


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
    """The names that the fakes replace exist in the installed torch."""
    import inspect

    assert {"stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
    for name in ("replay", "reset"):
        assert callable(getattr(torch.cuda.CUDAGraph, name))
    for name in ("record", "synchronize", "elapsed_time"):
        assert callable(getattr(torch.cuda.Event, name))
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):  # hence the switch itself is read, which always can be
            torch.get_float32_matmul_precision()
        matmul.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


def test_the_users_own_precision_setting_is_kept():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with cases.forced(cases.Check(16, 64, 64, 4)):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


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
    layer = Subject(4096, 4096, **more)
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
    entry = eval("{" + proposed["entry"] + "}", {"BreakEven": devices.BreakEven})
    assert list(entry) == ["NVIDIA H200"]
    assert entry["NVIDIA H200"].source == "gpu-nvidia-h200-2030-01-01.json"
    assert proposed["now"]["source"] == devices.break_even(H200).source
    assert findings.proposal(found[:1], H200, "x")["entry"] is None
    assert findings.proposal([], H200, "x")["entry"] is None


def test_a_measured_entry_goes_before_the_architectures(monkeypatch):
    own = devices.BreakEven(7, 8, 9, "record.json")
    monkeypatch.setitem(devices.BREAK_EVENS, "NVIDIA H200", own)
    assert devices.break_even(H200) is own
    driver = dataclasses.replace(H200, name="NVIDIA H200 NVL")
    assert devices.break_even(driver) is own
    assert devices.break_even(devices.find_device("H100")) is devices.BREAK_EVENS["sm_90"]
    assert "unknown" in devices.break_even(devices.Device("?", "sm_999", 1, 1, 1)).source


def judged(rows):
    found = list(findings.as_rows(rows, {**records.environment(CPU), "device": "cuda"}, H200))
    return [line[1:] for line in targets.table(found, targets.KERNELS).rows]


def test_targets_are_judged_by_the_planners_choice():
    lines = judged(curves())
    said = {(line[1].partition(",")[2], line[1].partition("x")[0]): line for line in lines}
    assert said[" forward, low_rank, bfloat16", "16"][2:] == ["1.05", targets.MET]
    assert said[" grad_factors, low_rank, bfloat16", "4096"][2:] == ["1.08", targets.MET]
    assert [line[-1] for line in lines].count(targets.UNMEASURED) == 3  # a step, two of launching
    slow = [tokens_row("forward", N, 1.0, 1.3, 1.05) for N in (1, 16)]
    assert [line[2:] for line in judged(slow)[:2]] == [["1.30", targets.MISSED]] * 2
    step = {
        "suite": "step",
        **Subject(4096, 4096).as_dict(),
        "N": 4096,
        "fused": {"error": "no"},
    }
    step |= {name: Quantiles(v, v, v, 9).as_dict() for name, v in (("plain", 2), ("planned", 2.2))}
    assert judged([step])[4][2:] == ["1.10", targets.MET]


def tiles_row(before, after, *candidates):
    return {
        "suite": "tiles",
        **Subject(4096, 4096).as_dict(),
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
    wgmma_async: bool = True


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
    assert suites.alternatives(RowWithSwitches(W_FIRST=True), "grad_input").count(
        {"wgmma_async": False}
    )
    assert {"W_FIRST": True} in suites.alternatives(RowWithSwitches(), "forward")
    assert {"W_FIRST": True} not in suites.alternatives(RowWithSwitches(), "weight")
    for kernel in ("weight", "grad_reduce"):
        assert not any("BN" in change for change in suites.alternatives(row, kernel))


@triton_only
@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("kernel", suites.TILES)
def test_every_row_of_the_table_has_alternatives(device, kernel):
    bench = bench_of(limits=device)
    for N in suites.TILE_TOKENS[kernel]:
        for r in (16, 64):
            row = suites.current_row(bench, Subject(4096, 4096, r), kernel, N)
            changes = suites.alternatives(row, kernel)
            assert len(changes) >= 3
            for change in changes:
                assert dataclasses.replace(row, **change) != row
    some = suites.tile_cases(bench, Subject(4096, 4096), {kernel: suites.TILE_TOKENS[kernel]})
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
    layer = Subject(48, 64, 4, dtype=dtype)
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
        (command.devices, "gpu", lambda device: H200),
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
        "devices.BREAK_EVENS",
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
        "from tests.benchmarks.test_gpu import fake_run\n"
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
