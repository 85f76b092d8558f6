import pytest
import torch
from attention_cases import blocks, naive_blocks, padding
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.masks import Blocks
from dynmask.masks import blocks as blocks_module


@settings(max_examples=150, deadline=None)
@given(
    k_len=st.integers(1, 30),
    block=st.integers(1, 9),
    tile=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_rows_are_the_definition(k_len, block, tile, seed, data):
    q_len = data.draw(st.integers(0, k_len))
    mask = blocks(2, 2, k_len, block=block, tile=tile, seed=seed)
    expected = naive_blocks(mask, q_len, k_len)
    assert mask.dense(q_len, k_len).equal(expected)
    start = data.draw(st.integers(0, k_len))
    stop = data.draw(st.integers(start, k_len))
    padded = mask & padding((start, stop), (0, k_len))
    assert padded.dense(q_len, k_len).equal(naive_blocks(padded, q_len, k_len))
    first = data.draw(st.integers(0, k_len))
    last = data.draw(st.integers(first, k_len))
    whole = naive_blocks(padded, k_len, k_len)
    for keys in (last, k_len):
        assert padded.slots(first, last, keys).equal(whole[:, :, first:last, :keys])


@pytest.mark.parametrize(("block", "tile"), [(1, 1), (8, 12), (64, 16), (5, 7)])
@pytest.mark.parametrize("length", [1, 63, 65, 111])
def test_density_counts_what_dense_shows(length, block, tile):
    mask = blocks(2, 3, 111, block=block, tile=tile)
    pairs = length * (length + 1) / 2
    expected = mask.dense(length).sum((-1, -2)).double() / pairs
    torch.testing.assert_close(mask.density(length), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 111), (30, 65), (64, 64), (0, 5)])
@pytest.mark.parametrize(("block", "tile"), [(1, 1), (8, 12), (64, 16)])
@pytest.mark.parametrize("entries", [1, 2000, 1 << 20], ids=lambda n: f"at-most-{n}")
def test_pairs_of_the_last_rows_are_counted(monkeypatch, q_len, k_len, block, tile, entries):
    monkeypatch.setattr(blocks_module, "_CELLS", entries)
    mask = blocks(2, 3, 111, block=block, tile=tile)
    assert mask.visible_pairs(q_len, k_len).equal(mask.dense(q_len, k_len).sum((-1, -2)))


def test_every_block_is_causal():
    indices = torch.arange(5).expand(1, 1, 4, 5).int()
    mask = Blocks(indices, torch.full((1, 1, 4), 5, dtype=torch.int32), block=7, tile=10)
    assert mask.dense(33)[0, 0].equal(torch.ones(33, 33, dtype=torch.bool).tril())
    assert mask.density(33).item() == 1
    assert mask.capacity == 40


def test_what_lies_behind_counts_is_not_read():
    indices = torch.tensor([1, -9, 1, 2**31 - 1]).int().view(1, 1, 1, 4)
    mask = Blocks(indices, torch.ones(1, 1, 1, dtype=torch.int32), block=2, tile=5)
    assert mask.dense(5)[0, 0].equal(naive_blocks(mask, 5, 5)[0, 0])
    assert mask.dense(5)[0, 0, 4].tolist() == [False, False, True, True, False]
    assert mask.density(5).item() == (1 + 2 + 2) / 15


def test_and_leaves_the_mask_alone():
    mask = blocks(1, 2, 20)
    padded = mask & padding((1, 4), (0, 20))
    assert mask.padding is None
    assert padded.dense(20).shape == (2, 2, 20, 20)
    with pytest.raises(ValueError, match="padded already"):
        padded & padding((0, 4))
    with pytest.raises(ValueError, match="padding has 3 rows but the mask's batch is 2"):
        blocks(2, 2, 20) & padding((0, 4), (0, 4), (0, 4))
    with pytest.raises(TypeError):
        mask & torch.ones(1, 8)


def test_to_keeps_everything():
    mask = blocks(1, 2, 20) & padding((1, 4))
    moved = mask.to("meta")
    assert moved.device.type == moved.padding.start.device.type == "meta"
    assert (moved.block, moved.tile) == (8, 12)
    assert mask.to("cpu") is mask


LISTS = torch.tensor([[[[0, 1, 2]]]], dtype=torch.int32)
ONE = torch.ones(1, 1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Blocks(LISTS[0], ONE, 2, 2), "indices must be"),
        (lambda: Blocks(LISTS.long(), ONE, 2, 2), "indices must be"),
        (lambda: Blocks(LISTS, ONE[0], 2, 2), "counts must be"),
        (lambda: Blocks(LISTS, ONE.long(), 2, 2), "counts must be"),
        (lambda: Blocks(LISTS, ONE.to("meta"), 2, 2), "on meta"),
        (lambda: Blocks(LISTS, ONE, 0, 2), "at least 1"),
        (lambda: Blocks(LISTS, ONE, 2, 0), "at least 1"),
        (lambda: Blocks(LISTS, ONE * 4, 2, 2), r"\[0, 3\]"),
        (lambda: Blocks(LISTS, ONE * -1, 2, 2), r"\[0, 3\]"),
        (lambda: Blocks(LISTS - 1, ONE, 2, 2), "negative"),
        (lambda: Blocks(LISTS // 2, ONE * 2, 2, 2), "twice"),
        (lambda: Blocks(LISTS, ONE, 2, 2).dense(3), "k_len <= 2"),
        (lambda: Blocks(LISTS, ONE, 2, 2).dense(2, 1), "q_len <= k_len"),
        (lambda: Blocks(LISTS, ONE, 2, 2).density(3), r"\[1, 2\]"),
        (lambda: Blocks(LISTS, ONE, 2, 2, padding((0, 1)).to("meta")), "padding is on meta"),
    ],
    ids=range(15),
)
def test_refuses(build, match):
    with pytest.raises(ValueError, match=match):
        build()
