"""The demo at a tiny size: it runs, writes what it says, and says what its numbers say."""

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import demo

ARGUMENTS = "--size tiny --width 32 --depth 1 --rank 4 --pretrain-steps 30 --steps 8 --seconds 0.1"


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for other threads
    try:
        assert demo.main([*ARGUMENTS.split(), "--device", "cpu", "--out", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder, json.loads((folder / "demo.json").read_text())


def test_it_writes_pictures_adapters_and_a_record(demonstrated):
    folder, record = demonstrated
    for name in ("losses.png", "layers.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "adapter_hut_low_rank.safetensors").exists()
    assert (folder / "adapter_hut_paper.safetensors").exists()
    assert record["schema_version"] == 1
    assert {"date", "platform", "cpu", "threads", "versions", "commit", "dirty"} <= set(
        record["environment"]
    )
    assert record["options"]["gpt"]["width"] == 32
    assert record["options"]["steps"] == record["adaptation"][0]["steps"] == 8


def test_every_provider_is_proven_and_measured(demonstrated):
    _, record = demonstrated
    rows = {row["provider"]: row for row in record["layer"]}
    assert set(rows) == set(record["proofs"]) == set(demo.COMPARED)
    for row in rows.values():
        for q in row["seconds"].values():
            assert 0 < q["p20"] <= q["median"] <= q["p80"]
        assert row["bytes"]["peak"] > 0
    assert rows["frozen"]["versus"]["frozen"]["step"]["median"] == 1
    assert rows["hut_low_rank"]["bytes"]["peak"] < rows["hut_low_rank_eager"]["bytes"]["peak"]


def test_methods_learn_with_as_many_parameters_and_merge_without_loss(demonstrated):
    _, record = demonstrated
    rows = {row["method"]: row for row in record["adaptation"]}
    assert {"hut_low_rank", "hut_paper", "lora"} == set(rows)
    assert len({row["trainable"] for row in rows.values()}) == 1
    assert rows["lora"]["r"] == rows["hut_low_rank"]["r"] == rows["hut_paper"]["r"] + 1 == 4
    for row in rows.values():
        assert row["held_out"] < record["frozen"]["held_out"]
        assert math.isclose(row["held_out"], row["merged_held_out"], rel_tol=1e-5)
        best = min(row["sweep"], key=lambda one: one["validation"])
        assert row["rate"] == best["rate"]
        assert len(row["sweep"]) == 3


def test_the_sentences_quote_the_numbers(demonstrated):
    _, record = demonstrated
    text = "\n".join(record["sentences"])
    for row in record["adaptation"]:
        assert f"{row['label']} at {row['held_out']:.4f}" in text
    for row in record["layer"]:
        if row["provider"] != "frozen":
            ratio = row["versus"]["frozen"]["step"]["median"]
            assert f"{row['label']} {ratio:.2f}x" in text


@pytest.mark.parametrize(
    "arguments", [["--rank", "0"], ["--steps", "-1"], ["--size", "tiny", "--width", "33"]]
)
def test_sizes_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.parse(arguments)
    assert arguments[-2] in capsys.readouterr().err
