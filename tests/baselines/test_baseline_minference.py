"""Vertical-slash against its definition, pair by pair of the last rows."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dynmask.baselines.minference import VerticalSlash
from dynmask.masks import Stripes
from dynmask.ops import attention

SCALE = 0.7
SHAPES = pytest.mark.parametrize(
    ("heads", "groups", "q_len", "k_len"),
    [(2, 2, 65, 65), (4, 2, 111, 111), (6, 2, 40, 130), (3, 1, 7, 90), (2, 1, 2, 2)],
    ids=["H2-Q65", "H4-G2-Q111", "H6-G2-Q40-K130", "H3-G1-Q7-K90", "H2-G1-Q2"],
)


def inputs(heads, groups, q_len, k_len, dtype=torch.float64):
    torch.manual_seed(q_len * 1000 + k_len)
    q = torch.randn(1, heads, q_len, 16, dtype=dtype)
    k, v = (torch.randn(1, groups, k_len, 16, dtype=dtype) for _ in range(2))
    return q, k, v


def best(score, count, always):
    """The first ``always`` and the largest others, ``count`` in all; ties to the earlier."""
    rank = sorted(range(len(score)), key=lambda j: (j >= always, -score[j], j))
    return set(rank[:count])


def reference(q, k, scale, columns, offsets, last, sinks, near):
    heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    out = torch.zeros(1, heads, q_len, k_len, dtype=torch.bool)
    for h in range(heads):
        vertical, slash = [0.0] * k_len, [0.0] * k_len
        for row in range(max(0, q_len - last), q_len):
            i = k_len - q_len + row
            weights = (k[0, h, : i + 1] @ q[0, h, row] * scale).softmax(0)
            for j, weight in enumerate(weights.tolist()):
                vertical[j] += weight
                slash[i - j] += weight
        seen_columns, seen_offsets = best(vertical, columns, sinks), best(slash, offsets, near)
        for row in range(q_len):
            i = k_len - q_len + row
            for j in range(i + 1):
                out[0, h, row, j] = j in seen_columns or i - j in seen_offsets
    return out


@pytest.mark.parametrize(
    ("vertical", "slash", "columns", "offsets"),
    [(12, 9, 12, 9), (1, 1, 3, 4), (0.2, 0.125, None, None)],
    ids=["counts", "forced-only", "shares"],
)
@SHAPES
def test_matches_the_definition(heads, groups, q_len, k_len, vertical, slash, columns, offsets):
    q, k, v = inputs(heads, groups, q_len, k_len)
    columns = columns or max(3, -int(-0.2 * k_len // 1))
    offsets = offsets or max(4, -int(-0.125 * k_len // 1))
    method = VerticalSlash(vertical=vertical, slash=slash, last=10, sinks=3, near=4)
    mask = method.selector(0, 1).choose(q, k, None, scale=SCALE)[0]
    expected = reference(q, k, SCALE, columns, offsets, 10, 3, 4)
    if mask is None:
        assert max(columns, offsets) >= k_len
        assert expected.equal(torch.ones_like(expected).tril(k_len - q_len))
        return
    seen = mask.dense(q_len, k_len)
    assert seen.equal(expected)
    own = torch.arange(q_len)
    assert seen[..., own, own + k_len - q_len].all()
    assert not seen.triu(k_len - q_len + 1).any()
    # The engine takes it as it is, heads of a group included.
    out = attention(q, k, v, mask, scale=SCALE)
    wide = [t.repeat_interleave(heads // groups, 1) for t in (k, v)]
    ideal = scaled_dot_product_attention(q, *wide, attn_mask=expected, scale=SCALE)
    torch.testing.assert_close(out, ideal)


def test_sums_find_a_planted_column_and_offset():
    q, k, _ = inputs(1, 1, 200, 200)
    mark = torch.zeros(16, dtype=torch.float64)
    mark[0] = 30
    q[..., 0] = 5
    k[..., 0] = 0
    k[0, 0, 77] = mark
    turn = 2 * torch.pi * torch.arange(200) / 200
    # Keys 50 back agree in angle with a row.
    q[0, 0, :, 1], q[0, 0, :, 2] = 40 * turn.cos(), 40 * turn.sin()
    k[0, 0, :, 1], k[0, 0, :, 2] = (
        (turn + turn[50]).cos() * 40,
        (turn + turn[50]).sin() * 40,
    )
    method = VerticalSlash(vertical=2, slash=2, last=64, sinks=1, near=1)
    mask = method.selector(0, 1).mask(q, k, scale=0.2)
    assert mask.offsets[0].tolist() == [0, 50]
    method = VerticalSlash(vertical=2, slash=2, last=64, sinks=1, near=1)
    q[..., 1:3] = 0
    mask = method.selector(0, 1).mask(q, k, scale=0.2)
    assert mask.columns[0].tolist() == [0, 77]


def test_ties_go_to_the_first_columns_and_the_nearest_offsets():
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    method = VerticalSlash(vertical=3, slash=3, last=1, sinks=0, near=1)
    mask = method.selector(0, 1).mask(q, k, scale=1.0)
    assert mask.columns[0].tolist() == [0, 1, 2]
    assert mask.offsets[0].tolist() == [0, 1, 2]


def test_only_the_last_rows_choose():
    q, k, _ = inputs(2, 1, 80, 80)
    method = VerticalSlash(vertical=10, slash=10, last=16, sinks=2, near=2)
    mask = method.selector(0, 1).mask(q, k, scale=SCALE)
    q[:, :, :64] = 100
    again = method.selector(0, 1).mask(q, k, scale=SCALE)
    assert again.dense(80).equal(mask.dense(80))
    q[:, :, 64:] = torch.randn(1, 2, 16, 16, dtype=q.dtype)
    assert not method.selector(0, 1).mask(q, k, scale=SCALE).dense(80).equal(mask.dense(80))


def test_a_chunk_chooses_anew_and_rows_are_dense():
    q, k, _ = inputs(4, 2, 100, 100)
    method = VerticalSlash(vertical=9, slash=9, last=12, sinks=2, near=3)
    selector = method.selector(0, 1)
    whole = selector.mask(q[:, :, :60], k[:, :, :60], scale=SCALE)
    assert whole.dense(60).equal(reference(q[:, :, :60], k[:, :, :60], SCALE, 9, 9, 12, 2, 3))
    assert selector.mask(q[:, :, 60:61], k[:, :, :61], scale=SCALE) is None
    chunk = selector.mask(q[:, :, 61:], k, scale=SCALE)
    assert chunk.dense(39, 100).equal(reference(q[:, :, 61:], k, SCALE, 9, 9, 12, 2, 3))


@pytest.mark.parametrize(
    "settings", [{"vertical": 1.0}, {"slash": 500}, {"sinks": 70}], ids=["columns", "offsets", "s"]
)
def test_keep_all_is_plain_attention(settings):
    q, k, v = inputs(4, 2, 65, 65)
    mask = VerticalSlash(**{"vertical": 3, "slash": 3, **settings}, near=2).selector(0, 1)
    assert mask.mask(q, k, scale=0.25) is None
    # One column fewer than all, which the nearest offset makes good for.
    mask = VerticalSlash(vertical=64, slash=64, sinks=1, near=64).selector(0, 1)
    mask = mask.mask(q, k, scale=0.25)
    assert isinstance(mask, Stripes)
    assert mask.density(65).tolist() == pytest.approx([1] * 4)
    ideal = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, mask, scale=0.25), ideal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_summed_in_float32(dtype):
    q, k, _ = inputs(2, 1, 90, 90, dtype)
    method = VerticalSlash(vertical=8, slash=8, last=32, sinks=2, near=2)
    mask = method.selector(0, 1).mask(q, k, scale=SCALE)
    expected = reference(q.double(), k.double(), SCALE, 8, 8, 32, 2, 2)
    assert mask.dense(90).equal(expected)


def test_a_batch_is_refused_where_rows_would_differ():
    q, k, _ = (t.expand(2, -1, -1, -1) for t in inputs(2, 1, 65, 65))
    selector = VerticalSlash(vertical=5, slash=5, near=2, sinks=2).selector(0, 1)
    assert not selector.batched
    with pytest.raises(ValueError, match="one sequence at a time"):
        selector.mask(q, k, scale=1.0)


@pytest.mark.parametrize(
    "settings",
    [{"vertical": 0}, {"slash": 1.5}, {"vertical": True}, {"last": 0}, {"near": 0}, {"sinks": -1}],
    ids=str,
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        VerticalSlash(**settings)
