"""Top-p against its definition, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dynmask.baselines import twilight as module
from dynmask.baselines.twilight import TopP, quantised
from dynmask.ops import attention

SCALE = 0.3
HEADS = pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"]
)


def draw(length, heads, groups, *, batch=2, dim=8, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, groups, length, dim, dtype=torch.float64)


def rounded(key, bits):
    """One key, element by element: the nearest of evenly spaced levels."""
    if bits is None:
        return list(key)
    low, high = min(key), max(key)
    levels = [low + (high - low) * n / (2**bits - 1) for n in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - x)) for x in key]


def by_definition(q, k, p, bits):
    batch, heads, length, _ = q.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keys = [rounded(key, bits) for key in k[b, h // (heads // k.shape[1])].tolist()]
            for i in range(length):
                row = q[b, h, i].tolist()
                weight = [
                    math.exp(SCALE * sum(x * y for x, y in zip(row, key, strict=True)))
                    for key in keys[: i + 1]
                ]
                left, total = p * sum(weight), 0.0
                for j in sorted(range(i + 1), key=lambda j: -weight[j]):
                    seen[b, h, i, j] = True
                    total += weight[j]
                    if total >= left:
                        break
    return seen


def shown(selector, q, k, ends, begin=0):
    seen = torch.zeros(*q.shape[:2], ends[-1] - begin, ends[-1], dtype=torch.bool)
    at = begin
    for end in ends:
        mask = selector.mask(q[:, :, at:end], k[:, :, :end], scale=SCALE)
        seen[:, :, at - begin : end - begin, :end] = mask.dense(end - at, end)
        at = end
    return seen


@HEADS
@pytest.mark.parametrize("bits", [4, 2, None], ids=["int4", "int2", "exact"])
@pytest.mark.parametrize(("length", "p"), [(1, 0.9), (45, 0.9), (33, 0.5), (33, 1e-9)])
def test_equals_the_definition(length, p, bits, heads, groups):
    q, k = draw(length, heads, groups)
    seen = shown(TopP(p=p, bits=bits).selector(0, 1), q, k, [length])
    assert seen.equal(by_definition(q, k, p, bits))
    assert seen.any(-1).all()
    assert not seen.triu(1).any()


@pytest.mark.parametrize(
    "ends",
    [[45], [*range(1, 46)], [30, *range(31, 46)], [7, 30, 31, 45]],
    ids=["prefill", "rows", "decode", "chunks"],
)
@pytest.mark.parametrize("bits", [4, None], ids=["int4", "exact"])
@pytest.mark.parametrize("cells", [1, 2500, 1 << 20], ids=["row", "parts", "whole"])
def test_does_not_depend_on_how_tokens_are_split(ends, bits, cells, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", cells)
    q, k = draw(45, 4, 2)
    seen = shown(TopP(p=0.8, bits=bits).selector(0, 1), q, k, ends)
    assert seen.equal(by_definition(q, k, 0.8, bits))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rounded_keys(bits):
    keys = draw(30, 1, 2)[1]
    expected = [[[rounded(key, bits) for key in group] for group in row] for row in keys.tolist()]
    torch.testing.assert_close(quantised(keys, bits), torch.tensor(expected, dtype=keys.dtype))
    level = torch.full((1, 1, 3, 8), 0.7)
    assert quantised(level, bits).equal(level)


def test_exact_mass_is_held():
    q, k = draw(40, 2, 2)
    seen = shown(TopP(p=0.7, bits=None).selector(0, 1), q, k, [40])
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    weight = (q @ k.mT * SCALE).masked_fill(~causal, -torch.inf).softmax(-1)
    held = weight.where(seen, 0)
    assert (held.sum(-1) >= 0.7 - 1e-12).all()
    # None can go: without its least key a row holds too little.
    least = held.where(seen, 2).amin(-1)
    assert (held.sum(-1) - least < 0.7).all()


def test_going_back_gives_the_same_again():
    q, k = draw(40, 4, 2)
    other = draw(40, 4, 2, seed=4)[1]
    other[:, :, :25] = k[:, :, :25]
    selector = TopP(p=0.8).selector(0, 1)
    shown(selector, q, k, [20, 25])
    ends = [*range(26, 36)]
    first = shown(selector, q, k, ends, begin=25)
    assert shown(selector, q, other, ends, begin=25).equal(
        by_definition(q, other, 0.8, 4)[:, :, 25:35, :35]
    )
    assert shown(selector, q, k, ends, begin=25).equal(first)


def test_a_state_is_not_changed():
    q, k = draw(40, 2, 1)
    selector = TopP().selector(0, 1)
    _, state = selector.choose(q[:, :, :30], k[:, :, :30], None, scale=SCALE)
    before = state.clone()
    selector.choose(q[:, :, 30:], k, state, scale=SCALE)
    assert state.equal(before)


@HEADS
def test_attention_over_what_is_seen(heads, groups):
    q, k = draw(33, heads, groups)
    v = torch.randn_like(k)
    mask = TopP(p=0.9).selector(0, 1).mask(q, k, scale=SCALE)
    wide_k, wide_v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    out = attention(q, wide_k, wide_v, mask, scale=SCALE)
    expected = functional.scaled_dot_product_attention(
        q, wide_k, wide_v, attn_mask=by_definition(q, k, 0.9, 4), scale=SCALE
    )
    torch.testing.assert_close(out, expected)


def test_everything_is_plain_attention():
    q, k = draw(33, 4, 2)
    selector = TopP(p=1.0).selector(0, 1)
    assert selector.mask(q, k, scale=SCALE) is None


def test_rounding_lists_no_later_key():
    q, k = (t.float() for t in draw(33, 4, 2))
    mask = TopP(p=1 - 1e-16).selector(0, 1).mask(q, k, scale=SCALE)
    assert (mask.counts <= torch.arange(1, 34)).all()
    # The weights of some rows do sum to less than that.
    assert (mask.counts == torch.arange(1, 34)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    q, k = (t.to(dtype) for t in draw(40, 4, 2))
    seen = shown(TopP(p=0.8, bits=None).selector(0, 1), q, k, [39, 40])
    assert seen.equal(by_definition(q.double(), k.double(), 0.8, None))


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"p": 0.0}, "p="), ({"p": 1.1}, "p="), ({"bits": 0}, "bits"), ({"bits": 9}, "bits")],
    ids=["none", "more", "no-bits", "bits"],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        TopP(**changes)
