"""Split-K: how programs share an inner dimension, or a reduction."""

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
    sms=st.integers(1, 200),
)
@examples(300)
def test_splits_are_full_bounded_and_enough(tiles_o, tiles_k, block_o, block_k, r, itemsize, sms):
    O, K = tiles_o * block_o, tiles_k * block_k
    weight_bytes = O * K * itemsize
    splits = choose_reduction_splits(tiles_o, tiles_k, O, K, r, weight_bytes, sms)
    for count, tiles in zip(splits, (tiles_o, tiles_k), strict=True):
        assert 1 <= count <= tiles
        length = -(-tiles // count)
        assert count == -(-tiles // length), "a split without a tile"
    partials = 4 * r * ((splits[0] - 1) * K + (splits[1] - 1) * O)
    assert partials <= weight_bytes
    assert splits == (1, 1) or splits[0] * splits[1] <= 2 * sms
    assert choose_reduction_splits(tiles_o, tiles_k, O, K, r, weight_bytes, sms) == splits


def test_o_splitsf_nothing_are_one():
    assert choose_reduction_splits(0, 0, 0, 0, 4, 0, 100) == (1, 1)


def test_k_splitseep_a_device_busy_where_the_bound_allows():
    """4096 x 4096 in bfloat16 at r = 16: more than one program an SM."""
    o_splits, k_splits = choose_reduction_splits(64, 32, 4096, 4096, 16, 4096 * 4096 * 2, 108)
    assert o_splits * k_splits > 108
    for r in (16, 64):
        o_splits, k_splits = choose_reduction_splits(16, 16, 1024, 1024, r, 1024 * 1024 * 2, 132)
        assert o_splits * k_splits >= (132 if r == 16 else 16)
    small = choose_reduction_splits(2, 2, 128, 128, 1, 128 * 128 * 2, 2)
    assert small == (2, 2)


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
