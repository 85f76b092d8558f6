"""H2O against its definition: lists of alive keys, one head and one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dynmask.baselines import h2o as module
from dynmask.baselines.h2o import H2O
from dynmask.ops import attention

SCALE = 0.3
HEADS = pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"]
)


def draw(length, heads, groups, *, batch=2, dim=8, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, groups, length, dim, dtype=torch.float64)


def by_definition(q, k, heavy, recent):
    batch, heads, length, _ = q.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keys, mass = k[b, h // (heads // k.shape[1])], {}
            for i in range(length):
                mass[i] = 0.0
                weights = [math.exp(SCALE * float(q[b, h, i] @ keys[j])) for j in mass]
                for j, weight in zip(list(mass), weights, strict=True):
                    seen[b, h, i, j] = True
                    mass[j] += weight / sum(weights)
                old = [j for j in mass if i - j >= recent]
                if len(old) > heavy:
                    del mass[min(old, key=mass.__getitem__)]
    return seen


def shown(selector, q, k, ends, begin=0):
    """What all rows of some calls see, one call after another."""
    length = ends[-1]
    seen = torch.zeros(*q.shape[:2], length - begin, length, dtype=torch.bool)
    at = begin
    for end in ends:
        mask = selector.mask(q[:, :, at:end], k[:, :, :end], scale=SCALE)
        seen[:, :, at - begin : end - begin, :end] = mask.dense(end - at)
        assert int(mask.dense(end - at).sum(-1).max()) <= mask.most
        at = end
    return seen


@HEADS
@pytest.mark.parametrize("length", [1, 63, 65])
def test_equals_the_definition(length, heads, groups):
    q, k = draw(length, heads, groups)
    selector = H2O(heavy=9, recent=5).selector(0, 1)
    assert shown(selector, q, k, [length]).equal(by_definition(q, k, 9, 5))


@pytest.mark.parametrize(
    "ends",
    [[65], [*range(1, 66)], [40, *range(41, 66)], [3, 40, 41, 42, 65], [14, 15, 65]],
    ids=["prefill", "rows", "decode", "chunks", "full-at-once"],
)
@pytest.mark.parametrize("rows", [1, 7, 128], ids=["row", "parts", "whole"])
def test_does_not_depend_on_how_tokens_are_split(ends, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    q, k = draw(65, 4, 2)
    selector = H2O(heavy=9, recent=5).selector(0, 1)
    assert shown(selector, q, k, ends).equal(by_definition(q, k, 9, 5))


@pytest.mark.parametrize(("heavy", "recent"), [(1, 1), (1, 20), (20, 1)])
def test_any_budgets(heavy, recent):
    q, k = draw(40, 2, 1, seed=1)
    seen = shown(H2O(heavy, recent).selector(0, 1), q, k, [25, 40])
    assert seen.equal(by_definition(q, k, heavy, recent))
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    assert not (seen & ~causal).any()
    assert seen.diagonal(dim1=2, dim2=3).all()
    assert int(seen.sum(-1).max()) == heavy + recent + 1


def test_shares_are_of_the_first_call():
    q, k = draw(50, 2, 2)
    seen = shown(H2O(heavy=0.11, recent=0.2).selector(0, 1), q, k, [30, 49, 50])
    assert seen.equal(by_definition(q, k, 4, 6))  # 3.3 is rounded up.


def test_counts_larger_than_the_prompt_hold_later():
    q, k = draw(40, 2, 2)
    seen = shown(H2O(heavy=12, recent=12).selector(0, 1), q, k, [5, 40])
    assert seen.equal(by_definition(q, k, 12, 12))


def test_going_back_gives_the_same_again():
    q, k = draw(60, 4, 2)
    other_q, other_k = draw(60, 4, 2, seed=5)
    other_q[:, :, :41], other_k[:, :, :41] = q[:, :, :41], k[:, :, :41]
    selector = H2O(heavy=6, recent=4).selector(0, 1)
    shown(selector, q, k, [30, 41])
    rows = [*range(42, 50)]
    first = shown(selector, q, k, rows, begin=41)
    other = shown(selector, other_q, other_k, rows, begin=41)
    assert other.equal(by_definition(other_q, other_k, 6, 4)[:, :, 41:49, :49])
    assert shown(selector, q, k, rows, begin=41).equal(first)
    assert shown(selector, q, k, [41], begin=30).equal(by_definition(q, k, 6, 4)[:, :, 30:41, :41])


def test_a_state_is_not_changed():
    q, k = draw(40, 2, 1)
    selector = H2O(heavy=4, recent=4).selector(0, 1)
    _, state = selector.choose(q[:, :, :30], k[:, :, :30], None, scale=SCALE)
    before = [t.clone() for t in state[2:]]
    selector.choose(q[:, :, 30:], k, state, scale=SCALE)
    assert all(a.equal(b) for a, b in zip(before, state[2:], strict=True))


def test_evicted_keys_do_not_return_and_later_tokens_do_not_matter():
    q, k = draw(60, 2, 2)
    seen = shown(H2O(5, 5).selector(0, 1), q, k, [60])
    for j in range(60):
        assert not (seen[:, :, j:, j].int().diff(dim=-1) > 0).any()
    q[:, :, 40:] = 3
    k[:, :, 40:] = -3
    again = shown(H2O(5, 5).selector(0, 1), q, k, [60])
    assert again[:, :, :40].equal(seen[:, :, :40])


@HEADS
def test_a_cache_for_everything_is_plain_attention(heads, groups):
    q, k = draw(33, heads, groups)
    v = torch.randn_like(k)
    mask = H2O(heavy=1.0, recent=1).selector(0, 1).mask(q, k, scale=SCALE)
    wide_k, wide_v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    out = attention(q, wide_k, wide_v, mask, scale=SCALE)
    expected = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    q, k = (t.to(dtype) for t in draw(50, 2, 1))
    mask = H2O(heavy=7, recent=3).selector(0, 1).mask(q, k, scale=SCALE)
    assert mask.dense(50).equal(by_definition(q.double(), k.double(), 7, 3))


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, None], ids=str)
@pytest.mark.parametrize("name", ["heavy", "recent"])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        H2O(**{name: value})
