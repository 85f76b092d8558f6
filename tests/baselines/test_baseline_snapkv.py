"""SnapKV against its definition, key by key."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from dynmask.baselines.snapkv import SnapKV
from dynmask.ops import attention

SCALE = 0.3
HEADS = pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"]
)


def draw(length, heads, groups, *, batch=2, dim=8, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, groups, length, dim, dtype=torch.float64)


def kept_by_definition(q, k, cap, window, kernel):
    """``[B, G, N]`` bool: the keys of a prompt that stay."""
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    kept = torch.zeros(batch, groups, length, dtype=torch.bool)
    old = length - window
    for b in range(batch):
        for g in range(groups):
            total = [0.0] * old
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                attended = [0.0] * old
                for i in range(old, length):
                    row = [math.exp(SCALE * float(q[b, h, i] @ k[b, g, j])) for j in range(i + 1)]
                    for j in range(old):
                        attended[j] += row[j] / sum(row)
                for j in range(old):
                    near = range(max(0, j - kernel // 2), min(old, j + kernel // 2 + 1))
                    total[j] += sum(attended[n] for n in near) / kernel
            best = sorted(range(old), key=lambda j: -total[j])[: cap - window]
            kept[b, g, best] = True
            kept[b, g, old:] = True
    return kept


def expected_rows(kept, begin, end):
    """Rows of a later call: what stayed of the prompt, and all that came after it."""
    prompt = kept.shape[2]
    seen = torch.ones(*kept.shape[:2], end - begin, end, dtype=torch.bool).tril(begin)
    seen[..., :prompt] = kept[:, :, None]
    return seen


@HEADS
@pytest.mark.parametrize("length", [33, 65])
@pytest.mark.parametrize("settings", [(15, 8, 5), (9, 8, 1), (31, 1, 3)], ids=str)
def test_equals_the_definition(length, settings, heads, groups):
    q, k = draw(length + 9, heads, groups)
    kept = kept_by_definition(q[:, :, :length], k[:, :, :length], *settings)
    assert (kept.sum(-1) == settings[0]).all()
    selector = SnapKV(*settings).selector(0, 1)
    assert selector.mask(q[:, :, :length], k[:, :, :length], scale=SCALE) is None
    ends = [length, length + 5, *range(length + 6, length + 10)]
    for begin, end in itertools.pairwise(ends):
        mask = selector.mask(q[:, :, begin:end], k[:, :, :end], scale=SCALE)
        seen = mask.dense(end - begin)
        assert seen.equal(expected_rows(kept, begin, end))
        assert seen[..., range(end - begin), range(begin, end)].all()
        assert int(seen.sum(-1).max()) == mask.most


@pytest.mark.parametrize("length", [1, 7, 20], ids=str)
def test_a_prompt_that_fits_is_kept(length):
    q, k = draw(length + 4, 2, 1)
    selector = SnapKV(cap=20, window=8).selector(0, 1)
    assert selector.mask(q[:, :, :length], k[:, :, :length], scale=SCALE) is None
    # Not cut later either: only the prompt ever is.
    for end in range(length + 1, length + 5):
        assert selector.mask(q[:, :, end - 1 : end], k[:, :, :end], scale=SCALE) is None


@pytest.mark.parametrize(("share", "tokens"), [(0.5, 33), (0.1, 8), (1.0, None)])
def test_shares_are_of_the_prompt_and_hold_the_window(share, tokens):
    q, k = draw(66, 2, 1)
    selector = SnapKV(cap=share, window=8).selector(0, 1)
    selector.mask(q[:, :, :65], k[:, :, :65], scale=SCALE)
    mask = selector.mask(q[:, :, 65:], k, scale=SCALE)
    if tokens is None:
        assert mask is None
    else:
        assert (mask.dense(1).sum(-1) == tokens + 1).all()
        assert mask.dense(1)[..., 57:].all()


def test_going_back_gives_the_same_again():
    q, k = draw(50, 4, 2)
    selector = SnapKV(cap=12, window=4).selector(0, 1)
    selector.mask(q[:, :, :40], k[:, :, :40], scale=SCALE)

    def question(of):
        chunk = selector.mask(of[:, :, 40:45], k[:, :, :45], scale=SCALE).dense(5)
        row = selector.mask(of[:, :, 45:46], k[:, :, :46], scale=SCALE).dense(1)
        return chunk, row

    first = question(q)
    question(-q)
    assert all(a.equal(b) for a, b in zip(question(q), first, strict=True))
    # From the start: another prompt has other keys.
    assert selector.mask(-q[:, :, :40], k[:, :, :40], scale=SCALE) is None
    kept = kept_by_definition(-q[:, :, :40], k[:, :, :40], 12, 4, 5)
    assert question(q)[0].equal(expected_rows(kept, 40, 45))


@HEADS
def test_keeping_all_but_hidden_keys_is_attention_over_the_kept(heads, groups):
    q, k = draw(41, heads, groups)
    v = torch.randn_like(k)
    selector = SnapKV(cap=10, window=3).selector(0, 1)
    selector.mask(q[:, :, :40], k[:, :, :40], scale=SCALE)
    mask = selector.mask(q[:, :, 40:], k, scale=SCALE)
    out = attention(q[:, :, 40:], k, v, mask, scale=SCALE)
    kept = kept_by_definition(q[:, :, :40], k[:, :, :40], 10, 3, 5)
    for b in range(len(q)):
        for h in range(heads):
            g = h // (heads // groups)
            left = [*kept[b, g].nonzero().flatten().tolist(), 40]
            one = functional.scaled_dot_product_attention(
                q[b, h, None, 40:], k[b, g, None, left], v[b, g, None, left], scale=SCALE
            )
            torch.testing.assert_close(out[b, h, None], one)


def test_bfloat16_is_summed_in_float32():
    q, k = (t.bfloat16() for t in draw(51, 4, 2))
    selector = SnapKV(cap=20, window=8).selector(0, 1)
    selector.mask(q[:, :, :50], k[:, :, :50], scale=SCALE)
    kept = kept_by_definition(q[:, :, :50].double(), k[:, :, :50].double(), 20, 8, 5)
    mask = selector.mask(q[:, :, 50:], k, scale=SCALE)
    assert mask.dense(1).equal(expected_rows(kept, 50, 51))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cap": 32}, "cap=32 must be larger than window=32"),
        ({"cap": 0}, "cap"),
        ({"cap": 1.2}, "cap"),
        ({"window": 0}, "window"),
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"kernel": -1}, "kernel"),
    ],
    ids=["cap-is-window", "cap-0", "cap-share", "window", "even", "negative"],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        SnapKV(**changes)
