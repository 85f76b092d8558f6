"""InfLLM against its definition, chunk by chunk and key by key."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dynmask.baselines.infllm import InfLLM
from dynmask.ops import attention

SCALE = 0.3
SMALL = {"init": 4, "local": 10, "block": 4, "representatives": 2, "chunk": 8, "top": 2}
HEADS = pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"]
)


def draw(length, heads, groups, *, batch=2, dim=8, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, groups, length, dim, dtype=torch.float64)


def chunk_by_definition(q, k, begin, end, *, init, local, block, representatives, top, chunk):
    """``[B, end - begin, end]``: what the rows of one chunk see, the same in every head."""
    batch, heads = q.shape[:2]
    seen = torch.zeros(batch, end - begin, end, dtype=torch.bool)
    far = [s for s in range(init, begin, block) if s + block + local <= begin]
    for b in range(batch):
        relevance = dict.fromkeys(far, 0.0)
        for start in far:
            for h in range(heads):
                keys = k[b, h // (heads // k.shape[1])]
                score = {
                    m: sum(float(q[b, h, m + j] @ keys[m]) for j in range(1, local + 1)) / local
                    for m in range(start, start + block)
                }
                for m in sorted(score, key=lambda m: -score[m])[:representatives]:
                    relevance[start] += float((q[b, h, begin:end] @ keys[m]).sum())
        chosen = sorted(relevance, key=lambda start: -relevance[start])[:top]
        hidden = set(far) - set(chosen)
        for i in range(begin, end):
            for j in range(i + 1):
                start = (j - init) // block * block + init
                seen[b, i - begin, j] = j < init or start not in hidden
    return seen


def calls_by_definition(q, k, ends, settings):
    """``[B, Q, K]`` of all rows of some calls."""
    length, chunk = ends[-1], settings["chunk"]
    seen = torch.zeros(len(q), length, length, dtype=torch.bool)
    cuts = sorted({*ends, *range(chunk, length, chunk)})
    for begin, end in zip([0, *cuts], cuts, strict=False):
        seen[:, begin:end, :end] = chunk_by_definition(q, k, begin, end, **settings)
    return seen


def shown(selector, q, k, ends, begin=0):
    seen = torch.zeros(len(q), ends[-1] - begin, ends[-1], dtype=torch.bool)
    at = begin
    for end in ends:
        mask = selector.mask(q[:, :, at:end], k[:, :, :end], scale=SCALE)
        rows = torch.ones(end - at, end, dtype=torch.bool).tril(at)
        if mask is not None:
            rows = mask.dense(end - at, end)
            assert rows.shape[1] == 1
            rows = rows[:, 0]
        seen[:, at - begin : end - begin, :end] = rows
        at = end
    return seen


@HEADS
@pytest.mark.parametrize(
    "ends",
    [[1], [63], [65], [40, *range(41, 52)], [13, 30, 31, 47, 65]],
    ids=["one", "odd", "prefill", "decode", "chunks"],
)
def test_equals_the_definition(ends, heads, groups):
    q, k = draw(ends[-1], heads, groups)
    seen = shown(InfLLM(**SMALL).selector(0, 1), q, k, ends)
    assert seen.equal(calls_by_definition(q, k, ends, SMALL))
    assert seen.diagonal(dim1=1, dim2=2).all()
    assert not seen.triu(1).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"init": 0},
        {"init": 8, "block": 8, "representatives": 8},
        {"local": 1, "top": 1},
        {"chunk": 64},
        {"chunk": 1},
        {"chunk": 5, "block": 3, "init": 3, "representatives": 1},
    ],
    ids=["no-init", "blocks", "near", "one-chunk", "rows", "odd"],
)
def test_any_settings(changes):
    settings = {**SMALL, **changes}
    q, k = draw(55, 4, 2, seed=3)
    ends = [41, 42, 55]
    seen = shown(InfLLM(**settings).selector(0, 1), q, k, ends)
    assert seen.equal(calls_by_definition(q, k, ends, settings))


def test_it_leaves_keys_out_and_keeps_the_window():
    q, k = draw(65, 4, 2)
    seen = shown(InfLLM(**SMALL).selector(0, 1), q, k, [65])
    assert not seen[:, 64].all()
    row, key = torch.arange(65)[:, None], torch.arange(65)
    near = (row - key < SMALL["local"]) & (row >= key)
    assert (seen | ~near).all()
    # Init, top blocks, and at most a chunk and a block more than the window.
    assert int(seen.sum(-1).max()) <= 4 + 2 * 4 + 10 + 8 + 4


def test_later_chunks_do_not_matter():
    q, k = draw(60, 4, 2)
    seen = shown(InfLLM(**SMALL).selector(0, 1), q, k, [60])
    q[:, :, 40:] *= -1
    k[:, :, 40:] *= -1
    again = shown(InfLLM(**SMALL).selector(0, 1), q, k, [60])
    assert again[:, :40].equal(seen[:, :40])
    assert not again.equal(seen)


def test_few_far_blocks_run_dense():
    q, k = draw(60, 2, 1)
    # The last chunk begins at 56, where the far blocks are those that end by 46.
    assert InfLLM(**{**SMALL, "top": 10}).selector(0, 1).mask(q, k, scale=SCALE) is None
    assert InfLLM(**{**SMALL, "top": 9}).selector(0, 1).mask(q, k, scale=SCALE) is not None
    assert InfLLM().selector(0, 1).mask(q, k, scale=SCALE) is None


def test_going_back_gives_the_same_again():
    q, k = draw(70, 4, 2)
    other_q, other_k = draw(70, 4, 2, seed=7)
    other_q[:, :, :45], other_k[:, :, :45] = q[:, :, :45], k[:, :, :45]
    selector = InfLLM(**SMALL).selector(0, 1)
    shown(selector, q, k, [38, 45])
    ends = [*range(46, 60)]
    first = shown(selector, q, k, ends, begin=45)
    other = shown(selector, other_q, other_k, ends, begin=45)
    expected = calls_by_definition(other_q, other_k, [38, 45, *ends], SMALL)
    assert other.equal(expected[:, 45:])
    assert shown(selector, q, k, ends, begin=45).equal(first)


def test_a_state_is_not_changed():
    q, k = draw(60, 2, 1)
    selector = InfLLM(**SMALL).selector(0, 1)
    _, state = selector.choose(q[:, :, :40], k[:, :, :40], None, scale=SCALE)
    before = [t.clone() for t in state]
    selector.choose(q[:, :, 40:], k, state, scale=SCALE)
    assert all(a.equal(b) for a, b in zip(before, state, strict=True))


@HEADS
def test_attention_over_what_is_seen(heads, groups):
    q, k = draw(50, heads, groups)
    v = torch.randn_like(k)
    mask = InfLLM(**SMALL).selector(0, 1).mask(q, k, scale=SCALE)
    out = attention(q, k, v, mask, scale=SCALE)
    expected = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=calls_by_definition(q, k, [50], SMALL)[:, None],
        scale=SCALE,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected)


def test_bfloat16_is_summed_in_float32():
    q, k = (t.bfloat16() for t in draw(60, 4, 2))
    seen = shown(InfLLM(**SMALL).selector(0, 1), q, k, [50, *range(51, 61)])
    ends = [50, *range(51, 61)]
    assert seen.equal(calls_by_definition(q.double(), k.double(), ends, SMALL))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init": 100}, "init=100 must be a multiple of block=128"),
        ({"init": -128}, "init"),
        ({"representatives": 129}, "representatives=129 must be at most block=128"),
        *[({name: 0}, name) for name in ("local", "block", "representatives", "chunk", "top")],
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        InfLLM(**changes)
