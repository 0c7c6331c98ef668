"""The launch tables: every lookup gives a config that the device can hold."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels.triton import tables
from hut_kernels.triton.tables import ARCHITECTURES, launch_config

KERNELS = (
    *("forward", "grad_input", "grad_factors", "grad_reduce", "weight"),
    *("stored", "stored_reduce"),
)
TYPES = ("bf16", "fp16", "tf32", "fp32")


@given(
    kernel=st.sampled_from(KERNELS),
    arch=st.sampled_from((*ARCHITECTURES, "sm_87", "sm_103", "sm_121", "sm_75", "sm_200")),
    N=st.integers(0, 1 << 20),
    r=st.integers(1, 128),
    dtype=st.sampled_from(TYPES),
)
def test_there_is_a_config_for_everything(kernel, arch, N, r, dtype):
    tiles = launch_config(kernel, arch, N, r, dtype)
    for size in (tiles.BN, tiles.BO, tiles.BK):
        assert size >= 16
        assert size & (size - 1) == 0
    assert tiles.warps in (2, 4, 8)
    assert tiles.stages >= 1
    assert tiles.wgmma_async <= (tables.family(arch) == "sm_90")


def test_ranks_fall_into_the_class_above():
    for r, largest in ((17, 32), (1, 16)):
        here, there = (
            launch_config("forward", "sm_80", 4096, rank, "bf16") for rank in (r, largest)
        )
        assert here == there


def test_few_tokens_have_tiles_of_their_own():
    for arch in ARCHITECTURES:
        tokens = (1, 16, 17, 64, 65, 128, 129)
        tiles = [launch_config("forward", arch, N, 16, "bf16").BN for N in tokens]
        assert tiles[:6] == [16, 16, 64, 64, 128, 128]
        assert tiles[6] >= 128


def test_a_low_smem_config_takes_no_more_memory():
    def loaded(kernel, tiles):
        """Elements that the pipeline of a product holds."""
        inner = tiles.BK if kernel == "forward" else tiles.BO
        return tiles.stages * (tiles.BN * inner + tiles.BO * tiles.BK)

    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            for N in (16, 64, 4096):
                for r, gathers in itertools.product((16, 128), (False, True)):
                    tiles = launch_config(kernel, arch, N, r, "bf16")
                    light = launch_config(kernel, arch, N, r, "bf16", True, gathers)
                    assert light.BN <= tiles.BN
                    assert light.BO <= tiles.BO
                    assert light.stages <= max(2, tiles.stages)
                    if kernel in ("forward", "grad_input"):
                        assert loaded(kernel, light) <= loaded(kernel, tiles)
                        if gathers and kernel == "forward" and N <= 64:
                            assert light.BK == max(32, tiles.BK // 2)
                        assert light.stages <= 2
                    else:
                        assert light.BK <= tiles.BK


@pytest.mark.parametrize(
    ("arch", "family"),
    [("sm_87", "sm_89"), ("sm_86", "sm_89"), ("sm_103", "sm_100"), ("sm_121", "sm_89")],
)
def test_unknown_architectures_take_the_configs_of_their_kin(arch, family):
    assert tables.family(arch) == family
