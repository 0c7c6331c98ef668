"""The slot model: what it counts in a known loop, and that a worse one misses its target."""

import re

import pytest

from hut_kernels import versions
from hut_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to read from")
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from hut_kernels.triton.launch import LaunchConfig
from tools import gate, loha, slots


def test_pipes_by_hand():
    lines = [
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P0 LDSM.16.M88.4 R8, [R0]",
        "LDGSTS.E.BYPASS.128 [R15], [R6.64], !P3",
        "IADD3 R5, R4, 0x1, RZ",
        "HFMA2.BF16_V2 R1, R2, R3, R2",
        "@!PT LDS RZ, [RZ]",  # takes a slot and touches no memory
    ]
    pipes = slots.count(lines, "sm_80", warps=8)
    # Per part of a multiprocessor two warps; shared memory serves all eight.
    assert (pipes["issue"], pipes["tensor"], pipes["shared"]) == (12, 16, 64)
    assert (pipes["alu"], pipes["fp16"]) == (4, 4)
    wgmma = ["HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24"]
    assert slots.count(wgmma, "sm_90", warps=8)["tensor"] == 128


def test_the_plain_product_is_tensor_bound_where_its_tiles_are_large():
    tiles = LaunchConfig(256, 128, 32, 8, 3)
    cost = slots.plain_cost("sm_80", "forward", 4096, tiles)
    assert cost.by == "tensor"
    assert cost.bound == cost.useful == 1024


def test_a_tile_of_T_made_twice_misses_the_target(monkeypatch):
    if versions.release(slots.triton.__version__) < (3, 9, 0):  # which misses it itself, by 0.01
        assert slots.line("sm_90", "grad_input", 16, 4096).missed == ()
    # Two warp groups on 128 tokens, and T's product, of 64 rows, made by each of them.
    twice = LaunchConfig(128, 64, 128, 8, 3, TMA=True)
    monkeypatch.setattr(slots, "launch_config", lambda *_: twice)
    (missed,) = slots.line("sm_90", "grad_input", 16, 4096).missed
    assert "of a plain product's" in missed


def test_a_reduction_that_is_long_for_its_loop_misses_the_target(monkeypatch):
    found = slots.line("sm_80", "grad_factors", 16, 4096)
    assert found.missed == ()
    assert 0.1 < found.epilogue <= slots.EPILOGUE
    few = slots.devices.BreakEven(1, 1, 128, "planted")
    monkeypatch.setitem(slots.devices.BREAK_EVENS, "sm_80", few)
    (missed,) = slots.line("sm_80", "grad_factors", 16, 4096).missed
    assert missed.startswith("epilogue 1.")


def test_a_weight_kernel_in_narrow_tiles_misses_the_target(monkeypatch):
    assert slots.bytes_line("sm_80", "weight", 16)[1] == []
    monkeypatch.setattr(slots, "launch_config", lambda *_: LaunchConfig(16, 32, 32, 4, 1))
    (missed,) = slots.bytes_line("sm_80", "weight", 16)[1]
    assert "1.50 of a copy's bytes" in missed


def test_a_weight_kernel_over_float32_factors_misses_the_target(monkeypatch):
    monkeypatch.setattr(slots.gate.weight, "cast", lambda tensor, dtype: tensor)
    (missed,) = slots.bytes_line("sm_80", "weight", 16)[1]
    assert "1.38 of a copy's bytes" in missed


def test_a_reduction_in_narrow_tiles_misses_its_targets(monkeypatch):
    text, missed = slots.bytes_line("sm_90", "grad_reduce", 16)
    assert missed == []
    assert "1.38 bytes a weight around the loop" in text  # told, and not judged
    narrow = LaunchConfig(16, 64, 64, 4, 2, TMA=True)
    monkeypatch.setattr(slots, "launch_config", lambda *_: narrow)
    bound, moved = slots.bytes_line("sm_90", "grad_reduce", 16)[1]
    assert "of its floor, at most 1.25" in bound
    assert "8.50 bytes a weight, at most 7.5" in moved


def test_a_rank_without_targets_is_told_all_the_same():
    text, missed = slots.bytes_line("sm_90", "weight", 32)
    assert "bytes a weight" in text
    assert missed == []


def test_the_command_fails_on_a_missed_target(monkeypatch, capsys):
    arguments = ["--arch", "sm_80", "--kernel", "forward", "--rank", "16", "--tokens", "4096"]
    assert slots.main(arguments) == 0
    monkeypatch.setitem(slots.SLOTS, "sm_80", 0.1)  # at 1.0 some Tritons are below it
    assert slots.main(arguments) == 1
    assert "MISSED sm_80 forward r16 N4096: issue slots" in capsys.readouterr().out


class TestBesideLyCORIS:
    """The loops of LyCORIS's LoHa beside ours, where its wheel is installed and where it is not."""

    CELL = ("--arch", "sm_80", "--kernel", "forward", "--rank", "16", "--tokens", "4096")

    def test_of_the_two_loops_of_backward_that_for_dx_has_more_products(self):
        product, back = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)"
        code = gate._Code([product, back, product, product, back, back], [(2, 4), (0, 1), (5, 5)])
        assert loha.only_loop(code, "grad_factors").loops == [(0, 1)]
        assert loha.only_loop(code, "grad_input").loops == [(2, 4)]
        with pytest.raises(ValueError, match="too many"):  # not the kernel of forward, with one
            loha.only_loop(code, "forward")

    def test_its_tiles_by_our_names(self):
        tiles = loha.Tiles(1, 2, 3, 4, 5)
        assert tiles.named("forward") == LaunchConfig(BN=1, BO=2, BK=3, warps=4, stages=5)
        assert tiles.named("grad_input") == LaunchConfig(BN=1, BO=3, BK=2, warps=4, stages=5)
        assert tiles.named("grad_factors") == LaunchConfig(BN=3, BO=1, BK=2, warps=4, stages=5)

    @pytest.mark.parametrize("version", ["4.1.2", None])
    def test_the_command_says_that_it_is_not_installed(self, monkeypatch, capsys, version):
        def of_the_wheel(name):
            if version is None:
                raise loha.importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(loha.importlib.metadata, "version", of_the_wheel)
        assert slots.main(self.CELL) == 0
        assert "pip install lycoris-lora==4.1.3 --no-deps" in capsys.readouterr().out

    @pytest.mark.skipif(not loha.installed(), reason=loha.MISSING)
    def test_a_worse_tile_of_ours_misses_the_target(self, monkeypatch):
        cell = "sm_90", "grad_input"
        assert slots.loha_line(slots.line(*cell, 16, 4096), *cell)[1] == []
        worse = LaunchConfig(64, 64, 64, 4, 3, TMA=True)
        monkeypatch.setattr(slots, "launch_config", lambda *_: worse)
        (missed,) = slots.loha_line(slots.line(*cell, 16, 4096), *cell)[1]
        assert "of LyCORIS's clocks, at most 1.0" in missed

    @pytest.mark.skipif(not loha.installed(), reason=loha.MISSING)
    def test_the_command_shows_its_loop_and_fails_on_a_missed_target(self, monkeypatch, capsys):
        assert slots.main(self.CELL) == 0
        # Its floor is the tensor cores': the product and two thin ones, 8 clocks and a quarter.
        assert re.search(r"beside LyCORIS 4\.1\.3(.|\n)* 10\.00 tensor", capsys.readouterr().out)
        monkeypatch.setitem(slots.LOHA, "sm_80", 0.5)
        assert slots.main(self.CELL) == 1
        missed = r"MISSED sm_80 forward r16 N4096: 0\.\d\d of LyCORIS's clocks, at most 0\.5"
        assert re.search(missed, capsys.readouterr().out)
