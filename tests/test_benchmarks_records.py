"""Records of the benchmark: valid or refused, told apart, compared, and the tables made of them."""

import copy
import json

import pytest
import torch

from benchmarks import compare, documents, records, tables

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
        records.write_lines(tmp_path / "r.jsonl", rows, rows[0]["environment"])
        back = records.read_lines(tmp_path / "r.jsonl")
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
    def test_what_cannot_be_is_refused(self, change, complaint):
        with pytest.raises(ValueError, match=complaint):
            records.validate({**row(), **change})

    @pytest.mark.parametrize("key", ["provider", "case", "seconds", "versus", "types"])
    def test_what_is_missing_is_named(self, key):
        one = row()
        del one[key]
        with pytest.raises(ValueError, match=f"lacks {key}"):
            records.validate(one)

    def test_a_bad_line_is_named_by_its_number(self, tmp_path):
        file = tmp_path / "r.jsonl"
        file.write_text(json.dumps(row()) + "\n{}\n")
        with pytest.raises(ValueError, match=r"r\.jsonl, line 2: schema_version"):
            records.read_lines(file)
        file.write_text("no JSON\n")
        with pytest.raises(ValueError, match="line 1"):
            records.read_lines(file)
        file.write_text("")
        with pytest.raises(ValueError, match="no record"):
            records.read_lines(file)

    def test_nothing_is_written_where_a_row_is_not_valid(self, tmp_path):
        bad = row(suite="nothing")
        with pytest.raises(ValueError, match="suite"):
            records.write_lines(tmp_path / "r.jsonl", [row(), bad], environment())
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

    def test_memory_has_a_verdict_of_its_own(self):
        words = [
            list(compare.findings([row()], [row(peak=peak)]))[1].verdict
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
        assert "1 rows are in a alone" in text

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
            (1.5, "HUT low_rank takes longer than LoRA (PEFT) in 1 (1.50x its time)"),
            (0.5, "HUT low_rank takes less time than LoRA (PEFT) in 1 (0.50x its time)"),
            (1.01, "level within the spread in 1"),
        ],
    )
    def test_wins_and_losses_are_said_alike(self, ratio, said):
        assert said in tables.who_wins(pair(ratio=ratio), "hut_low_rank", "peft_lora")

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

    def test_rows_of_two_machines_are_not_one_table_unseen(self):
        there = row(environment=environment(threads=99))
        assert tables.mixed_machines([row(), row()]) == []
        assert "NOT of one machine (threads" in tables.mixed_machines([row(), there])[0]

    def test_provenance_says_where_and_when(self):
        one = environment(dirty=True, commit="0123456789abcdef")
        said = tables.provenance([{"environment": one}])
        for part in (one["cpu"], "torch", "0123456789", "uncommitted", one["date"][:10], "1 %"):
            assert part in said


class TestDocuments:
    @pytest.mark.parametrize("file", documents.files(), ids=lambda file: file.name)
    def test_every_table_is_that_of_its_record(self, file):
        text = file.read_text()
        assert documents.renewed(text) == text, "stale: run `python -m benchmarks tables`"

    def test_the_readme_has_one(self):
        assert "README.md" in [file.name for file in documents.files()]

    def test_every_record_is_valid(self):
        files = sorted(documents.RESULTS.glob("*.jsonl"))
        assert files
        for file in files:
            assert records.read_lines(file)

    def test_a_stale_table_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        records.write_lines(tmp_path / "r.jsonl", pair(), environment())
        marked = "before\n<!-- benchmark: layer r.jsonl -->\nold\n<!-- end of benchmark -->\nafter"
        fresh = documents.renewed(marked)
        assert "old" not in fresh
        assert fresh.startswith("before")
        assert fresh.endswith("after")
        assert documents.renewed(fresh) == fresh
        records.write_lines(tmp_path / "r.jsonl", pair(ratio=1.7), environment())
        assert documents.renewed(fresh) != fresh

    def test_a_summary_says_who_wins_and_where_it_was_measured(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        records.write_lines(tmp_path / "r.jsonl", pair(), environment())
        said = documents.renewed("<!-- benchmark: summary r.jsonl -->\n<!-- end of benchmark -->")
        assert "| HUT low_rank | 1.50 (1.44–1.56) |" in said
        assert "HUT low_rank takes longer than LoRA (PEFT) in 1 (1.50x its time)." in said
        assert "Measured on" in said

    def test_a_mark_without_a_record_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "RESULTS", tmp_path)
        records.write_lines(tmp_path / "r.jsonl", pair(), environment())
        marked = "<!-- benchmark: model r.jsonl -->\n<!-- end of benchmark -->"
        with pytest.raises(ValueError, match="no row of 'model'"):
            documents.renewed(marked)
