"""Lifetimes against row-wise selection, one row at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmask.masks import Documents, Lifetimes, Padding, lifetimes
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


WILD = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-40, torch.pi)


def by_counting(score: Tensor, keep: int, allowed: Tensor) -> Tensor:
    """What each row keeps, without a sort: keys beaten by fewer than ``keep`` allowed ones.

    Args:
        score: ``[B, G, K]``.
        keep: Keys of a row.
        allowed: ``[B, K, K]`` bool, the keys that each row may see.
    """
    score = torch.where(score.isnan(), -torch.inf, score)
    earlier = torch.ones(score.shape[-1], score.shape[-1], dtype=torch.bool).tril(-1)
    higher = score[..., None, :] > score[..., None]
    beats = higher | ((score[..., None, :] == score[..., None]) & earlier)  # [.., loser, winner]
    beaten = (beats[:, :, None] & allowed[:, None, :, None]).sum(-1)
    return allowed[:, None] & (beaten < keep)


def allowed_pairs(count: int, documents: Tensor | None, padding: Padding | None) -> Tensor:
    """``[2, K, K]`` bool: causal, same document, both real."""
    allowed = torch.ones(2, count, count, dtype=torch.bool).tril()
    if documents is not None:
        allowed &= documents[:, :, None] == documents[:, None]
    if padding is not None:
        for b, (start, stop) in enumerate(zip(padding.start, padding.stop, strict=True)):
            real = torch.zeros(count, dtype=torch.bool)
            real[start:stop] = True
            allowed[b] &= real & real[:, None]
    return allowed


@settings(max_examples=1000, deadline=None)
@given(
    kind=st.sampled_from((*KINDS, "wild", "wild")),
    count=st.integers(1, 24),
    keep=st.integers(1, 30),
    parts=st.tuples(st.booleans(), st.booleans()),
    few=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_top_is_what_counting_finds(
    kind: str, count: int, keep: int, parts: tuple[bool, bool], few: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "wild":
        drawn = torch.randint(0, len(WILD), (2, 2, count), generator=generator)
        score = torch.tensor(WILD)[drawn]
    else:
        score = scores(kind, 2, 2, count, seed)
    keep = min(keep, 3) if few else keep
    documents = padding = None
    if parts[0]:
        documents = torch.randint(0, 4, (2, count), generator=generator).bitwise_and(1).cumsum(-1)
    if parts[1]:
        ends = torch.randint(0, count + 1, (2, 2), generator=generator).sort(-1).values
        padding = Padding(ends[:, 0].contiguous(), ends[:, 1].contiguous())
    packed = None if documents is None else Documents(documents)
    mask = Lifetimes.top(score, keep=keep, documents=packed, padding=padding)
    expected = by_counting(score, keep, allowed_pairs(count, documents, padding))
    assert torch.equal(mask.dense(count), expected)
    assert mask.most == keep


@pytest.mark.parametrize("keep", [1, 3, 20])
@pytest.mark.parametrize("parts", ["", "packed", "padded", "packed padded"])
def test_the_kernels_path_is_the_sorting_one(monkeypatch, keep: int, parts: str) -> None:  # type: ignore[no-untyped-def]
    select = pytest.importorskip("dynmask.masks.triton.select")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(keep)
    score = torch.tensor(WILD)[torch.randint(0, len(WILD), (2, 2, 50), generator=generator)]
    documents = padding = None
    if "packed" in parts:
        documents = Documents(torch.rand(2, 50, generator=generator).lt(0.1).cumsum(-1))
    if "padded" in parts:
        padding = Padding(torch.tensor([4, 0]), torch.tensor([50, 33]))
    expected = Lifetimes.top(score, keep=keep, padding=padding, documents=documents)
    monkeypatch.setattr(lifetimes, "_expiry_of_top", select.expiry_of_top)
    for offset in (0, 1, 24, 49, 50):
        got = Lifetimes.top(
            score.to(device), keep=keep, offset=offset, padding=padding, documents=documents
        )
        assert torch.equal(got.dense(50 - offset).cpu(), expected.dense(50 - offset))
        assert got.dense(50).sum(-1).max() <= keep


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from((*KINDS, "wild")),
    keep=st.integers(1, 7),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_bounded_cache_selects_what_the_whole_one_does(
    kind: str, keep: int, chunks: list[int], packed: bool, seed: int
) -> None:
    count = sum(chunks)
    generator = torch.Generator().manual_seed(seed)
    if kind == "wild":
        score = torch.tensor(WILD)[torch.randint(0, len(WILD), (1, 1, count), generator=generator)]
    else:
        score = scores(kind, 1, 1, count, seed)
    ids = torch.zeros(1, count, dtype=torch.int64)
    if packed:
        ids = torch.rand(1, count, generator=generator).lt(0.15).cumsum(-1)
    whole = Lifetimes.top(score, keep=keep, documents=ids).dense(count)
    kept = torch.empty(0, dtype=torch.int64)
    done = 0
    for size in chunks:
        slots = torch.cat([kept, torch.arange(done, done + size)])
        mask = Lifetimes.top(score[..., slots], keep=keep, documents=ids[:, slots])
        rows = torch.zeros(size, count, dtype=torch.bool)
        rows[:, slots] = mask.dense(size)[0, 0]
        assert torch.equal(rows, whole[0, 0, done : done + size])
        kept = slots[mask.expiry[0, 0] >= len(slots)]
        assert len(kept) <= keep
        done += size


@pytest.mark.parametrize("rows", [1, 3])
def test_one_padding_and_one_packing_serve_a_batch(rows: int) -> None:
    score = scores("normal", 3, 2, 20, seed=4)
    padding = Padding(torch.full((rows,), 2), torch.full((rows,), 17))
    ids = torch.arange(20).div(6, rounding_mode="floor").expand(rows, -1)
    mask = Lifetimes.top(score, keep=3, padding=padding, documents=Documents(ids))
    for b in range(3):
        alone = Lifetimes.top(
            score[b : b + 1],
            keep=3,
            padding=Padding(padding.start[:1], padding.stop[:1]),
            documents=ids[:1],
        )
        assert torch.equal(mask.expiry[b : b + 1], alone.expiry)


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


@pytest.mark.parametrize("offset", [0, 5, 19, 20])
def test_rows_from_an_offset_on_are_the_same(offset: int) -> None:
    score = scores("ties", 2, 2, 20, seed=1)
    whole, part = Lifetimes.top(score, keep=3), Lifetimes.top(score, keep=3, offset=offset)
    assert torch.equal(part.dense(20 - offset), whole.dense(20 - offset))


def test_fewer_keys_than_keep_evict_nothing() -> None:
    with torch.inference_mode():
        mask = Lifetimes.top(torch.randn(2, 3, 8), keep=8)
    assert mask.expiry.shape == (2, 3, 8)
    assert bool((mask.expiry == NEVER).all())
    assert mask.is_causal
    # One number in all, made once, and not bound to the mode in which it was made.
    again = Lifetimes.top(torch.randn(1, 1, 5), keep=8)
    assert again.expiry.data_ptr() == mask.expiry.data_ptr()
    assert not again.expiry.is_inference()
    padding = Padding(torch.tensor([1]), torch.tensor([4]))
    assert (again & padding).expiry.tolist() == [[[0, 4, 4, 4, 4]]]
    assert bool((again.expiry == NEVER).all())


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


@pytest.mark.parametrize("q_len", [0, 1, 30, 65])
def test_pairs_of_the_last_rows_are_counted(q_len: int) -> None:
    mask = Lifetimes.top(scores("ties", 2, 2, 65, 1), keep=9)
    assert torch.equal(mask.visible_pairs(q_len), mask.dense(q_len).sum((-1, -2)))


def test_last_rows_are_the_end_of_the_matrix() -> None:
    mask = Lifetimes.top(scores("normal", 1, 1, 33, 2), keep=4)
    assert torch.equal(mask.dense(5), mask.dense(33)[:, :, -5:])


@pytest.mark.parametrize("first", [0, 7, 33])
@pytest.mark.parametrize("k_len", [33, 40])
def test_slots_are_rows_of_the_matrix(first: int, k_len: int) -> None:
    mask = Lifetimes.top(scores("normal", 2, 2, 40, 2), keep=4)
    assert torch.equal(mask.slots(first, 33, k_len), mask.dense(40)[:, :, first:33, :k_len])


def test_beyond_the_last_slot_is_never() -> None:
    expiry = torch.tensor([[[40, NEVER, 0]]], dtype=torch.int32)
    seen = Lifetimes(expiry).dense(3)[0, 0].tolist()
    assert seen == [[True, False, False], [True, True, False], [True, True, False]]


@pytest.mark.parametrize("batch", [1, 2])
def test_and_padding_hides_rows_and_keys(batch: int) -> None:
    mask = Lifetimes.top(scores("normal", batch, 2, 9, 1), keep=3)
    padding = Padding(torch.tensor([2, 0]), torch.tensor([9, 5]))
    real = padding.dense(9)
    both = real[:, None, :, None] & real[:, None, None]
    assert torch.equal((mask & padding).dense(9), mask.dense(9) & both)
    assert (mask & padding).most == 3


def test_most_bounds_the_keys_of_a_row() -> None:
    for mask in (
        Lifetimes.top(scores("ties", 2, 2, 65, 1), keep=9),
        Lifetimes.window(65, window=6, sinks=3),
        Lifetimes.window(65, window=6) & Documents(torch.arange(65)[None] // 4),
    ):
        assert mask.most is not None
        assert mask.dense(65).sum(-1).max() <= mask.most
    assert Lifetimes.window(65, window=6, sinks=3).most == 9
    assert Lifetimes.above(torch.zeros(1, 1, 4), 0.0).most is None


def test_to() -> None:
    mask = Lifetimes.window(9, window=2)
    assert mask.to("cpu") is mask
    assert mask.to("meta").device.type == "meta"
    assert mask.to("meta").most == 2


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


def top_of_two(**more) -> Lifetimes:  # type: ignore[no-untyped-def]
    return Lifetimes.top(torch.zeros(2, 1, 4), keep=1, **more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lifetimes(torch.zeros(2, 3, dtype=torch.int32)), "expiry must be"),
        (lambda: Lifetimes(torch.zeros(1, 2, 3)), "expiry must be"),
        (lambda: Lifetimes.top(torch.zeros(1, 1, 4), keep=0), "keep=0"),
        (lambda: Lifetimes.top(torch.zeros(1, 1, 4), keep=1.5), "keep=1.5 must be an integer"),  # type: ignore[arg-type]
        (lambda: Lifetimes.top(torch.zeros(4), keep=1), "score must be"),
        (lambda: Lifetimes.top(torch.zeros(1, 1, 4), keep=1, offset=5), "offset=5 .* K=4"),
        (lambda: Lifetimes.top(torch.zeros(1, 1, 4), keep=9, offset=-1), "offset=-1"),
        (lambda: Lifetimes.window(4, window=0), "window >= 1"),
        (lambda: Lifetimes.window(4, window=2.5), "window=2.5 must be an integer"),  # type: ignore[arg-type]
        (lambda: Lifetimes.window(-4, window=2), "length >= 0"),
        (lambda: Lifetimes.window(4, window=2).dense(5), "q_len"),
        (lambda: Lifetimes([[[4]]]), "expiry must be a torch tensor, got list"),  # type: ignore[arg-type]
        (lambda: Lifetimes.top([1.0], keep=1), "score must be a torch tensor"),  # type: ignore[arg-type]
        (lambda: top_of_two(offset=1.0), "offset=1.0 must be an integer"),
        (lambda: top_of_two(padding=torch.ones(2, 4)), "padding must be a Padding or None"),
        (lambda: top_of_two(documents=[[0, 0, 1, 1]]), "ids must be a torch tensor"),
        (lambda: Lifetimes(torch.tensor([[[3, -1]]], dtype=torch.int32)), "negative"),
        (lambda: Lifetimes(torch.zeros(1, 1, 2, dtype=torch.int32), most=-1), "most=-1"),
        (lambda: Lifetimes.top(torch.zeros(1, 1, 4, dtype=torch.int32), keep=1), "float"),
        (lambda: Lifetimes.above(torch.zeros(4), 0.0), "score must be"),
        (lambda: top_of_two(padding=Padding(torch.tensor([0]), torch.tensor([5]))), "slot 5"),
        (lambda: top_of_two(padding=Padding(*torch.zeros(2, 3).long())), "padding has 3 rows"),
        (lambda: top_of_two(documents=torch.zeros(1, 3).long()), r"\[1, 3\]"),
        (lambda: top_of_two(documents=torch.tensor([[0, 1, 0, 0]])), "fall"),
        (lambda: top_of_two() & Padding(*torch.zeros(2, 3).long()), "padding has 3 rows"),
        (lambda: top_of_two() & Documents(torch.zeros(3, 4).long()), r"\[3, 4\]"),
    ],
    ids=range(26),
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_window_of_any_size_is_no_window() -> None:
    assert Lifetimes.window(8, window=2**63 - 1).dense(8).sum() == 36


def test_and_refuses_other_things() -> None:
    with pytest.raises(TypeError):
        _ = Lifetimes.window(4, window=2) & torch.ones(1, 4)  # type: ignore[operator]
