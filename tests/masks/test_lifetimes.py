"""Lifetimes against row-wise selection, one row at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmask.masks import Lifetimes, Padding
from dynmask.masks.lifetimes import NEVER
from dynmask.masks.rank import kth_smallest_of_runs

KINDS = ("normal", "ties", "rising", "falling", "infinite", "constant")


def scores(kind: str, batch: int, groups: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, groups, count)
    steps = torch.arange(count, dtype=torch.float32).expand(shape)
    coin = torch.rand(shape, generator=generator) < 0.5
    return {
        "normal": torch.randn(shape, generator=generator),
        "ties": torch.randint(0, 3, shape, generator=generator).float(),
        "rising": steps,
        "falling": -steps,
        "infinite": torch.where(coin, torch.inf, -torch.inf),
        "constant": torch.zeros(shape),
    }[kind]


def row_by_row(score: Tensor, keep: int, documents: Tensor | None, real: Tensor | None) -> Tensor:
    """What each row keeps, straight from the definition."""
    batch, groups, count = score.shape
    out = torch.zeros(batch, groups, count, count, dtype=torch.bool)
    for b in range(batch):
        for i in range(count):
            seen = torch.arange(count) <= i
            if documents is not None:
                seen &= documents[b] == documents[b, i]
            if real is not None:
                seen &= real[b] & real[b, i]
            keys = seen.nonzero()[:, 0]
            for g in range(groups):
                best = score[b, g, keys].argsort(descending=True, stable=True)[:keep]
                out[b, g, i, keys[best]] = True
    return out


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 40),
    keep=st.integers(1, 12),
    packed=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_top_is_row_wise_top_k(
    kind: str, count: int, keep: int, packed: bool, padded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = scores(kind, 2, 2, count, seed)
    documents = padding = real = None
    if packed:
        documents = torch.randint(0, 2, (2, count), generator=generator).cumsum(-1)
    if padded:
        ends = torch.randint(0, count + 1, (2, 2), generator=generator).sort(-1).values
        padding = Padding(ends[:, 0].contiguous(), ends[:, 1].contiguous())
        slot = torch.arange(count)
        real = (slot >= ends[:, :1]) & (slot < ends[:, 1:])
    mask = Lifetimes.top(score, keep=keep, documents=documents, padding=padding)
    assert torch.equal(mask.dense(count), row_by_row(score, keep, documents, real))


@pytest.mark.parametrize("count", [63, 65, 111, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_top_keeps_the_sets_of_topk(kind: str, count: int) -> None:
    score = scores(kind, 1, 3, count, seed=count)
    seen = Lifetimes.top(score, keep=50).dense(count)
    assert torch.equal(seen.sum(-1)[0, 0], torch.arange(1, count + 1).clamp_max(50))
    if kind == "normal":
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        rows = score[:, :, None].masked_fill(~causal, -torch.inf)
        expected = torch.zeros_like(seen).scatter_(-1, rows.topk(50, -1).indices, True) & causal
        assert torch.equal(seen, expected)


def test_a_later_key_never_changes_an_earlier_row() -> None:
    score = scores("normal", 1, 2, 65, seed=3)
    changed = score.clone()
    changed[..., 40:] = 9.0
    before = Lifetimes.top(score, keep=7).dense(65)
    assert torch.equal(Lifetimes.top(changed, keep=7).dense(65)[..., :40, :], before[..., :40, :])


def test_rising_scores_evict_at_every_step() -> None:
    expiry = Lifetimes.top(scores("rising", 1, 1, 9, 0), keep=3).expiry[0, 0]
    assert expiry.tolist() == [3, 4, 5, 6, 7, 8, NEVER, NEVER, NEVER]


def test_fewer_keys_than_keep_evict_nothing() -> None:
    assert bool((Lifetimes.top(torch.randn(2, 3, 8), keep=8).expiry == NEVER).all())


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 3), (100, 2)])
def test_window(window: int, sinks: int) -> None:
    row, key = torch.arange(33)[:, None], torch.arange(33)
    expected = (key <= row) & ((row - key < window) | (key < sinks))
    assert torch.equal(Lifetimes.window(33, window=window, sinks=sinks).dense(33)[0, 0], expected)


def test_above() -> None:
    score = scores("normal", 1, 2, 33, 5)
    expected = (score >= 0.3)[:, :, None] & torch.ones(33, 33, dtype=torch.bool).tril()
    assert torch.equal(Lifetimes.above(score, 0.3).dense(33), expected)


def test_density_counts_what_dense_shows() -> None:
    mask = Lifetimes.top(scores("ties", 2, 2, 65, 1), keep=9)
    pairs = 65 * 66 / 2
    torch.testing.assert_close(mask.density(), mask.dense(65).sum((-1, -2)).double() / pairs)


def test_last_rows_are_the_end_of_the_matrix() -> None:
    mask = Lifetimes.top(scores("normal", 1, 1, 33, 2), keep=4)
    assert torch.equal(mask.dense(5), mask.dense(33)[:, :, -5:])


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 70), k=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_kth_smallest_of_runs(count: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
    ends = torch.randint(0, count + 1, (2, 15, 2), generator=generator).sort(-1).values
    got = kth_smallest_of_runs(values, ends[..., 0], ends[..., 1], k)
    for m in range(2):
        for n, (first, last) in enumerate(ends[m].tolist()):
            run = sorted(values[m, first:last].tolist())
            assert got[m, n] == (run[k] if k < len(run) else count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lifetimes(torch.zeros(2, 3, dtype=torch.int32)), "expiry must be"),
        (lambda: Lifetimes(torch.zeros(1, 2, 3)), "expiry must be"),
        (lambda: Lifetimes.top(torch.zeros(1, 1, 4), keep=0), "keep=0"),
        (lambda: Lifetimes.top(torch.zeros(4), keep=1), "score must be"),
        (lambda: Lifetimes.window(4, window=0), "window >= 1"),
        (lambda: Lifetimes.window(4, window=2).dense(5), "q_len"),
    ],
    ids=["shape", "dtype", "keep", "score", "window", "q_len"],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
