"""Split-K: how programs share an inner dimension, or a reduction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hut_kernels.triton.launch import choose_num_splits, choose_reduction_splits

from ..strategies import examples


@given(
    tiles_o=st.integers(1, 300),
    tiles_k=st.integers(1, 300),
    block_o=st.sampled_from([16, 32, 64, 128]),
    block_k=st.sampled_from([16, 32, 64, 128, 256]),
    r=st.integers(1, 128),
    itemsize=st.sampled_from([2, 4]),
    programs=st.integers(1, 400),
)
@examples(300)
def test_splits_are_full_bounded_and_enough(
    tiles_o, tiles_k, block_o, block_k, r, itemsize, programs
):
    O, K = tiles_o * block_o, tiles_k * block_k
    partial_bytes = O * K * itemsize
    splits = choose_reduction_splits(tiles_o, tiles_k, O, K, r, partial_bytes, programs)
    for count, tiles in zip(splits, (tiles_o, tiles_k), strict=True):
        assert 1 <= count <= tiles
        length = -(-tiles // count)
        assert count == -(-tiles // length), "a split without a tile"
    partials = 4 * r * ((splits[0] - 1) * K + (splits[1] - 1) * O)
    assert partials <= partial_bytes
    assert splits == (1, 1) or splits[0] * splits[1] <= 2 * programs


def test_splits_of_nothing_are_one():
    assert choose_reduction_splits(0, 0, 0, 0, 4, 0, 100) == (1, 1)


@pytest.mark.parametrize(
    ("tiles", "size", "r", "programs", "splits"),
    [
        # 4096 x 4096 in bf16 on 132 multiprocessors, tiles of 64 x 128: of 64 splits of d hut_A and
        # as few of d hut_B as fill the device the partials would move twice the bytes.
        ((16, 32), 4096, 64, 132, (4, 32)),
        ((16, 32), 4096, 16, 264, (8, 32)),
        # 108 multiprocessors: 112 programs would run as two waves, the second nearly empty.
        ((128, 32), 4096, 16, 108, (3, 32)),
        ((16, 8), 1024, 16, 132, (16, 8)),
        ((2, 2), 128, 1, 16, (2, 2)),
    ],
)
def test_splits_fill_whole_waves_and_write_rows_once(tiles, size, r, programs, splits):
    bytes_ = size * size * 2 * 5 // 4
    assert choose_reduction_splits(*tiles, size, size, r, bytes_, programs) == splits


@given(tiles_k=st.integers(1, 64), tiles_o=st.integers(1, 64), programs=st.integers(1, 300))
@examples(100)
def test_the_device_is_busy_where_memory_allows(tiles_k, tiles_o, programs):
    o_splits, k_splits = choose_reduction_splits(
        tiles_o, tiles_k, 64 * tiles_o, 64 * tiles_k, 1, 1 << 40, programs
    )
    assert 2 * o_splits * k_splits >= min(programs, tiles_o * tiles_k)


@given(tiles=st.integers(0, 500), steps=st.integers(0, 500), sms=st.integers(1, 200))
@examples(100)
def test_programs_share_K_only_where_tiles_leave_the_device_idle(tiles, steps, sms):
    """And then each has four steps at least."""
    num_splits = choose_num_splits(tiles, steps, sms)
    assert 1 <= num_splits <= 16
    assert num_splits == 1 or num_splits * 4 <= steps
    assert num_splits == 1 or 2 * tiles <= sms
    if 2 * tiles <= sms and steps >= 8:
        assert num_splits > 1
