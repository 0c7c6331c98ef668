"""The gate reads machine code: what it passes, and, planted here, what it must fail."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from hut_kernels import versions
from hut_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to read from")
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from hut_kernels.triton import split_k, stored
from hut_kernels.triton.launch import LaunchConfig
from hut_kernels.triton.tables import ARCHITECTURES, launch_config
from tools import gate

DENIED = (
    versions.Miscompile("3.6.0", None, ("sm_100",), ("grad_factors",), "", "", ("bfloat16",)),
)


def config(
    arch: str, kernel: str, tiles: LaunchConfig, dtype: str = "bf16", N: int = 4096
) -> gate.Config:
    variant = "nf4" if kernel in gate.OVER_STORED else "plain"
    return gate.Config(arch, kernel, dtype, 16, N, tiles, variant)


def broken(arch: str, kernel: str, tiles: LaunchConfig) -> str:
    return "; ".join(gate.inspect(config(arch, kernel, tiles)).broken)


@pytest.mark.parametrize("kernel", list(gate.KERNELS))
def test_the_tables_rows_pass(kernel):
    N = 16 if kernel == gate.DECODE else 4096
    tiles = launch_config(kernel, "sm_80", N, 16, "bf16")
    report = gate.inspect(config("sm_80", kernel, tiles, N=N))
    assert report.broken == ()
    assert report.registers > 0


def test_too_many_instructions_a_stored_weight_are_found():
    assert "instructions a weight" in broken("sm_80", "stored", LaunchConfig(16, 16, 128, 8, 1))


def test_codes_that_are_not_read_16_bytes_at_a_time_are_found(monkeypatch):
    """As where a tile is looked up a byte at a time."""
    tiles = launch_config("stored_reduce", "sm_80", 4096, 16, "bf16")
    assert broken("sm_80", "stored_reduce", tiles) == ""
    options = stored.stored_options
    monkeypatch.setattr(stored, "stored_options", lambda *a: {**options(*a), "PAIRS": False})
    assert "33 loads of less than 16 bytes, of 1" in broken("sm_80", "stored_reduce", tiles)


def test_a_spill_is_found():
    found = broken("sm_80", "forward", LaunchConfig(128, 128, 32, 4, 4, maxnreg=64))
    assert "spills" in found


def test_a_plain_load_in_the_main_loop_is_found():
    found = broken("sm_80", "forward", LaunchConfig(128, 128, 32, 8, 1))  # one stage: no pipeline
    assert "plain global loads" in found
    assert "no asynchronous copy" in found


PRODUCTS = """
.version 8.5
.target sm_90a
.address_size 64
.visible .entry two_products(.param .u64 out, .param .u64 operand)
{
  .reg .b32 %r<2>;
  .reg .f32 %f<5>;
  .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [out];
  ld.param.u64 %rd2, [operand];
  mov.b32 %r1, 0;
  mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
  wgmma.fence.sync.aligned;
  PRODUCT
  BETWEEN
  PRODUCT
  wgmma.wait_group.sync.aligned 0;
  st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};
  ret;
}
""".replace(
    "PRODUCT",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, "
    "{%r1, %r1, %r1, %r1}, %rd2, 1, 1, 1, 0;\n  wgmma.commit_group.sync.aligned;",
)
USE = "add.f32 %f1, %f1, %f1;"
WAIT, ARRIVE = "wgmma.wait_group.sync.aligned 0;", "wgmma.fence.sync.aligned;"


@pytest.mark.parametrize(
    ("between", "found"), [("", False), (USE, True), (f"{WAIT} {USE} {ARRIVE}", False)]
)
def test_a_serialized_wgmma_is_found(between, found, monkeypatch):
    """By ptxas, in text of our own: which kernels Triton makes it serialize differs by version."""
    tiles = LaunchConfig(64, 64, 64, 4, 3, W_FIRST=True, wgmma_async=True)
    compiled = gate.compile_config(config("sm_90", "forward", tiles))
    assert broken("sm_90", "forward", tiles) == ""
    asm = {**compiled.asm, "ptx": PRODUCTS.replace("BETWEEN", between)}
    planted = SimpleNamespace(asm=asm, metadata=compiled.metadata)
    monkeypatch.setattr(gate, "compile_config", lambda config: planted)
    assert ("serialized wgmma: ptxas C75" in broken("sm_90", "forward", tiles)) == found


def test_too_much_shared_memory_is_found():
    found = broken("sm_89", "forward", LaunchConfig(128, 128, 64, 8, 4))
    assert "shared memory" in found
    assert "101376" in found


def test_the_wrong_tensor_core_is_found():
    # wgmma takes no left operand of fewer than 64 rows; here neither product has so many.
    found = broken("sm_90", "forward", LaunchConfig(16, 32, 64, 4, 3, wgmma_async=True))
    assert "no HGMMA" in found


def test_only_a_thin_product_on_the_tensor_core_is_found():
    # T's product has 64 rows and takes wgmma; the tokens' product, with 16, does not.
    found = broken("sm_90", "forward", LaunchConfig(16, 64, 64, 4, 3, wgmma_async=True))
    assert "multiplications by HGMMA" in found


def test_a_tile_of_T_that_several_warps_make_is_found():
    tiles = launch_config("grad_input", "sm_80", 4096, 16, "bf16")
    assert tiles.unchain
    chained = dataclasses.replace(tiles, unchain=False)
    assert "multiplications by HMMA" in broken("sm_80", "grad_input", chained)


def test_a_failed_compilation_is_a_finding():
    assert "does not compile" in broken("sm_80", "forward", LaunchConfig(48, 64, 32, 4, 2))


# The launch


@pytest.mark.parametrize("kernel", gate.KERNELS)
def test_every_launch_says_that_multiplications_may_be_fused(kernel, monkeypatch):
    """Every option is set: the defaults change with Triton 3.10."""
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    dtype = "bf16" if kernel == gate.DECODE else "fp32"
    tiles = launch_config(kernel, "sm_80", 16, 16, dtype)
    assert gate.compile_config(config("sm_80", kernel, tiles, dtype, 16)).metadata.enable_fp_fusion


def test_the_sum_of_partial_products_may_be_fused_too(monkeypatch):
    options = {}
    monkeypatch.setattr(
        split_k.hut_split_k_kernel, "run", lambda *args, **given: options.update(given)
    )
    split_k.add_partial_sums(torch.empty(2, 4, 4), torch.empty(4, 4), None, None, None)
    assert options["enable_fp_fusion"]


@pytest.mark.parametrize("kernel", gate.PRODUCTS)
@pytest.mark.parametrize("tokens", [(1, 7, 16), (129, 1000, 4096)], ids=str)
def test_tokens_of_one_row_share_a_compilation(kernel, tokens):
    """Triton would make a kernel of its own for 1, for multiples of 16, and for what is left."""
    tiles = launch_config(kernel, "sm_80", tokens[0], 16, "bf16")
    hashes = {gate.compile_config(config("sm_80", kernel, tiles, N=N)).hash for N in tokens}
    assert len(hashes) == 1


def test_so_do_numbers_of_splits(monkeypatch):
    gate._switch_to("sm_80")
    hashes, run = set(), split_k.hut_split_k_kernel.run
    monkeypatch.setattr(
        split_k.hut_split_k_kernel,
        "run",
        lambda *args, **given: hashes.add(run(*args, **{**given, "warmup": True}).hash),
    )
    for splits, N in ((2, 1), (3, 7), (16, 16)):
        split_k.add_partial_sums(torch.empty(splits, N, 64), torch.empty(N, 64))
    assert len(hashes) == 1


# Races of sm_100


COPY = """
  cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;
  bra.uni $L__BB0_1;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
  cp.async.wait_group 0;
  bar.sync 0;
  {fence}
  @%p1 bra $L__BB0_2;
  @%p2 tcgen05.mma.cta_group::1.kind::tf32 [ %r265 + 0 ], {left}, %rd79, %r103, %p6;
$L__BB0_2:
  {late}
  @%p3 bra $L__BB0_1;
  ret;
"""


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        (True, {}),
        (True, {"late": "fence.proxy.async.shared::cta;"}),
        (False, {"fence": "fence.proxy.async.shared::cta;"}),
        (False, {"left": "[ %r177 + 0 ]"}),  # from tensor memory
        (True, {"left": "[ %r177 + 0 ]", "late": "@%p9 tcgen05.mma.x [ %r1 + 0 ], %rd1, %rd2;"}),
    ],
)
def test_a_copy_without_a_fence_before_its_product_is_found(found, changes):
    parts = {"fence": "", "left": "%rd78", "late": ""} | changes
    assert bool(gate.unfenced_copies(COPY.format_map(parts))) == found


def test_a_copy_that_reaches_the_next_pass_is_found():
    """The wait at the end of a pass, the product at the start of the next."""
    before, after = COPY.format(fence="", left="%rd78", late="").split("  cp.async.wait_group 0;\n")
    assert not gate.unfenced_copies(before + after)
    assert gate.unfenced_copies(
        (before + after).replace("  @%p3", "  cp.async.wait_group 0;\n  @%p3")
    )


LOOP = """
    %b_q = ttg.local_alloc : () -> !ttg.memdesc<3x64xi32>
    %b_x = ttg.local_alloc : () -> !ttg.memdesc<3x64xbf16>
    %b_t = ttng.tmem_alloc : () -> !ttg.memdesc<64xbf16>
    %b_x_0 = ttg.memdesc_index %b_x[%c0_i32] : x
    %acc:2 = scf.for %k = %c0 to %K step %c1 iter_args(%n = %c0, %b_x_1 = %b_x_0) -> (i32, x) {
      %b_f = ttg.memdesc_index {filled}[%n] : x
      %done = ttg.async_copy_global_to_local %p, %b_f mask %m : x
      %b_r = ttg.memdesc_trans %b_x_1 {order = array<i32: 1, 0>} : x
      ttng.tc_gen5_mma %b_t, {right}, %acc_0, %true, %true, %bar[%true] {is_async} : x
"""


@pytest.mark.parametrize(
    ("filled", "right", "found"),
    [
        ("%b_q", "%b_r", False),  # codes, which registers take
        ("%b_x", "%b_r", True),
        ("%b_q", "%b_f", True),
        ("%b_q", "%acc#1", True),  # of another loop: taken for one that is filled
    ],
)
def test_what_a_product_reads_is_traced_to_its_buffer(filled, right, found):
    code = LOOP.replace("{filled}", filled).replace("{right}", right)
    assert gate.has_copied_operands(code) == found


@triton.jit
def plain_product(p_x, p_y, p_out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A product whose right operand, in float32, passes through registers into its own buffer."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(p_x.load([0, k]), p_y.load([k, 0]), acc, input_precision="tf32")
    offsets = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(p_out + offsets, acc)


@pytest.mark.parametrize(
    ("dtype", "stages", "found"),
    [(torch.float32, 3, True), (torch.float32, 1, False), (torch.bfloat16, 3, False)],
)
def test_an_operand_filled_before_its_product_is_done_is_found(dtype, stages, found):
    gate._switch_to("sm_100")
    x, y = (
        TensorDescriptor.from_tensor(torch.empty(shape, dtype=dtype), block)
        for shape, block in (((128, 512), [128, 64]), ((512, 128), [64, 128]))
    )
    compiled = plain_product.warmup(
        x, y, torch.empty(128, 128), 512, 128, 128, 64, grid=(1,), num_warps=4, num_stages=stages
    )
    assert bool(gate.refilled_operands(compiled.asm["ttgir"])) == found


def test_a_race_breaks_the_gate_only_where_the_planner_would_run_it(monkeypatch):
    race = ["race: planted"]
    monkeypatch.setattr(gate, "unfenced_copies", lambda ptx: race)
    monkeypatch.setattr(gate, "has_copied_operands", lambda ttgir: True)
    tiles = launch_config("grad_factors", "sm_100", 16, 16, "bf16")
    for known, broken in ((versions.MISCOMPILES[:0], tuple(race)), (DENIED, ())):
        monkeypatch.setattr(versions, "MISCOMPILES", known)
        assert gate.inspect(config("sm_100", "grad_factors", tiles)).broken == broken


@pytest.mark.parametrize("kernel", ["stored", "stored_reduce"])
def test_blocks_across_rows_take_smaller_tiles(kernel):
    """Their scales lie at no multiple of a row: those of a whole tile would spill."""
    found = [c for c in gate._of_kernel("sm_80", kernel) if (c.dtype, c.r) == ("bf16", 64)]
    rows = {c.variant: c.row for c in found}
    assert rows["nested"] == rows["nf4"] == launch_config(kernel, "sm_80", 4096, 64, "bf16")
    assert rows["across"].BO * rows["across"].BK < rows["nf4"].BO * rows["nf4"].BK


def test_every_row_is_covered():
    every = gate.configurations()
    assert len(every) >= 90
    assert {c.arch for c in every} == set(ARCHITECTURES)
    assert {c.kernel for c in every} == set(gate.KERNELS)
    assert {c.dtype for c in every} == set(gate.TYPES)
    plain = [c for c in every if c.variant in ("plain", "nf4")]
    covered = {(c.arch, c.kernel, c.dtype, c.r, c.row) for c in plain}
    for arch in ARCHITECTURES:
        for kernel in gate.KERNELS:
            for dtype in gate.TYPES:
                for r in gate.RANKS:
                    if kernel == gate.DECODE and dtype not in ("bf16", "fp16"):
                        continue
                    for N in gate.TOKENS[:1] if kernel == gate.DECODE else gate.TOKENS:
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
