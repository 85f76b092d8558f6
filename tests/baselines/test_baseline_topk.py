"""Exact top-k against a sort of each row."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dynmask.baselines.exact_topk as module
from dynmask.baselines.exact_topk import TopK
from dynmask.masks import Blocks
from dynmask.ops import attention

SCALE = 0.6


def inputs(batch, heads, groups, q_len, k_len, dtype=torch.float64):
    torch.manual_seed(q_len * 1000 + k_len)
    q = torch.randn(batch, heads, q_len, 16, dtype=dtype)
    k, v = (torch.randn(batch, groups, k_len, 16, dtype=dtype) for _ in range(2))
    return q, k, v


def reference(q, k, keep):
    """``[B, H, Q, K]``, row by row: sorted by (logit, place)."""
    batch, heads, q_len = q.shape[:3]
    k_len = k.shape[2]
    logits = (q @ k.repeat_interleave(heads // k.shape[1], 1).mT).flatten(0, 1)
    out = torch.zeros(batch * heads, q_len, k_len, dtype=torch.bool)
    for h in range(batch * heads):
        for row in range(q_len):
            values = logits[h, row].tolist()
            ranked = sorted(range(k_len - q_len + row + 1), key=lambda j: (-values[j], j))
            out[h, row, ranked[:keep]] = True
    return out.view(batch, heads, q_len, k_len)


@pytest.mark.parametrize(
    ("keep", "count"),
    [(1, lambda k: 1), (13, lambda k: 13), (0.25, lambda k: -(-k // 4))],
    ids=["1", "13", "quarter"],
)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "q_len", "k_len"),
    [(1, 2, 2, 65, 65), (2, 4, 2, 111, 111), (1, 6, 2, 40, 130), (2, 3, 1, 1, 77), (1, 1, 1, 2, 2)],
    ids=["Q65", "B2-H4-G2-Q111", "H6-G2-Q40-K130", "B2-H3-G1-Q1-K77", "Q2"],
)
def test_matches_a_sort_of_each_row(batch, heads, groups, q_len, k_len, keep, count):
    q, k, v = inputs(batch, heads, groups, q_len, k_len)
    mask = TopK(keep=keep).selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    expected = reference(q, k, count(k_len))
    if mask is None:
        assert count(k_len) >= k_len
        return
    assert mask.indices.dtype == torch.int32
    seen = mask.dense(q_len, k_len)
    assert seen.equal(expected)
    assert seen.any(-1).all()
    assert not seen.triu(k_len - q_len + 1).any()
    # The lists keep what Blocks asks for, though they are made without its checks.
    Blocks(mask.indices, mask.counts.contiguous(), block=1, tile=mask.tile)
    wide = [t.repeat_interleave(heads // groups, 1) for t in (k, v)]
    ideal = scaled_dot_product_attention(q, *wide, attn_mask=expected, scale=SCALE)
    torch.testing.assert_close(attention(q, *wide, mask, scale=SCALE), ideal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("keep", [1, 5, 20, 64])
def test_ties_go_to_the_earlier_key(keep, dtype):
    torch.manual_seed(keep)
    # Small integers: sums are exact and most logits have equals.
    q = torch.randint(-1, 2, (2, 4, 65, 8)).to(dtype)
    k = torch.randint(-1, 2, (2, 2, 65, 8)).to(dtype)
    mask = TopK(keep=keep).selector(0, 1).mask(q, k, scale=1.0)
    assert mask.dense(65).equal(reference(q.double(), k.double(), keep))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_logits_of_half_precision_are_float32(dtype):
    q, k, _ = inputs(1, 4, 2, 90, 90, dtype)
    mask = TopK(keep=9).selector(0, 1).mask(q, k, scale=1.0)
    assert mask.dense(90).equal(reference(q.double(), k.double(), 9))


def test_equal_logits_keep_the_first_keys():
    q, k = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8)
    seen = TopK(keep=3).selector(0, 1).mask(q, k, scale=1.0).dense(9)[0, 0]
    assert seen.equal(torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) < 3))


def test_parts_choose_as_the_whole(monkeypatch):
    q, k, _ = inputs(2, 4, 2, 60, 90)
    whole = TopK(keep=7).selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    monkeypatch.setattr(module, "_CELLS", 8 * 90 * 7)
    parts = TopK(keep=7).selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    assert parts.dense(60, 90).equal(whole.dense(60, 90))


def test_chunks_and_rows_choose_as_the_whole():
    q, k, _ = inputs(2, 4, 2, 90, 90)
    whole = TopK(keep=11).selector(0, 1).mask(q, k, scale=SCALE).dense(90)
    selector = TopK(keep=11).selector(0, 1)
    seen = []
    for begin, end in [(0, 40), (40, 77), (77, 88), (88, 89), (89, 90)]:
        mask = selector.mask(q[:, :, begin:end], k[:, :, :end], scale=SCALE)
        part = mask.dense(end - begin, end)
        assert part.equal(whole[:, :, begin:end, :end])
        seen.append(mask.indices.shape[2])
    assert seen == [40, 77, 88, 1, 1]


def test_a_share_is_of_the_keys_at_the_end_of_the_call():
    q, k, _ = inputs(1, 2, 1, 30, 100)
    mask = TopK(keep=0.1).selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    assert mask.dense(30, 100).sum(-1).eq(10).all()


def test_its_output_is_nearer_than_that_of_the_nearest_keys():
    q, k, v = inputs(1, 2, 2, 200, 200)
    seen = TopK(keep=20).selector(0, 1).mask(q, k, scale=SCALE).dense(200)
    near = torch.ones(200, 200, dtype=torch.bool).tril().triu(-19)
    full, top, window = (
        scaled_dot_product_attention(q, k, v, attn_mask=m, scale=SCALE)
        for m in (torch.ones(200, 200, dtype=torch.bool).tril(), seen, near)
    )
    assert (top - full).norm() < 0.5 * (window - full).norm()


def test_keep_all_is_plain_attention():
    q, k, v = inputs(2, 4, 2, 65, 65)
    for keep in (1.0, 65, 1000):
        assert TopK(keep=keep).selector(0, 1).mask(q, k, scale=0.25) is None
    # All but one of the last row, whose least key weighs nothing.
    k[:, :, 3] = -40 * q.unflatten(1, (2, 2))[:, :, :, -1].mean(2)
    mask = TopK(keep=64).selector(0, 1).mask(q, k, scale=0.25)
    ideal = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(attention(q, *wide, mask, scale=0.25), ideal)


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.01, True])
def test_wrong_settings_are_named(keep):
    with pytest.raises(ValueError, match="keep="):
        TopK(keep=keep)
