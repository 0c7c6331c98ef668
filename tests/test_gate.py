"""The gate reads machine code: what it passes, and, planted here, what it must fail."""

import json

import pytest

from hut_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to read from")
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from hut_kernels.triton.launch import LaunchConfig
from hut_kernels.triton.tables import ARCHITECTURES, launch_config
from tools import gate


def config(
    arch: str, kernel: str, tiles: LaunchConfig, dtype: str = "bf16", N: int = 4096
) -> gate.Config:
    return gate.Config(arch, kernel, dtype, 16, N, tiles)


def broken(arch: str, kernel: str, tiles: LaunchConfig) -> str:
    return "; ".join(gate.inspect(config(arch, kernel, tiles)).broken)


@pytest.mark.parametrize("kernel", list(gate.KERNELS))
def test_the_tables_rows_pass(kernel):
    report = gate.inspect(config("sm_80", kernel, launch_config(kernel, "sm_80", 4096, 16, "bf16")))
    assert report.broken == ()
    assert report.registers > 0


def test_a_spill_is_found():
    found = broken("sm_80", "forward", LaunchConfig(128, 128, 32, 4, 4, maxnreg=64))
    assert "spills" in found


def test_a_plain_load_in_the_main_loop_is_found():
    found = broken("sm_80", "forward", LaunchConfig(128, 128, 32, 8, 1))  # one stage: no pipeline
    assert "plain global loads" in found
    assert "no asynchronous copy" in found


def test_a_serialised_wgmma_is_found():
    tiles = LaunchConfig(64, 64, 64, 4, 3, W_FIRST=True)
    assert "C7515" in broken("sm_90", "forward", tiles)
    settled = LaunchConfig(64, 64, 64, 4, 3, W_FIRST=True, wgmma_async=True)
    assert broken("sm_90", "forward", settled) == ""


def test_too_much_shared_memory_is_found():
    found = broken("sm_89", "forward", LaunchConfig(128, 128, 64, 8, 4))
    assert "shared memory" in found
    assert "101376" in found


def test_the_wrong_tensor_core_is_found():
    # wgmma takes no left operand of fewer than 64 rows; here neither product has so many.
    found = broken("sm_90", "forward", LaunchConfig(16, 32, 64, 4, 3, wgmma_async=True))
    assert "no HGMMA" in found


def test_a_thin_product_alone_on_the_tensor_core_is_found():
    # T's product has 64 rows and takes wgmma; the tokens' product, with 16, does not.
    found = broken("sm_90", "forward", LaunchConfig(16, 64, 64, 4, 3, wgmma_async=True))
    assert "multiplications by HGMMA" in found


def test_what_does_not_compile_is_a_finding():
    assert "does not compile" in broken("sm_80", "forward", LaunchConfig(48, 64, 32, 4, 2))


def test_every_row_is_covered():
    every = gate.configurations()
    assert len(every) >= 90
    assert {c.arch for c in every} == set(ARCHITECTURES)
    assert {c.kernel for c in every} == set(gate.KERNELS)
    assert {c.dtype for c in every} == set(gate.TYPES)
    covered = {(c.arch, c.kernel, c.dtype, c.r, c.row) for c in every if c.variant == "plain"}
    for arch in ARCHITECTURES:
        for kernel in gate.KERNELS:
            for dtype in gate.TYPES:
                for r in gate.RANKS:
                    for N in gate.TOKENS:
                        tiles = launch_config(kernel, arch, N, r, dtype)
                        assert (arch, kernel, dtype, r, tiles) in covered


def test_the_command_dumps_and_reports(tmp_path, capsys):
    dump, file = tmp_path / "dump", tmp_path / "gate.json"
    arguments = ["--arch", "sm_80", "--kernel", "weight", "--jobs", "1"]
    assert gate.main([*arguments, "--dump", str(dump), "--json", str(file)]) == 0
    assert "passed, 0 failed" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert {one["config"]["kernel"] for one in found} == {"weight"}
    names = {path.name for path in dump.iterdir()}
    assert any(
        name.startswith("sm80-weight-fp32-r16") and name.endswith(".cubin") for name in names
    )
    assert any(name.endswith("-unaligned.cubin") for name in names)
    assert all(name.replace(".cubin", ".ptx") in names for name in names)


def test_the_command_fails_on_a_broken_rule(monkeypatch, capsys):
    bad = config("sm_89", "forward", LaunchConfig(128, 128, 64, 8, 4))
    monkeypatch.setattr(gate, "configurations", lambda *_: [bad])
    assert gate.main(["--jobs", "1"]) == 1
    assert f"BROKEN {bad.name}: shared memory" in capsys.readouterr().out


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gate.main(["--arch", "sm_80"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().out
