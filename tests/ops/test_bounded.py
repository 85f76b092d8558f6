"""A bounded cache against row-wise selection over everything seen."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_cases import naive_attention
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynmask.masks import Lifetimes, Padding
from dynmask.masks.lifetimes import NEVER
from dynmask.ops import attention
from dynmask.ops.bounded import BoundedKeys
from dynmask.ops.bounded_rules import select

B, G, D = 2, 2, 3
KINDS = ("normal", "ties", "rising", "falling", "constant", "wild", "denormal")
WILD = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).min)


def scores(kind, count, seed, shape=(B, G)):
    g = torch.Generator().manual_seed(seed)
    shape = (*shape, count)
    steps = torch.arange(count, dtype=torch.float32).expand(shape).clone()
    return {
        "normal": lambda: torch.randn(shape, generator=g),
        "ties": lambda: torch.randint(0, 3, shape, generator=g).float(),
        "rising": lambda: steps,
        "falling": lambda: -steps,
        "constant": lambda: torch.zeros(shape),
        "wild": lambda: torch.tensor(WILD)[torch.randint(len(WILD), shape, generator=g)],
        "denormal": lambda: torch.randint(-2, 3, shape, generator=g) * 1e-45,
    }[kind]()


def tokens(score):
    """Keys and values that say which token they are: ``[.., 0]`` is its number, from 1."""
    batch, groups, count = score.shape
    k = torch.randn(batch, groups, count, D, generator=torch.Generator().manual_seed(7))
    k[..., 0] = torch.arange(1.0, count + 1)
    return k, k * 2


def kept_by_definition(score, keep, real, threshold=None):
    """``[B][G]`` sets of token numbers: the best of all seen so far, one sort of pairs a head."""
    out = []
    for b in range(score.shape[0]):
        heads = []
        for g in range(score.shape[1]):
            ranked = []
            for j, value in enumerate(score[b, g].tolist()):
                if not real[b, j] or (threshold is not None and not value >= threshold):
                    continue
                ranked.append((-value if value == value else torch.inf, j + 1))
            heads.append({j for _, j in sorted(ranked)[:keep]})
        out.append(heads)
    return out


def kept(state):
    """The same from a state; everything else that must hold of it is asserted."""
    out = []
    taken = state.order >= 0
    assert torch.equal(state.expiry == NEVER, taken)
    assert torch.equal(state.expiry == 0, ~taken)
    assert (state.k[~taken] == 0).all()
    assert (state.score[~taken] == 0).all()
    assert torch.equal(state.v, state.k * 2)
    for b in range(state.k.shape[0]):
        heads = []
        for g in range(state.k.shape[1]):
            ids = state.k[b, g, taken[b, g], 0].int().tolist()
            order = state.order[b, g, taken[b, g]]
            assert len(set(ids)) == len(ids)
            assert torch.equal(order.argsort(), torch.tensor(ids).argsort())
            heads.append(set(ids))
        out.append(heads)
    return out


def state_of(keep, score, **options):
    return BoundedKeys(keep, batch=score.shape[0], groups=score.shape[1], dim=D, **options)


def feed(state, score, sizes, real=None, start=0):
    """Give the tokens in chunks; a size of 0 means one token by `insert`."""
    k, v = tokens(score)
    at = start
    for size in sizes:
        span = slice(at, at + max(size, 1))
        given = k[:, :, span], v[:, :, span], score[:, :, span]
        if size:
            state.extend(*given, present=None if real is None else real[:, span])
        else:
            state.insert(*given, None if real is None else real[:, at])
        at = span.stop
    assert at == score.shape[2]


def splits(draw, count):
    sizes = []
    while sum(max(s, 1) for s in sizes) < count:
        left = count - sum(max(s, 1) for s in sizes)
        sizes.append(draw(st.integers(0, left)))
    return sizes


@st.composite
def streams(draw):
    count = draw(st.integers(1, 24))
    score = scores(draw(st.sampled_from(KINDS)), count, draw(st.integers(0, 99)))
    real = None
    if draw(st.booleans()):
        g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        real = torch.rand(B, count, generator=g) < draw(st.sampled_from([0.2, 0.8]))
    return score, real, splits(draw, count), draw(st.integers(1, 9))


@settings(max_examples=300, deadline=None)
@given(streams(), st.sampled_from([None, None, 0.0, -torch.inf, torch.inf]))
def test_any_split_keeps_the_best_of_all(stream, threshold):
    score, real, sizes, keep = stream
    state = state_of(keep, score, threshold=threshold)
    feed(state, score, sizes, real)
    every = torch.ones(B, score.shape[2], dtype=torch.bool) if real is None else real
    assert kept(state) == kept_by_definition(score, keep, every, threshold)
    full = bool((state.order >= 0).all())
    says_full = state.view()[3].is_causal
    assert full or not says_full
    if real is None and threshold is None:
        assert says_full == full
    # Scores are kept as given.
    for b, g, slot in (state.order >= 0).nonzero().tolist():
        token = int(state.k[b, g, slot, 0]) - 1
        value = score[b, g, token]
        same = state.score[b, g, slot].view(torch.int32) == value.view(torch.int32)
        assert same or (value.isnan() and state.score[b, g, slot].isnan())


@settings(max_examples=100, deadline=None)
@given(streams())
@example((torch.tensor([[[0.0, torch.nan, -torch.inf]]]).expand(B, G, 3), None, [1, 1, 1], 2))
def test_insert_is_extend_by_one(stream):
    score, real, _, keep = stream
    one, other = state_of(keep, score), state_of(keep, score)
    feed(one, score, [0] * score.shape[2], real)
    feed(other, score, [1] * score.shape[2], real)
    assert kept(one) == kept(other)


def naive_rows(score, keep, real, threshold):
    """``[B, G, K, K]`` bool, what each row of one pass over everything sees."""
    count = score.shape[2]
    seen = torch.zeros(B, G, count, count, dtype=torch.bool)
    for i in range(count):
        ids = kept_by_definition(score[..., : i + 1], keep, real, threshold)
        for b in range(B):
            for g in range(G):
                for j in ids[b][g]:
                    seen[b, g, i, j - 1] = True
    return seen


@settings(max_examples=100, deadline=None)
@given(streams(), st.sampled_from([None, 0.5]))
def test_rows_of_chunks_attend_as_rows_of_the_whole(stream, threshold):
    score, real, sizes, keep = stream
    score = score.nan_to_num(-1.0, 2.0, -3.0)  # As a bias they must be numbers.
    count = score.shape[2]
    every = torch.ones(B, count, dtype=torch.bool) if real is None else real
    k, v = (x / count for x in tokens(score))  # Logits of a usual size: fp32 rounds large ones.
    q = torch.randn(B, 2 * G, count, D, generator=torch.Generator().manual_seed(3))
    expected = naive_attention(q, k, v, naive_rows(score, keep, every, threshold), score)
    state = state_of(keep, score, threshold=threshold)
    at = 0
    for size in sizes:
        span = slice(at, at + max(size, 1))
        now = k[:, :, span], v[:, :, span], score[:, :, span]
        if size:
            *given, mask = state.extend(*now, present=None if real is None else real[:, span])
        else:
            state.insert(*now, None if real is None else real[:, at])
            *given, mask = state.view()
        out = attention(q[:, :, span], given[0], given[1], mask, bias=given[2], impl="reference")
        for b, i in every[:, span].nonzero().tolist():
            want = expected[b, :, at + i]
            torch.testing.assert_close(out[b, :, i].double(), want, rtol=2e-5, atol=2e-5)
        at = span.stop


@pytest.mark.parametrize(
    "sizes", [[64, 0, 0, 35, 0], [7] * 14, [0] * 98], ids=["mixed", "chunks", "tokens"]
)
@pytest.mark.parametrize("kind", ["normal", "ties", "rising"])
def test_fp32_bits_are_those_of_the_whole_cache(kind, sizes):
    """Where a backend gathers what a row sees, the same keys in the same order give equal bits."""
    count = sum(max(s, 1) for s in sizes)
    score = scores(kind, count, 0)
    g = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, B, G, count, 16, generator=g)
    q = torch.randn(B, 2 * G, count, 16, generator=g)
    state = BoundedKeys(20, batch=B, groups=G, dim=16)
    at = 0
    for size in sizes:
        span, last = slice(at, at + max(size, 1)), at + max(size, 1)
        now = k[:, :, span], v[:, :, span], score[:, :, span]
        if size:
            *given, mask = state.extend(*now)
        else:
            state.insert(*now)
            *given, mask = state.view(by_arrival=True)
        part = attention(q[:, :, span], given[0], given[1], mask, bias=given[2], impl="cpu")
        whole = attention(
            q[:, :, span],
            k[:, :, :last],
            v[:, :, :last],
            Lifetimes.top(score[:, :, :last], keep=20),
            bias=score[:, :, :last],
            impl="cpu",
        )
        assert torch.equal(part, whole)
        at = last


@pytest.mark.parametrize(
    "runs",
    [[(5, 30), (0, 30)], [(0, 22), (0, 30)], [(30, 30), (3, 9)]],
    ids=["left", "right", "no"],
)
def test_a_padded_chunk_is_masked_like_padding(runs):
    score = scores("ties", 30, 0)
    start, stop = torch.tensor(runs).T
    padding = Padding(start, stop)
    state = state_of(6, score)
    *_, mask = state.extend(*tokens(score), score, present=padding.dense(30))
    expected = Lifetimes.top(score, keep=6, padding=padding)
    assert torch.equal(mask.dense(30), expected.dense(30))


def test_the_first_chunk_is_not_copied():
    score = scores("normal", 40, 0)
    k, v = tokens(score)
    state = state_of(6, score)
    got_k, got_v, got_score, mask = state.extend(k, v, score)
    assert got_k is k
    assert got_v is v
    assert got_score is score
    assert mask.most == 6
    before = copy.deepcopy(state)
    got_k, *_ = state.extend(k[:, :, :4], v[:, :, :4], score[:, :, :4], commit=False)
    assert got_k.shape[2] == 10
    assert kept(state) == kept(before)
    few, *_, mask = state_of(50, score).extend(k, v, score)
    assert few is k
    assert mask.is_causal


def test_looking_ahead_changes_nothing():
    score = scores("rising", 12, 0)
    k, v = tokens(score)
    state = state_of(5, score)
    state.extend(k, v, score, commit=False)
    assert kept(state) == [[set()] * G] * B
    state.extend(k[:, :, :8], v[:, :, :8], score[:, :, :8])
    before = copy.deepcopy(vars(state))
    state.extend(k[:, :, 8:], v[:, :, 8:], score[:, :, 8:], commit=False)
    for name in ("k", "v", "score", "order", "expiry"):
        assert torch.equal(before[name], getattr(state, name))


def test_state_stays_where_it_is_and_is_reset():
    score = scores("normal", 30, 0)
    state = state_of(6, score)
    places = [getattr(state, n).data_ptr() for n in ("k", "v", "score", "order", "expiry")]
    feed(state, score, [9, 0, 0, 19])
    state.reset()
    assert kept(state) == [[set()] * G] * B
    feed(state, score, [30])
    assert places == [getattr(state, n).data_ptr() for n in ("k", "v", "score", "order", "expiry")]
    assert state.memory() == B * G * 6 * (2 * 4 * D + 12)
    assert kept(state) == kept_by_definition(score, 6, torch.ones(B, 30, dtype=torch.bool))


def test_rows_are_selected():
    score = scores("normal", 30, 0)
    state = state_of(6, score)
    feed(state, score, [30])
    before = kept(state)
    state.select_rows(torch.tensor([1, 1, 0]))
    assert kept(state) == [before[1], before[1], before[0]]
    more = scores("normal", 1, 1, (3, G))
    state.insert(*tokens(more), more)


def test_padding_that_is_not_finite_does_not_stay():
    score = scores("normal", 8, 0)
    k, v = tokens(score)
    real = torch.arange(8).expand(B, 8) >= 5
    for t in (k, v, score):
        t[:, :, :5] = torch.nan
    state = state_of(6, score)
    state.extend(k, v, score, present=real)
    assert kept(state) == [[{6, 7, 8}] * G] * B


def test_hidden_keys_may_lie_anywhere():
    score = scores("wild", 20, 0)
    shown = torch.rand(B, G, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = select(score, 4, shown).dense(20)
    for b in range(B):
        for g in range(G):
            for i in range(20):
                one = kept_by_definition(score[b : b + 1, g : g + 1, : i + 1], 4, shown[b, g][None])
                assert {j + 1 for j in range(20) if seen[b, g, i, j]} == one[0][0]


def test_gradients_flow_in_one_call_and_raise_beyond():
    score = scores("normal", 12, 0).requires_grad_()
    k, v = (t.requires_grad_() for t in tokens(score.detach()))
    q = torch.randn(B, G, 12, D)
    state = state_of(4, score)
    *given, mask = state.extend(k, v, score)
    attention(q, given[0], given[1], mask, bias=given[2]).sum().backward()
    expected = Lifetimes.top(score, keep=4)
    for got, want in zip((k, v, score), (k, v, score), strict=True):
        mine, got.grad = got.grad, None
        out = attention(q, k, v, expected, bias=score)
        (true,) = torch.autograd.grad(out.sum(), want)
        torch.testing.assert_close(mine, true)

    *given, mask = state.extend(k[:, :, :2], v[:, :, :2], score[:, :, :2])
    out = attention(q[:, :, :2], given[0], given[1], mask, bias=given[2])
    with pytest.raises(ValueError, match="one call"):
        out.sum().backward()
    assert not state.k.requires_grad
    with torch.no_grad():
        state.insert(k[:, :, :1], v[:, :, :1], score[:, :, :1])
        assert not state.view()[0].requires_grad


def test_half_precision_and_strides():
    score = scores("normal", 30, 0)
    k, v = (t.half().transpose(1, 2).contiguous().transpose(1, 2) for t in tokens(score))
    state = state_of(6, score, dtype=torch.float16)
    state.extend(k[:, :, :20], v[:, :, :20], score.half()[:, :, :20])
    for i in range(20, 30):
        state.insert(k[:, :, i : i + 1], v[:, :, i : i + 1], score.half()[:, :, i : i + 1])
    every = torch.ones(B, 30, dtype=torch.bool)
    assert kept(state) == kept_by_definition(score.half().float(), 6, every)
    assert state.score.dtype == torch.float32


@pytest.mark.parametrize("call", ["insert", "extend"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v, s: (k[:1], v[:1], s[:1]), "batch size"),
        (lambda k, v, s: (k[:, :1], v[:, :1], s[:, :1]), "another model"),
        (lambda k, v, s: (k[..., :2], v[..., :2], s), "another model"),
        (lambda k, v, s: (k, v[..., :2], s), "another model"),
        (lambda k, v, s: (k, v, s[:, :1]), "another model"),
        (lambda k, v, s: (k.half(), v.half(), s), "dtype"),
        (lambda k, v, s: (k[:, :, :0], v[:, :, :0], s[:, :, :0]), "Q"),
    ],
    ids=["batch", "groups", "dim", "v", "score", "dtype", "nothing"],
)
def test_wrong_tokens_are_refused(call, change, message):
    score = scores("normal", 1, 0)
    state = state_of(4, score)
    with pytest.raises(ValueError, match=message):
        getattr(state, call)(*change(*tokens(score), score))
    assert kept(state) == [[set()] * G] * B


def test_wrong_use_is_refused():
    score = scores("normal", 3, 0)
    k, v = tokens(score)
    with pytest.raises(ValueError, match="at least 1"):
        state_of(0, score)
    with pytest.raises(ValueError, match=r"keep=0\.5 must be an integer"):
        state_of(0.5, score)
    with pytest.raises(ValueError, match=r"must be \[2, 2, 1, 3\]"):
        state_of(4, score).insert(k, v, score)
    one, real = (k[:, :, :1], v[:, :, :1], score[:, :, :1]), torch.ones(B, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"present must be \[2\]"):
        state_of(4, score).insert(*one, real)
    with pytest.raises(ValueError, match=r"present must be \[2, 3\]"):
        state_of(4, score).extend(k, v, score, present=torch.ones(B, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask"):
        state_of(4, score).extend(k, v, score, present=torch.ones(B, 3))
