"""The cpu backend under lifetimes, against attention under the definition's dense mask."""

import pytest
import torch
from attention_cases import naive_attention, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from lifetimes_cases import MASKS, definition, expiries

from dynmask.masks import Blocks, Lifetimes, Stripes
from dynmask.ops import attention, choose, computed_pairs, cpu, lifetimes_schedule, supports


def check(q, k, v, mask, bias=None, hidden=None):
    """Hold output and log-sum-exp to twice the error of same-dtype eager.

    ``hidden``: k and v with anything at the keys that no row sees.
    """
    groups = mask.expiry.shape[1]
    seen = definition(mask, q.shape[2], q.shape[1] // groups)
    truth = naive_attention(q, k, v, seen, bias)
    eager = naive_attention(q, k, v, seen, bias, dtype=q.dtype)
    given_k, given_v = (k, v) if hidden is None else hidden
    out, lse = attention(q, given_k, given_v, mask, bias=bias, impl="cpu", return_lse=True)
    alone = attention(q, given_k, given_v, mask, bias=bias, impl="cpu")
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    allowed = 2 * (eager.double() - truth).abs().max() + 16 * torch.finfo(precise).eps
    for got in (out, alone):
        assert got.dtype == q.dtype
        assert (got.double() - truth).abs().max() <= allowed
    assert lse.dtype == precise
    wide = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ wide.transpose(2, 3) / q.shape[-1] ** 0.5
    if bias is not None:
        logits += bias.double().repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
    expected = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 63, 65, 111, 1000])
def test_lengths(length):
    check(*tensors(1, 4, 2, length, length, 32), expiries(1, 2, length))


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
@pytest.mark.parametrize("q_len", [2, 150], ids=["decode", "prefill"])
def test_group_ratios(ratio, q_len):
    check(*tensors(2, 2 * ratio, 2, q_len, 150, 16), expiries(2, 2, 150))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("q_len", [1, 150], ids=["decode", "prefill"])
def test_dtypes(dtype, q_len):
    q, k, v = tensors(1, 4, 2, q_len, 150, 64, dtype=dtype)
    check(q, k, v, expiries(1, 2, 150))


@pytest.mark.parametrize("q_len", [1, 3, 4, 5, 33, 199, 200], ids=lambda n: f"q{n}")
def test_fewer_rows_than_keys(q_len):
    check(*tensors(2, 4, 2, q_len, 200, 16), expiries(2, 2, 200))


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("q_len", [1, 90], ids=["decode", "prefill"])
def test_one_expiry_for_all_rows_or_heads(batch, groups, q_len):
    check(*tensors(3, 4, 2, q_len, 90, 16), expiries(batch, groups, 90))


@pytest.mark.parametrize("tile", [32, 64, 512])
@pytest.mark.parametrize("entries", [1, 300, 1 << 20], ids=lambda n: f"at-most-{n}")
def test_any_tile_and_section(monkeypatch, tile, entries):
    monkeypatch.setattr(lifetimes_schedule, "_TILES", (tile,))
    monkeypatch.setattr(lifetimes_schedule, "_ENTRIES", entries)
    check(*tensors(2, 4, 2, 333, 400, 16), expiries(2, 2, 400))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("q_len", [1, 3, 60, 301])
def test_masks(kind, q_len):
    check(*tensors(2, 4, 2, q_len, 301, 16), MASKS[kind](301))


@pytest.mark.parametrize("q_len", [1, 90], ids=["decode", "prefill"])
def test_bias(q_len):
    bias = torch.randn(2, 2, 90)
    bias[:, 0, 60:] = -torch.inf
    check(*tensors(2, 4, 2, q_len, 90, 16), MASKS["top"](90), bias)
    bias[:] = -torch.inf
    out, lse = attention(
        *tensors(2, 4, 2, q_len, 90, 16), MASKS["top"](90), bias=bias, impl="cpu", return_lse=True
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_scale_and_strides():
    q = torch.randn(2, 90, 16, 4).permute(0, 3, 1, 2)
    k = torch.randn(90, 2, 16, 4).permute(1, 3, 0, 2)[:, ::2]
    v = torch.randn(2, 2, 180, 32)[:, :, ::2, ::2]
    mask = expiries(2, 2, 90)
    for rows in (1, 90):
        last = q[:, :, -rows:]
        check(last, k, v, mask)
        expected = attention(last * 3, k, v, mask, impl="reference")
        got = attention(last, k, v, mask, scale=0.75, impl="cpu")
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("q_len", [1, 4, 120])
def test_hidden_keys_may_hold_anything(bad, q_len):
    mask = expiries(2, 2, 120)
    q, k, v = tensors(2, 4, 2, q_len, 120, 16)
    dead = ~definition(mask, q_len, 1).any(2)
    hidden = [t.masked_fill(dead[..., None], bad) for t in (k, v)]
    assert not hidden[1].isfinite().all()
    check(q, k, v, mask, hidden=hidden)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("q_len", [4, 120])
def test_a_key_that_some_rows_see_touches_only_those(bad, q_len):
    mask = MASKS["window"](120)
    q, k, v = tensors(1, 4, 2, q_len, 120, 16)
    at = 60 if q_len == 120 else 118
    clean = attention(q, k, v, mask, impl="cpu")
    touched = definition(mask, q_len, 4)[0, 0, :, at]
    for values in (k, v):
        kept = values.clone()
        values[:, :, at, 3] = bad
        bias = torch.zeros(1, 2, 120)
        for extra in (None, bias):
            out = attention(q, k, v, mask, bias=extra, impl="cpu")
            torch.testing.assert_close(out[:, :, ~touched], clean[:, :, ~touched])
        assert not out[:, :, touched].isfinite().all(-1).any() or values is k
        values.copy_(kept)
    bias[:, :, at] = torch.nan
    out = attention(q, k, v, mask, bias=bias, impl="cpu")
    torch.testing.assert_close(out[:, :, ~touched], clean[:, :, ~touched])
    assert out[:, :, touched].isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    ratio=st.integers(1, 3),
    data=st.data(),
)
def test_random_lifetimes(count, seed, ratio, data):
    q_len = data.draw(st.integers(1, count))
    check(*tensors(1, 2 * ratio, 2, q_len, count, 8, seed=seed), expiries(1, 2, count, seed))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([32, 64, 256]),
    data=st.data(),
)
def test_tiles_hold_the_keys_alive_in_them(count, seed, size, data):
    q_len = data.draw(st.integers(1, count))
    mask = expiries(2, 2, count, seed)
    seen = definition(mask, q_len, 1).flatten(0, 1)
    runs = lifetimes_schedule.Runs.build(mask, q_len)
    got = torch.zeros_like(seen)
    for tile in lifetimes_schedule.tiles(runs, size, torch.float32):
        rows = slice(tile.top, tile.last)
        alive = seen[tile.owner, rows].any(0).nonzero().flatten()
        assert torch.equal(tile.slots.sort().values, alive)
        assert len(alive) == runs.counts(size)[tile.owner, tile.top // size]
        shown = torch.ones(tile.last - tile.top, len(alive), dtype=torch.bool)
        shown[:, tile.whole :] = tile.fence > 0
        assert tile.fence.abs().eq(torch.inf).all()
        got[tile.owner, rows] = got[tile.owner, rows].index_copy(1, tile.slots, shown)
        # No key is masked that need not be.
        assert not shown[:, tile.whole :].all(0).any()
    assert torch.equal(got, seen)


@pytest.mark.parametrize("q_len", [1, 200, 1000])
def test_computed_pairs_bound_the_visible_ones(q_len):
    mask = Lifetimes.top(torch.randn(1, 2, 1000), keep=50)
    pairs = computed_pairs(mask, q_len, ratio=2)
    visible = definition(mask, q_len, 1).sum((2, 3))
    assert pairs.shape == (1, 2)
    assert pairs.dtype == torch.int64
    assert (pairs >= visible).all()
    assert (pairs < q_len * 1000 * 0.5).all()
    if q_len == 1:
        assert torch.equal(pairs, visible)


@pytest.mark.parametrize(
    ("length", "keep", "q_len", "pays"),
    [
        (8192, 256, 8192, True),
        (16_384, 256, 1, True),
        (64, 16, 64, False),
        (64, 16, 1, False),
        (512, 512, 1, False),
    ],
    ids=["long", "long decode", "short", "short decode", "all kept"],
)
def test_auto_takes_it_where_it_pays(length, keep, q_len, pays):
    q, k, v = tensors(1, 4, 2, q_len, length, 16)
    mask = Lifetimes.top(torch.randn(1, 2, length), keep=keep)
    assert cpu.pays(q, k, mask) == pays
    assert choose(q, k, v, mask) == ("cpu" if pays else "sdpa")


def test_what_it_cannot_run():
    q, k, v = tensors(1, 2, 2, 8, 8, 4)
    mask = Lifetimes.window(8, window=2)
    assert supports("cpu", q, k, v, mask) is None
    grown = q.clone().requires_grad_()
    assert supports("cpu", grown, k, v, mask) is None
    assert "few rows" in str(supports("cpu", grown[:, :, -4:], k, v, mask))
    assert "no backward" in str(supports("cpu", grown, k, v, Stripes.causal(2)))
    blocks = Blocks(
        torch.zeros(1, 1, 1, 1, dtype=torch.int32),
        torch.ones(1, 1, 1, dtype=torch.int32),
        block=8,
        tile=8,
    )
    assert "Blocks" in str(supports("cpu", q, k, v, blocks))
