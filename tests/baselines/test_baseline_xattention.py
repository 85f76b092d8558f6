"""XAttention against its definition, antidiagonal by antidiagonal."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dynmask.baselines.xattention as module
from dynmask.baselines.xattention import XAttention
from dynmask.masks import Blocks
from dynmask.ops import attention

SCALE = 0.6
SHAPES = pytest.mark.parametrize(
    ("batch", "heads", "groups", "q_len", "k_len"),
    [
        pytest.param(1, 2, 2, 96, 96, id="Q96"),
        pytest.param(2, 4, 2, 111, 111, id="B2-H4-G2-Q111"),
        pytest.param(1, 3, 1, 65, 130, id="H3-G1-Q65-K130"),
        pytest.param(2, 2, 1, 37, 101, id="B2-H2-G1-Q37-K101"),
        pytest.param(1, 1, 1, 5, 5, id="Q5"),
    ],
)


def inputs(batch, heads, groups, q_len, k_len, dtype=torch.float64):
    torch.manual_seed(q_len * 1000 + k_len)
    q = torch.randn(batch, heads, q_len, 16, dtype=dtype)
    k, v = (torch.randn(batch, groups, k_len, 16, dtype=dtype) for _ in range(2))
    return q, k, v


def block_masses(q, k, scale, stride, block):
    """``{(tile, block): mass}`` of one head, ``q [Q, D]`` and ``k [K, D]``, cell by cell."""
    q_len, k_len = len(q), len(k)
    begin = k_len - q_len
    masses = {}
    for u in range(-(-k_len // stride)):
        if not any(begin <= u * stride + s < k_len for s in range(stride)):
            continue
        cells = []
        for w in range(u + 1):
            pairs = [(u * stride + stride - 1 - s, w * stride + s) for s in range(stride)]
            cells.append(sum(q[i - begin] @ k[j] for i, j in pairs if begin <= i < k_len > j))
        weights = torch.tensor([float(c) * scale / stride for c in cells]).double().softmax(0)
        for w, weight in enumerate(weights.tolist()):
            at = u * stride // block, w * stride // block
            masses[at] = masses.get(at, 0.0) + weight
    return masses


def reference(q, k, scale, stride, threshold, block, sink):
    """``[B, H, Q, K]``."""
    batch, heads, q_len = q.shape[:3]
    k_len = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    out = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            masses = block_masses(q[b, h], k[b, h], scale, stride, block)
            for tile in {t for t, _ in masses}:
                row = {n: mass for (t, n), mass in masses.items() if t == tile}
                kept = {tile, 0} if sink else {tile}
                for n in sorted(set(row) - kept, key=lambda n: (-row[n], n)):
                    if sum(row[m] for m in kept) >= threshold * sum(row.values()):
                        break
                    kept.add(n)
                for i in range(max(tile * block, k_len - q_len), min((tile + 1) * block, k_len)):
                    for j in range(i + 1):
                        out[b, h, i - (k_len - q_len), j] = j // block in kept
    return out


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no-sink"])
@pytest.mark.parametrize(
    ("stride", "block", "threshold"),
    [(4, 16, 0.7), (8, 8, 0.5), (3, 12, 0.85), (1, 10, 0.9)],
    ids=["S4-b16", "S8-b8", "S3-b12", "S1-b10"],
)
@SHAPES
def test_matches_the_definition(batch, heads, groups, q_len, k_len, stride, block, threshold, sink):
    q, k, v = inputs(batch, heads, groups, q_len, k_len)
    method = XAttention(stride=stride, threshold=threshold, block=block, sink=sink)
    mask = method.selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    assert mask.indices.shape[:2] == (batch, heads)
    # The lists keep what Blocks asks for, though they are made without its checks.
    Blocks(mask.indices, mask.counts, block=block, tile=block)
    seen = mask.dense(q_len, k_len)
    expected = reference(q, k, SCALE, stride, threshold, block, sink)
    assert seen.equal(expected)
    own = torch.arange(q_len)
    assert seen[..., own, own + k_len - q_len].all()
    assert not seen.triu(k_len - q_len + 1).any()
    if sink:
        assert seen[..., 0].all()
    if k_len > 50:
        assert not seen.equal(torch.ones_like(seen).tril(k_len - q_len))
    wide = [t.repeat_interleave(heads // groups, 1) for t in (k, v)]
    ideal = scaled_dot_product_attention(q, *wide, attn_mask=expected, scale=SCALE)
    torch.testing.assert_close(attention(q, *wide, mask, scale=SCALE), ideal)


def test_parts_of_the_map_choose_as_the_whole(monkeypatch):
    q, k, _ = inputs(2, 4, 2, 130, 150)
    method = XAttention(stride=4, threshold=0.6, block=16)
    whole = method.selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    monkeypatch.setattr(module, "_CELLS", 1)
    parts = method.selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    assert parts.dense(130, 150).equal(whole.dense(130, 150))


def test_the_folded_map_at_the_papers_sizes():
    """As the authors put it: queries of a group in reverse, next to each other, times the keys."""
    torch.manual_seed(0)
    length, stride = 1024, 8
    q, k = torch.randn(1, 2, length, 32), torch.randn(1, 2, length, 32)
    k[:, :, 256:384] += 0.5 * q[:, :, 896:].mean(2, keepdim=True)
    fold_q = torch.cat([q[:, :, stride - 1 - s :: stride] for s in range(stride)], -1)
    fold_k = torch.cat([k[:, :, s::stride] for s in range(stride)], -1)
    cells = length // stride
    future = torch.ones(cells, cells, dtype=torch.bool).triu(1)
    logits = fold_q @ fold_k.mT / (32**0.5 * stride)
    weights = logits.masked_fill(future, float("-inf")).softmax(-1)
    mass = weights.view(1, 2, 8, 16, 8, 16).sum((3, 5)) / 16
    mask = XAttention(stride=stride).selector(0, 1).mask(q, k, scale=32**-0.5)
    table = mask.table(0, 8, length)
    held = (mass * table).sum(-1)
    assert (held >= 0.9 - 1e-5).all()
    # Without its smallest free block each tile would hold too little.
    free = table & ~torch.eye(8, dtype=torch.bool)
    free[..., 0] = False
    least = mass.masked_fill(~free, 9).amin(-1)
    assert (held - least < 0.9)[least < 9].all()
    assert (least < 9).any()
    assert (mass.masked_fill(table, 0).amax(-1) <= least).all()


def test_later_tiles_change_nothing():
    q, k, _ = inputs(1, 2, 1, 100, 100)
    method = XAttention(stride=4, threshold=0.6, block=16)
    mask = method.selector(0, 1).mask(q, k, scale=SCALE)
    q[:, :, 64:], k[:, :, 64:] = 9, -9
    again = method.selector(0, 1).mask(q, k, scale=SCALE)
    assert again.dense(100)[:, :, :64].equal(mask.dense(100)[:, :, :64])
    assert not again.dense(100).equal(mask.dense(100))


def test_chunks_choose_as_the_whole_at_tile_ends_and_rows_are_dense():
    q, k, _ = inputs(2, 4, 2, 112, 112)
    method = XAttention(stride=4, threshold=0.6, block=16)
    whole = method.selector(0, 1).mask(q, k, scale=SCALE).dense(112)
    selector = method.selector(0, 1)
    first = selector.mask(q[:, :, :48], k[:, :, :48], scale=SCALE)
    assert first.dense(48).equal(whole[:, :, :48, :48])
    second = selector.mask(q[:, :, 48:], k, scale=SCALE)
    assert second.dense(64, 112).equal(whole[:, :, 48:])
    more = torch.cat([k, k[:, :, :1]], 2)
    assert selector.mask(q[:, :, :1], more, scale=SCALE) is None


def test_ties_go_to_the_earlier_block():
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    method = XAttention(stride=2, threshold=0.6, block=8, sink=False)
    mask = method.selector(0, 1).mask(q, k, scale=1.0)
    # The last tile: 8 blocks, all cells equal but for what causality cuts of the own block.
    assert mask.table(7, 8, 64)[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 7]


def test_keep_all_is_plain_attention():
    q, k, v = inputs(2, 4, 2, 65, 65)
    assert XAttention(threshold=1).selector(0, 1).mask(q, k, scale=0.25) is None
    # Two blocks at most: the own and the first.
    mask = XAttention(stride=8, block=40, threshold=0.01).selector(0, 1).mask(q, k, scale=0.25)
    assert isinstance(mask, Blocks)
    assert mask.density(65).eq(1).all()
    ideal = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(attention(q, *wide, mask, scale=0.25), ideal)


def test_nothing_of_a_chunk_needs_the_rows_before_it():
    q, k, _ = inputs(1, 2, 1, 110, 110)
    method = XAttention(stride=8, threshold=0.7, block=16)
    mask = method.selector(0, 1).choose(q[:, :, 50:], k, None, scale=SCALE)[0]
    expected = reference(q[:, :, 50:], k, SCALE, 8, 0.7, 16, True)
    assert mask.dense(60, 110).equal(expected)
    assert not mask.counts[:, :, :3].any()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": 12}, "multiple of stride"),
        ({"block": 0}, "block"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.2}, "threshold"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        XAttention(**settings)
