"""`python -m benchmarks`: suites run, write, plot and compare; the package holds the command."""

import csv
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import providers, records

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

CHECKOUT = ("benchmarks", "examples", "tests", "tools")
FEW = ["--provider", "lora", "hut_low_rank", "--baseline", "lora", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(cli, "settle_threads", lambda: (1, 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A record of each suite that has a picture, at sizes that take no time."""
    folder = tmp_path_factory.mktemp("records")
    commands = {
        "layer": ["--shapes", "32x48", "--tokens", "4", "16", "--rank", "4", "--seconds", "0.02"],
        "memory": ["--shapes", "32x32", "--tokens", "8", "--rank", "2", "--depths", "1", "2"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "settle_threads", lambda: (1, 1))
        for suite, options in commands.items():
            file = str(folder / f"{suite}.jsonl")
            assert cli.main([suite, *options, *FEW, "--json", file]) == 0
    return folder


class TestSuites:
    def test_a_record_holds_every_row_with_its_proof(self, files):
        rows = records.read(files / "layer.jsonl")
        found = [(row["provider"], row["case"]["tokens"]) for row in rows]
        assert found == [(name, tokens) for tokens in (4, 16) for name in ("lora", "hut_low_rank")]
        assert all(row["proof"] < 2e-6 for row in rows)
        assert rows[0]["environment"]["date"] == rows[-1]["environment"]["date"]

    def test_a_table_is_printed_with_its_origin(self, capsys):
        arguments = ["overhead", "--seconds", "0.01", "--rank", "2", "--device", "cpu"]
        assert cli.main([*arguments, "--provider", "lora*", "--baseline", "lora"]) == 0
        text = capsys.readouterr().out
        assert "step / LoRA, lean" in text
        assert "Left out: LoRA, lean, graph (CUDA graphs need a CUDA device)." in text
        assert "Measured on" in text

    def test_csv_has_a_column_for_each_figure(self, tmp_path):
        file = tmp_path / "r.csv"
        arguments = ["layer", "--shapes", "4x8x8", "--rank", "2", "--seconds", "0", *FEW]
        assert cli.main([*arguments, "--csv", str(file)]) == 0
        lines = list(csv.DictReader(file.open()))
        assert [line["provider"] for line in lines] == ["lora", "hut_low_rank"]
        assert float(lines[1]["versus.lora.step.median"]) > 0
        assert lines[0]["environment.torch"] == lines[1]["environment.torch"] != ""

    def test_a_provider_that_is_wrong_fails_the_command_and_is_not_timed(
        self, monkeypatch, tmp_path, capsys
    ):
        monkeypatch.setitem(providers.LIMITS, torch.float32, 1e-12)
        file = tmp_path / "r.jsonl"
        arguments = ["layer", "--shapes", "4x8x8", "--rank", "2", "--seconds", "0", *FEW]
        assert cli.main([*arguments, "--json", str(file)]) == 1
        assert "does NOT compute its formula" in capsys.readouterr().out
        assert not file.exists()  # nothing was measured at all

    def test_costs_are_of_the_requested_shapes(self, capsys):
        assert cli.main(["cost", "--shapes", "64x32", "--rank", "2"]) == 0
        text = capsys.readouterr().out
        assert "64 → 32, r 2" in text
        assert "a model's linear layers" not in text
        assert cli.main(["cost", "--shapes", "gpt2-medium", "--quick"]) == 0
        text = capsys.readouterr().out
        assert "gpt2-medium" in text
        assert "roberta" not in text
        assert cli.main(["cost", "--quick"]) == 0
        assert len(capsys.readouterr().out) < len(text)

    def test_costs_are_counted_without_a_device(self, capsys):
        assert cli.main(["cost"]) == 0
        text = capsys.readouterr().out
        assert "third full product makes its training step dearer" in text
        assert "2 multiplications whatever the rank is" in text

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["layer", "--shapes", "12"], "is no shape"),
            (["layer", "--provider", "nobody"], "no provider matches"),
            (["layer", "--device", "cuda"], "sees no CUDA device"),
            (["memory", "--shapes", "4x8", *FEW], "needs a square shape"),
            (["plot", "missing.jsonl"], "missing.jsonl"),
        ],
    )
    def test_impossible_requests_are_refused_in_one_line(self, arguments, complaint, capsys):
        if arguments[-1] == "cuda" and torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        assert cli.main(arguments) == 1
        assert complaint in capsys.readouterr().err

    def test_a_missing_package_is_named_with_the_command_that_brings_it(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert cli.main(["model", "--quick", *FEW]) == 1
        assert "pip install '.[bench]'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["layer", "--device", "mps"], "must be cpu, cuda or cuda:N"),
            (["layer", "--device", "meta"], "must be cpu, cuda or cuda:N"),
            (["layer", "--device", "foo"], "must be cpu, cuda or cuda:N"),
            (["layer", "--rank", "x"], "must be a whole number from 1 up"),
            (["layer", "--seconds", "-1"], "must be a number from 0 up"),
        ],
    )
    def test_unknown_options_are_refused_in_one_line(self, arguments, complaint, capsys):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert complaint in capsys.readouterr().err

    def test_impossible_requests_are_refused_before_measuring(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cli, "admit", lambda *_: pytest.fail("measured"))
        (tmp_path / "file").touch()
        assert cli.main(["layer", *FEW, "--json", str(tmp_path / "file" / "r.jsonl")]) == 1
        assert cli.main(["layer", *FEW, "--csv", str(tmp_path)]) == 1
        assert cli.main(["memory", *FEW, "--shapes", "8x8", "4x8"]) == 1
        assert cli.main(["layer", *FEW, "--shapes", "gpt5"]) == 1
        assert cli.main(["layer", "--provider", "hut_low_rank", "--baseline", "nobody"]) == 1

    def test_measurements_before_an_interruption_are_written(self, monkeypatch, tmp_path):
        measure = cli.layer.measure

        def interrupted(shape, *arguments, **options):
            if shape.tokens == 16:
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(shape, *arguments, **options)

        monkeypatch.setattr(cli.layer, "measure", interrupted)
        file = tmp_path / "r.jsonl"
        arguments = ["layer", "--shapes", "8x8", "--tokens", "4", "16", "--rank", "2", *FEW]
        assert cli.main([*arguments, "--seconds", "0", "--json", str(file)]) == 130
        assert {row["case"]["tokens"] for row in records.read(file)} == {4}

    def test_a_device_has_its_index_and_is_there(self, monkeypatch):
        def device(asked):
            return cli._device(SimpleNamespace(device=asked, suite="layer"))

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert device(None) == device(torch.device("cuda")) == torch.device("cuda", 0)
        assert device(torch.device("cuda:1")) == torch.device("cuda", 1)
        assert device(torch.device("cpu")) == torch.device("cpu")
        with pytest.raises(ValueError, match="sees 2 CUDA devices"):
            device(torch.device("cuda:2"))

    def test_defaults_compare_with_the_documented_methods(self):
        others = {"peft_lora", "lora", "peft_hira", "hut_low_rank_eager"}
        assert others <= set(cli.BASELINES)

    def test_where_graphs_run_the_baselines_graphs_are_baselines(self):
        def names(provider):
            options = SimpleNamespace(provider=provider, baseline=["lora"], suite="layer")
            return cli._names(options)

        assert names(["hut_low_rank"])[1] == ["lora"]
        assert names(["hut_low_rank_graph"]) == (
            ["lora", "lora_graph", "hut_low_rank_graph"],
            ["lora", "lora_graph"],
        )

    def test_defaults_are_compiled_at_one_number_of_tokens(self, monkeypatch):
        measured = {}
        monkeypatch.setattr(
            cli.layer,
            "measure",
            lambda shape, r, dtype, device, seconds, names, *_, base: (
                measured.update({shape: names}) or []
            ),
        )
        options = SimpleNamespace(
            seconds=0, rank=[2], shapes=["8x8"], tokens=[16, 512], provider=None,
            device=torch.device("cpu"), suite="layer", base=None,
        )  # fmt: skip
        names = ["lora", "hut_low_rank_compiled"]
        groups = cli._layer_groups(options, cli.Size(), torch.float32, names, ["lora"])
        rows = [row for group in groups for row in group]
        assert list(measured.values()) == [["lora"], names]
        assert [row["left_out"] for row in rows] == [cli.COMPILED_ONCE]

    def test_ranks_and_tokens_of_costs_are_those_asked_for(self, capsys):
        assert cli.main(["cost", "--rank", "16", "--tokens", "8", "64"]) == 0
        text = capsys.readouterr().out
        assert "r 128" not in text
        for tokens in (8, 64):
            assert f"linear layers over LoRA's, {tokens} tokens, r 16" in text

    def test_tables_are_written_only_in_a_checkout(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(records, "ROOT", tmp_path)
        with pytest.raises(SystemExit):
            cli.main(["tables"])
        assert "invalid choice" in capsys.readouterr().err

    @pytest.mark.parametrize("suite", records.SUITES)
    def test_every_suite_has_its_sizes_and_its_help(self, suite, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([suite, "--help"])
        assert stopped.value.code == 0
        assert "--quick" in capsys.readouterr().out
        assert len(cli.SIZES[suite]) == 4

    def test_defaults_reach_each_group_of_the_model_suite(self):
        options = SimpleNamespace(
            shapes=None, blocks=None, tokens=None, rank=[16], suite="model",
            target_modules=None, device=torch.device("cpu"),
        )  # fmt: skip
        settings = list(cli._settings(options, cli.SIZES["model"][0]))
        assert len({(s.model, s.targets, s.checkpointing) for s in settings}) == 8
        assert {s.blocks for s in settings} == {2}
        assert {s.tokens for s in settings} == {64}


class TestFiles:
    def test_pictures_are_drawn_as_png_and_svg(self, files, tmp_path):
        pytest.importorskip("matplotlib")
        some = [str(files / f"{suite}.jsonl") for suite in ("layer", "memory")]
        assert cli.main(["plot", *some, "--out", str(tmp_path)]) == 0
        names = {file.name for file in tmp_path.iterdir()}
        assert names == {
            f"{name}.{kind}"
            for name in ("layer-time", "layer-floor", "memory")
            for kind in ("png", "svg")
        }
        assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "memory.svg").read_text()

    def test_training_is_drawn_too(self, tmp_path):
        pytest.importorskip("matplotlib")
        from benchmarks.report import plots
        from benchmarks.suites import model

        environment = {**records.environment(torch.device("cpu")), "other_programs_share": None}
        q = {"p20": 1.0, "median": 2.0, "p80": 3.0, "samples": 3}
        rows = [
            {
                "suite": "model", "provider": name, "label": name, "environment": environment,
                "types": {"compute": "float32"}, "tokens_per_second": q, "bytes": {"peak": 5},
                "case": model.Setting("gpt2-medium", "few", True, 2, 1, 8, 4).case(),
            }
            for name in ("lora", "hut_low_rank")
        ]  # fmt: skip
        assert [file.name for file in plots.draw(rows, tmp_path)] == ["model.png", "model.svg"]

    def test_each_machine_has_its_panels_and_its_line(self, files, tmp_path):
        pytest.importorskip("matplotlib")
        from benchmarks.report import plots

        rows = records.read(files / "layer.jsonl")
        there = [{**row, "environment": {**row["environment"], "cpu": "other"}} for row in rows]
        figure = plots.time_over_tokens([*rows, *there])
        assert len([axes for axes in figure.axes if axes.get_visible()]) == 2
        with pytest.raises(ValueError, match="two rows of layer"):
            plots.draw([*rows, *rows], tmp_path)

    def test_graphs_and_forced_strategies_have_panels_of_their_own(self, files):
        pytest.importorskip("matplotlib")
        from benchmarks.report import plots

        like = records.read(files / "layer.jsonl")
        names = ("lora", "lora_graph", "hut_low_rank", "hut_low_rank_graph", "hut_low_rank_fused")
        rows = [
            {
                **row, "provider": name, "label": name,
                "versus": {f"lora{'_graph' * name.endswith('_graph')}": row["versus"]["lora"]},
            }
            for name in names
            for row in like
            if row["provider"] == "lora"
        ]  # fmt: skip
        figure = plots.time_over_tokens(rows)
        panels = {axes.get_title(): len(axes.lines) for axes in figure.axes}
        assert [title.rpartition(", ")[2] for title in panels] == ["float32", "graphs", "forced"]
        assert list(panels.values()) == [2, 2, 2]
        assert figure.axes[1].get_ylabel() == "step / LoRA, lean, graph (log), below 1 is faster"

    def test_every_provider_has_a_color(self):
        pytest.importorskip("matplotlib")
        from benchmarks.report import plots

        for name in providers.PROVIDERS:
            assert plots._style(name)["color"].startswith("#")

    def test_records_are_compared_and_checked(self, files, capsys):
        file = str(files / "layer.jsonl")
        assert cli.main(["compare", file, file]) == 0
        assert "same memory" in capsys.readouterr().out
        assert cli.main(["check", file]) == 0
        assert cli.main(["targets", file]) == 0
        assert "4 valid rows" in capsys.readouterr().out

    def test_a_bad_record_fails_the_check(self, tmp_path, capsys):
        (tmp_path / "r.jsonl").write_text("{}\n")
        assert cli.main(["check", str(tmp_path / "r.jsonl")]) == 1
        assert "line 1" in capsys.readouterr().err


@pytest.mark.skipif(tomllib is None, reason="needs tomllib, of Python 3.11")
class TestPackage:
    @pytest.fixture
    def project(self):
        return tomllib.loads((records.ROOT / "pyproject.toml").read_text())

    def test_every_package_is_installed(self, project):
        setuptools = project["tool"]["setuptools"]
        assert setuptools["package-dir"] == {"hut_kernels.benchmarks": "benchmarks"}
        found = {
            ".".join(("hut_kernels" if top == "hut_kernels" else "hut_kernels.benchmarks", *rest))
            for top, *rest in (
                file.parent.relative_to(records.ROOT).parts
                for folder in ("hut_kernels", "benchmarks")
                for file in Path(records.ROOT, folder).rglob("__init__.py")
            )
        }
        # Whoever measures the kernels of a device has a checkout, whose tests/gpu it runs first.
        assert set(setuptools["packages"]) == found - {"hut_kernels.benchmarks.gpu"}

    def test_the_command_is_main(self, project):
        assert project["project"]["scripts"]["hut-bench"].endswith("__main__:main")

    def test_the_installed_package_imports_nothing_of_the_checkout(self):
        folder = Path(records.ROOT, "benchmarks")
        for file in folder.rglob("*.py"):
            if file.parent.name != "gpu":
                found = re.findall(r"^\s*(?:from|import) (\S+)", file.read_text(), re.M)
                assert not [one for one in found if one.split(".")[0] in CHECKOUT], file
                assert not [one for one in found if ".gpu" in one], file
