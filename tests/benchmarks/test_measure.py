"""Timing, memory counts, text tables and records."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")


from benchmarks import measure, progress, records
from benchmarks.report import text

CPU = torch.device("cpu")


class TestMeasure:
    def test_each_case_runs_once_per_round_in_a_changing_order(self):
        order = []
        cases = {name: measure.Call(lambda name=name: order.append(name)) for name in "abc"}
        times = measure.interleaved(cases, CPU, seconds=60, rounds=4)
        assert [len(values) for values in times.values()] == [4, 4, 4]
        rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
        assert rounds[:4] == ["abc", "bca", "cab", "abc"]

    @pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
    def test_no_case_follows_itself(self, names):
        order = []
        cases = {name: measure.Call(lambda name=name: order.append(name)) for name in names}
        measure.interleaved(cases, CPU, seconds=60, rounds=9)
        assert all(a != b for a, b in pairwise(order))

    def test_time_ends_the_rounds_but_not_before_the_fewest(self):
        cases = {"slow": measure.Call(lambda: time.sleep(0.01))}
        times = measure.interleaved(cases, CPU, seconds=0, min_rounds=3)
        assert len(times["slow"]) == 3
        assert min(times["slow"]) >= 0.01

    def test_a_case_that_fails_is_dropped_and_the_others_go_on(self):
        runs = []

        def fails_late():
            runs.append(1)
            if len(runs) > 3:
                raise MemoryError("out of memory\nand more")

        cases = {"late": measure.Call(fails_late), "good": measure.Call(lambda: None)}
        failed = {}
        times = measure.interleaved(cases, CPU, seconds=60, rounds=6, failed=failed)
        assert failed == {"late": "MemoryError: out of memory"}
        assert list(times) == ["good"]
        assert len(times["good"]) == 6
        assert len(runs) == 4
        with pytest.raises(MemoryError):
            measure.interleaved(cases, CPU, seconds=60, rounds=6)

    @pytest.mark.parametrize(("replay", "order"), [(False, ["wait", "run"]), (True, ["run"])])
    def test_the_flush_hides_only_the_host_time_of_replays(self, monkeypatch, replay, order):
        seen = []
        event = SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 2.0
        )
        for name, stand_in in {
            "Event": lambda **_: event,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=8),
            "synchronize": lambda device: seen.append("wait"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        case = measure.Call(lambda: seen.append("run"), replay=replay)
        assert measure._CudaTimer(CPU)(case) == 2e-3
        assert seen == order

    def test_a_thread_works_on_the_device_that_is_measured(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            torch.cuda, "device", lambda device: contextlib.nullcontext(seen.append(device))
        )
        second = torch.device("cuda", 1)
        assert measure._in_a_thread(lambda: 3, second) == 3
        assert seen == [second]

    def test_preparation_is_not_timed(self):
        case = measure.Call(lambda: None, prepare=lambda: time.sleep(0.02))
        times = measure.interleaved({"case": case}, CPU, seconds=0, min_rounds=1)
        assert max(times["case"]) < 0.02

    def test_a_ratio_is_taken_round_by_round(self):
        assert measure.ratios([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]).p20 == 0.5

    def test_peak_bytes_count_simultaneously_live_tensors(self):
        resident = torch.ones(1000)

        def run():
            first = resident * 2
            del first
            second, third = resident * 3, resident * 4
            return second, third

        peak = measure.peak_bytes(measure.Call(run), CPU)
        assert 8000 <= peak <= 8000 + 64  # PyTorch may wrap the numbers into tensors

    def test_peak_bytes_see_inside_operators(self):
        library = torch.library.Library("benchmarks_test", "FRAGMENT")
        library.define("doubled(Tensor x) -> Tensor")
        library.impl("doubled", lambda x: x.repeat(10)[: len(x)].clone() * 2, "CPU")
        x = torch.ones(1000)
        case = measure.Call(lambda: torch.ops.benchmarks_test.doubled(x))
        assert measure.peak_bytes(case, CPU) >= 40_000

    def test_peak_bytes_count_a_workspace_that_calls_share(self):
        buffers = threading.local()

        def run():
            if not hasattr(buffers, "one"):
                buffers.one = torch.ones(10_000)
            return buffers.one.sum()

        run()
        case = measure.Call(run)
        assert measure.peak_bytes(case, CPU) >= 40_000
        assert measure.kept_bytes(case, CPU) < 100

    def test_kept_bytes_are_those_at_the_end_not_at_the_peak(self):
        case = measure.Call(lambda: (torch.ones(10_000) * 2)[:100].clone())
        assert 400 <= measure.kept_bytes(case, CPU) < 500

    def test_a_backward_is_timed_without_its_forward(self):
        ran = []
        layer = torch.nn.Linear(3, 3)
        layer.register_forward_hook(lambda *_: ran.append("forward"))
        x = torch.ones(2, 3, requires_grad=True)
        case = measure.backward_call(layer, x, torch.ones(2, 3))
        for _ in range(2):
            case.prepare()
            assert ran.pop() == "forward"
            case.run()
            assert not ran
        torch.testing.assert_close(x.grad, torch.ones(2, 3) @ layer.weight)  # not added up

    def test_threads_are_never_more_than_there_were(self):
        threads = torch.get_num_threads()
        try:
            before, now = measure.settle_threads(seconds=0.05)
            assert before == threads
            assert now == torch.get_num_threads()
            assert now in (1, threads)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_resident_bytes_see_written_pages(self):
        size = 64 * 2**20
        # In a process of its own: this one may have as many pages at hand already.
        lines = (
            "import torch",
            "from benchmarks import measure",
            f"print(measure.peak_resident_bytes(lambda: torch.ones({size} // 4)))",
        )
        command = [sys.executable, "-c", "; ".join(lines)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=records.ROOT)
        if done.stdout.strip() == "None":
            pytest.skip("this system does not let the mark be set back")
        assert 0.9 * size < int(done.stdout) < 1.5 * size


class TestText:
    def test_columns_line_up(self):
        lines = text.table("title", ["", "x"], [["a", "1"], ["bcd", "1000"]]).splitlines()
        assert lines[3:] == ["a       1", "bcd  1000"]

    def test_an_interval_stands_only_where_there_is_one(self):
        assert text.ratio({"p20": 1.0, "median": 1.0, "p80": 1.0}) == "1.00"
        assert text.ratio({"p20": 0.9, "median": 1.0, "p80": 1.1}) == "1.00 (0.90–1.10)"


class TestProgress:
    def test_lines_are_printed_outside_a_terminal(self, capsys, monkeypatch):
        """At each tenth, and after a silence though no tenth is done."""
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        with progress.Progress("stage", 100) as one:
            one.to(9, "nothing to say yet")
            one.to(10, "a tenth")
            one.to(11)
            now[0] += progress.SILENCE + 1
            one.to(12, "still at it")
        said = capsys.readouterr().err.splitlines()
        assert said == ["stage: begins", "stage:  10 %  a tenth", "stage:  12 %  still at it"]


class TestRecords:
    def test_any_reader_takes_them(self, tmp_path):
        file, row = tmp_path / "a" / "r.json", {"suite": "demo", "loss": [float("nan"), 1.0]}
        records.write(file, [row], records.environment(CPU))
        assert json.loads(file.read_text(), parse_constant=pytest.fail)["loss"] == [None, 1.0]

    def test_the_environment_tells_versions(self):
        environment = records.environment(CPU)
        assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert environment["device"] == "cpu"
