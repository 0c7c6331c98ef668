"""The slot model: what it counts in a known loop, and that a worse one misses its target."""

import pytest

from hut_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to read from")
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from hut_kernels.triton.launch import LaunchConfig
from tools import slots


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
    assert slots.bytes_line("sm_90", "grad_reduce", 16)[1] == []
    assert slots.bytes_cost("sm_90", "grad_reduce", 16).around > 1.0  # told, and not judged
    narrow = LaunchConfig(16, 64, 64, 4, 2, TMA=True)
    monkeypatch.setattr(slots, "launch_config", lambda *_: narrow)
    bound, moved = slots.bytes_line("sm_90", "grad_reduce", 16)[1]
    assert "of its floor, at most 1.25" in bound
    assert "8.50 bytes a weight, at most 7.5" in moved


def test_the_command_fails_on_a_missed_target(monkeypatch, capsys):
    arguments = ["--arch", "sm_80", "--kernel", "forward", "--rank", "16", "--tokens", "4096"]
    assert slots.main(arguments) == 0
    monkeypatch.setitem(slots.SLOTS, "sm_80", 0.1)  # at 1.0 some Tritons are below it
    assert slots.main(arguments) == 1
    assert "MISSED sm_80 forward r16 N4096: issue slots" in capsys.readouterr().out
