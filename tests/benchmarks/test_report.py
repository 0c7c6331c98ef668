"""Records of the benchmark: valid or refused, told apart, compared, and the tables made of them."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import records
from benchmarks.report import compare, documents, tables, targets
from benchmarks.shapes import parsed

CPU = torch.device("cpu")


def quantiles(median, spread=0.04):
    return {
        "p20": median * (1 - spread),
        "median": median,
        "p80": median * (1 + spread),
        "samples": 9,
    }


def environment(**changes):
    return {**records.environment(CPU), "other_programs_share": 0.01, **changes}


def row(provider="hut_low_rank", seconds=1e-3, ratio=1.5, peak=1 << 20, **changes):
    labels = {"hut_low_rank": "HUT low_rank", "peft_lora": "LoRA (PEFT)"}
    return {
        "schema_version": records.SCHEMA_VERSION,
        "suite": "layer",
        "provider": provider,
        "label": labels.get(provider, provider),
        "types": {"compute": "float32", "weight": "float32", "adapter": "float32"},
        "case": {"tokens": 16, "in_features": 64, "out_features": 32, "r": 4},
        "seconds": {"step": quantiles(seconds)},
        "operations": {"step": 10**6},
        "floor_share": {"step": quantiles(0.8)},
        "versus": {"peft_lora": {"step": quantiles(ratio)}},
        "bytes": {"peak": peak},
        "environment": environment(),
        **changes,
    }


def pair(**changes):
    return [row("peft_lora", ratio=1.0), row(**changes)]


class TestRecords:
    def test_lines_come_back_as_they_went(self, tmp_path):
        rows = pair()
        records.write(tmp_path / "r.jsonl", rows, rows[0]["environment"])
        back = records.read(tmp_path / "r.jsonl")
        assert [one["provider"] for one in back] == ["peft_lora", "hut_low_rank"]
        assert back[1]["seconds"]["step"] == pytest.approx(rows[1]["seconds"]["step"])
        assert back[1]["case"] == rows[1]["case"]
        assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"schema_version": 0}, "schema_version must be"),
            ({"suite": "layers"}, "suite must be one of layer"),
            ({"environment": {}}, "environment lacks date"),
            ({"seconds": {"step": {**quantiles(1.0), "p80": 0.5}}}, "seconds.step: p20"),
            ({"seconds": {"step": {**quantiles(1.0), "p20": -1.0}}}, "positive"),
            ({"seconds": {"step": {**quantiles(1.0), "median": None}}}, "in order"),
            ({"seconds": {"step": {**quantiles(1.0), "samples": 0}}}, "one sample"),
            ({"bytes": {"peak": -1}}, "bytes.peak must be a count"),
            ({"left_out": ""}, "left_out must say why"),
        ],
    )
    def test_impossible_requests_are_refused(self, change, complaint):
        with pytest.raises(ValueError, match=complaint):
            records.validate({**row(), **change})

    @pytest.mark.parametrize("key", ["provider", "case", "seconds", "versus", "types"])
    def test_a_missing_key_is_named(self, key):
        one = row()
        del one[key]
        with pytest.raises(ValueError, match=f"lacks {key}"):
            records.validate(one)

    def test_a_bad_line_is_named_by_its_number(self, tmp_path):
        file = tmp_path / "r.jsonl"
        file.write_text(json.dumps(row()) + "\n{}\n")
        with pytest.raises(ValueError, match=r"r\.jsonl, line 2: schema_version"):
            records.read(file)
        file.write_text("no JSON\n")
        with pytest.raises(ValueError, match="line 1"):
            records.read(file)
        file.write_text("")
        with pytest.raises(ValueError, match="no record"):
            records.read(file)

    def test_nothing_is_written_where_a_row_is_not_valid(self, tmp_path):
        bad = row(suite="nothing")
        with pytest.raises(ValueError, match="suite"):
            records.write(tmp_path / "r.jsonl", [row(), bad], environment())
        assert not (tmp_path / "r.jsonl").exists()

    def test_machines_are_told_apart_and_their_dates_are_not(self):
        here = environment()
        assert records.machine(here) == records.machine({**here, "date": "another"})
        there = {**here, "device_name": "NVIDIA A100", "threads": 64}
        told = records.differences(records.machine(here), records.machine(there))
        assert [one.split(":")[0] for one in told] == ["device_name", "threads"]


class TestCompare:
    @pytest.mark.parametrize(
        ("seconds", "verdict"),
        [
            (1e-3, compare.LEVEL),
            (1.08e-3, compare.LEVEL),  # 8 % apart, where each spreads by 4 % either way
            (1.2e-3, compare.SLOWER),
            (0.8e-3, compare.FASTER),
        ],
    )
    def test_a_verdict_respects_the_spread(self, seconds, verdict):
        found = list(compare.findings([row()], [row(seconds=seconds)]))
        assert found[0].verdict == verdict
        assert found[0].ratio == pytest.approx(seconds / 1e-3)

    def test_few_samples_have_no_verdict(self):
        few = row(seconds=9.0)
        few["seconds"]["step"]["samples"] = compare.FEWEST - 1
        assert next(compare.findings([row()], [few])).verdict == compare.FEW

    def test_a_drift_shows_in_times_and_not_in_ratios(self):
        found = list(compare.findings([row()], [row(seconds=2e-3)]))
        assert [one.verdict for one in found[:2]] == [compare.SLOWER, compare.LEVEL]

    def test_machines_are_told_apart_row_by_row(self):
        there = environment(device_name="another processor", cpu="another processor")
        first = [row(), row("peft_hira")]
        second = [row(seconds=2e-3, environment=there), row("peft_hira", seconds=2e-3)]
        words = [one.what for one in compare.findings(first, second)]
        assert not [one for one in words if "hut_low_rank" in one and one.endswith(": step")]
        assert [one for one in words if "peft_hira" in one and one.endswith(": step")]
        text = compare.report(first, second, ("a", "b")).text()
        assert "DIFFERENT machines" in text
        assert "same machine" in text

    def test_the_load_of_both_is_told(self):
        busy = row(environment=environment(other_programs_share=0.5))
        table = compare.report([row()], [busy], ("a", "b"))
        assert "of the CPUs: 1 %, 50 %" in table.text()
        assert [line[-1] for line in table.rows] == [compare.BUSY, compare.BUSY, compare.SAME]

    def test_a_row_that_is_there_twice_is_refused(self):
        with pytest.raises(ValueError, match="two rows of layer hut_low_rank 16x64x32"):
            compare.report([row()], [row(), row()], ("a", "b"))

    def test_memory_has_a_verdict_of_its_own(self):
        words = [
            list(compare.findings([row()], [row(peak=peak)]))[2].verdict
            for peak in (1 << 20, 1 << 21, 1 << 19)
        ]
        assert words == [compare.SAME, compare.MORE, compare.LESS]

    def test_between_machines_ratios_are_compared_and_not_times(self):
        there = environment(device_name="another processor", cpu="another processor")
        twice = [row(seconds=2e-3, ratio=1.5, environment=there)]
        (found,) = [one for one in compare.findings([row()], twice) if "peak" not in one.what]
        assert found.verdict == compare.LEVEL
        assert found.what.endswith("step / peft_lora")
        text = compare.report([row()], twice, ("a", "b")).text()
        assert "DIFFERENT machines" in text
        assert "another processor" in text

    def test_versions_and_rows_on_one_side_are_told(self):
        newer = copy.deepcopy(environment())
        newer["versions"]["torch"] = "9.9"
        text = compare.report(pair(), [row(environment=newer)], ("a", "b")).text()
        assert "same machine" in text
        assert "9.9" in text
        assert "1 rows are only in a" in text

    def test_records_without_a_common_figure_are_refused(self):
        other = row(case={**row()["case"], "tokens": 17})
        with pytest.raises(ValueError, match="no figure in common"):
            compare.report([row()], [other], ("a", "b"))


class TestTables:
    def test_a_layer_table_shows_ratio_rate_and_floor(self):
        (table,) = tables.of(pair())
        text = table.text()
        assert "16 tokens, 64 → 32, r 4, float32" in text
        assert "1.50 (1.44–1.56)" in text
        assert "80 %" in text
        assert table.markdown().count("|") == 4 * (len(table.header) + 1)

    @pytest.mark.parametrize(
        ("ratio", "said"),
        [
            (1.5, "LoRA (PEFT) is faster in {} (HUT low_rank takes 1.5× as long)."),
            (0.5, "HUT low_rank is faster than LoRA (PEFT) in {} (it takes 0.50× as long)."),
            (1.01, "HUT low_rank and LoRA (PEFT) differ by less than the spread in {}."),
        ],
    )
    def test_wins_and_losses_are_said_alike(self, ratio, said):
        told = tables.who_wins(pair(ratio=ratio), "hut_low_rank", "peft_lora")
        assert told == said.format("the one configuration measured")

    def test_configurations_are_counted(self):
        rows = [one for ratio in (1.5, 3.34, 0.5) for one in pair(ratio=ratio)]
        told = tables.who_wins(rows[:4], "hut_low_rank", "peft_lora")
        assert told == (
            "LoRA (PEFT) is faster in all 2 configurations (HUT low_rank takes 1.5–3.3× as long)."
        )
        assert "in 2 of 3 configurations" in tables.who_wins(rows, "hut_low_rank", "peft_lora")

    def test_reasons_are_said_once_and_where(self):
        missing = row("peft_loha", left_out="too large")
        other = row("peft_loha", left_out="too large", case={**row()["case"], "tokens": 17})
        assert tables.left_out([missing, other]) == ["Left out: peft_loha (too large)."]
        half = {**row()["types"], "compute": "bfloat16"}
        assert tables.left_out([row("peft_loha", types=half), missing, other]) == [
            "Left out: peft_loha in float32 (too large)."
        ]
        seen = [row("peft_loha"), other]
        assert tables.left_out(seen) == ["Left out: peft_loha at 17x64x32 (too large)."]

    def test_wins_over_unmeasured_methods_are_refused(self):
        with pytest.raises(ValueError, match="no row compares hut_low_rank with peft_hira"):
            tables.who_wins(pair(), "hut_low_rank", "peft_hira")

    def test_types_of_adapters_are_said(self):
        cast = {**row()["types"], "adapter": "bfloat16"}
        (table,) = tables.of([*pair(), row("peft_lora_cast", types=cast)])
        assert "Adapters in float32; in bfloat16: peft_lora_cast. No autocast." in table.text()

    def test_a_graph_stands_against_a_graph_in_the_same_column(self):
        graph = row("hut_low_rank_graph", versus={"peft_lora_graph": {"step": quantiles(0.5)}})
        (table,) = tables.of([*pair(), graph])
        assert table.header.count("step / LoRA (PEFT)") == 1
        assert "0.50 (0.48–0.52)" in table.rows[2]
        assert "graph" in table.notes[-1]

    def test_models_of_two_ranks_are_two_tables(self):
        case = {
            "model": "m", "targets": "all", "checkpointing": False, "blocks": 1, "blocks_of": 2,
            "batch": 1, "sequence": 8, "r": 4,
        }  # fmt: skip
        rows = [
            row(suite="model", case={**case, **change}, tokens_per_second=quantiles(9.0),
                counts={"trainable": 1})
            for change in ({}, {"r": 8}, {"sequence": 16})
        ]  # fmt: skip
        titles = [table.title for table in tables.of(rows)]
        assert len(set(titles)) == 3
        assert "1 x 8 tokens, r 8, float32" in titles[1]

    def test_rows_of_two_machines_are_told_apart(self):
        here, there = row(), row(environment=environment(threads=99))
        assert len(tables.by_machine([here, row()])) == 1
        assert tables.by_machine([here, there]) == [[here], [there]]

    def test_provenance_says_where_and_when(self):
        one = environment(dirty=True, commit="0123456789abcdef")
        said = tables.provenance([{"environment": one}])
        for part in (one["cpu"], "torch", "0123456789", "uncommitted", one["date"][:10], "1 %"):
            assert part in said


class TestTargets:
    def rows(self, ratio, spread=0.04, **changes):
        """HUT at 4096x4096x4096 on a GPU, beside PEFT's LoRA."""
        return [
            row(
                case={"tokens": 4096, "in_features": 4096, "out_features": 4096, "r": 16},
                types={"compute": "bfloat16", "weight": "bfloat16", "adapter": "float32"},
                versus={"peft_lora": {"step": quantiles(ratio, spread)}},
                environment=environment(device="cuda", device_name="A100"),
                **changes,
            )
        ]

    def line(self, rows):
        return targets.table(rows, targets.ON_GPU).rows[0]

    @pytest.mark.parametrize(
        ("ratio", "spread", "verdict"),
        [
            (1.2, 0.04, targets.MET),
            (1.4, 0.04, targets.MISSED),
            (1.28, 0.04, targets.UNDECIDED),
            (1.32, 0.04, targets.UNDECIDED),
        ],
    )
    def test_a_verdict_respects_the_spread(self, ratio, spread, verdict):
        assert self.line(self.rows(ratio, spread))[-1] == verdict

    def test_few_samples_decide_nothing(self):
        (one,) = self.rows(1.2)
        one["versus"]["peft_lora"]["step"]["samples"] = 3
        assert "3 samples" in self.line([one])[-1]

    def test_a_busy_machine_decides_nothing(self):
        (one,) = self.rows(1.2)
        one["environment"]["other_programs_share"] = 0.5
        assert self.line([one])[-1] == targets.BUSY

    def test_other_cases_do_not_count_as_measured(self):
        assert self.line([])[-1] == targets.UNMEASURED
        (one,) = self.rows(1.2)
        for key, value in (("tokens", 2048), ("in_features", 1024), ("r", 8)):
            assert self.line([{**one, "case": {**one["case"], key: value}}])[-1] == (
                targets.UNMEASURED
            )
        on_cpu = {**one, "environment": environment()}
        assert self.line([on_cpu])[-1] == targets.UNMEASURED

    def test_a_ratio_is_turned_round_where_it_was_taken_so(self):
        least = next(t for t in targets.ON_GPU if t.over == "peft_lora" and t.least)
        by = {"hut_low_rank": {"versus": {"peft_lora": {"step": quantiles(1.25)}}}}
        q = least.ratio(by)
        assert q["median"] == pytest.approx(0.8)
        assert q["p20"] < q["median"] < q["p80"]
        assert least.verdict(q) == targets.MISSED

    def test_a_workspace_is_one_weight(self):
        target = next(t for t in targets.ON_GPU if t.workspace)
        case = {"width": 4, "depth": 4}
        both = {"case": case, "types": {"compute": "bfloat16"}}
        by = {
            "hut_low_rank": {**both, "bytes": {"peak": 132}},
            "lora": {**both, "bytes": {"peak": 100}},
        }
        assert target.ratio(by)["median"] == 1

    def test_every_provider_of_a_target_is_run_by_default(self):
        options = SimpleNamespace(provider=None, baseline=None, suite="layer")
        names, baselines = cli._names(options)
        for target in targets.ON_GPU:
            assert {target.over, target.under} <= set(names)
            assert {target.over, target.under} & set(baselines), target.words

    def test_every_target_has_a_case_by_default(self):
        for suite in ("layer", "memory"):
            size = cli.SIZES[suite][2]
            cases = [
                {
                    "tokens": shape.tokens, "in_features": shape.in_features,
                    "out_features": shape.out_features, "width": shape.in_features,
                    "depth": depth, "r": 16,
                }
                for shape in parsed(size.shapes, size.tokens)
                for depth in size.depths or [0]
            ]  # fmt: skip
            for target in targets.ON_GPU:
                rows = [
                    {
                        "suite": suite,
                        "case": case,
                        "types": {"compute": "bfloat16"},
                        "environment": {"device": "cuda"},
                    }
                    for case in cases
                ]
                if target.suite == suite:
                    assert any(map(target.meant_for, rows)), target.words


class TestDocuments:
    @pytest.mark.parametrize("file", documents.files(), ids=lambda file: file.name)
    def test_every_table_is_that_of_its_record(self, file):
        text = file.read_text()
        assert documents.renewed(text) == text, "stale: run `python -m benchmarks tables`"

    def test_a_document_has_one(self):
        assert documents.files()

    def test_every_record_is_valid(self):
        files = sorted(documents.RESULTS.glob("*.jsonl"))
        assert files
        for file in files:
            assert records.read(file)

    def test_a_stale_table_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        records.write(tmp_path / "r.jsonl", pair(), environment())
        marked = "before\n<!-- benchmark: layer r.jsonl -->\nold\n<!-- end of benchmark -->\nafter"
        fresh = documents.renewed(marked)
        assert "old" not in fresh
        assert fresh.startswith("before")
        assert fresh.endswith("after")
        assert documents.renewed(fresh) == fresh
        records.write(tmp_path / "r.jsonl", pair(ratio=1.7), environment())
        assert documents.renewed(fresh) != fresh

    def test_the_brief_has_time_and_memory_who_wins_and_where_it_was_measured(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        small = row(case={"tokens": 16, "in_features": 8, "out_features": 8, "r": 4}, ratio=9.0)
        many = row(case={**row()["case"], "tokens": 64}, ratio=1.2)
        records.write(tmp_path / "r.jsonl", [small, *pair(), many], environment())
        stack = {"tokens": 8, "width": 4, "depth": 2, "r": 4}
        sizes = {"saved": 3 << 20, "peak": 5 << 20}
        memory = row(suite="memory", case=stack, bytes=sizes)
        records.write(tmp_path / "m.jsonl", [memory], environment())
        mark = "<!-- benchmark: brief r.jsonl m.jsonl -->\n<!-- end of benchmark -->"
        said = documents.renewed(mark)
        assert "| HUT low_rank | 1.50 (1.44–1.56) | 1.20 (1.15–1.25) | 3.0 | 5.0 |" in said
        assert "| LoRA (PEFT) | 1.00 (0.96–1.04) | – | – | – |" in said
        assert "faster in all 3 configurations (HUT low_rank takes 1.2–9.0× as long)." in said
        assert said.count("Measured on") == 1
        assert documents.renewed(said) == said

    def test_the_targets_that_a_record_judges_stand_run_by_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        case = {"tokens": 16, "in_features": 16, "out_features": 16, "r": 8}
        text = ""
        for day, ratio in ((1, 0.8), (2, 1.5)):
            there = environment(date=f"2026-11-0{day}")
            records.write(
                tmp_path / "r.jsonl", [row(suite="overhead", case=case, ratio=ratio)], there
            )
            text += (tmp_path / "r.jsonl").read_text()
        (tmp_path / "r.jsonl").write_text(text)
        said = documents.renewed("<!-- benchmark: targets r.jsonl -->\n<!-- end of benchmark -->")
        assert said.count("overhead, step: HUT low_rank / LoRA (PEFT)") == 2
        assert "0.80 (0.77–0.83) | met |" in said
        assert "1.50 (1.44–1.56) | MISSED |" in said
        assert said.count("Measured on") == 2
        assert targets.UNMEASURED not in said

    def test_no_picture_is_stale(self):
        assert not documents.stale_pictures(), "run `python -m benchmarks tables`"

    def test_a_picture_of_another_record_is_stale(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        monkeypatch.setattr(documents, "FOLDER", tmp_path / "pictures")
        monkeypatch.setattr(documents, "PICTURES", {"layer-time": "r.jsonl"})
        many = row(case={**row()["case"], "tokens": 64})
        records.write(tmp_path / "r.jsonl", [*pair(), many], environment())
        (picture,) = documents.stale_pictures()
        documents.draw(picture)
        assert documents.stale_pictures() == []
        first = picture.read_text()
        documents.draw(picture)
        assert picture.read_text() == first  # the same bytes every time
        records.write(tmp_path / "r.jsonl", pair(), environment())
        assert documents.stale_pictures() == [picture]

    def test_a_mark_without_a_record_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        records.write(tmp_path / "r.jsonl", pair(), environment())
        marked = "<!-- benchmark: model r.jsonl -->\n<!-- end of benchmark -->"
        with pytest.raises(ValueError, match="no row of 'model'"):
            documents.renewed(marked)


def test_a_record_names_no_folder_of_its_machine(monkeypatch):
    words = ["/somewhere/finetune_text.py", "--epochs", "0.3", "--out", "/somewhere/else/sweep"]
    monkeypatch.setattr("sys.argv", words)
    command = records.environment(torch.device("cpu"))["command"]
    assert command == ["finetune_text.py", "--epochs", "0.3", "--out", "sweep"]
