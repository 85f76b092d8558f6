"""Rows that see their nearest keys: against a dense definition, in one call and through caches."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from attention_cases import naive_attention
from features import lacks_kernels, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import GPU, require_triton

from dynmask.dma import LifetimeCache, nearest
from dynmask.dma.selection import select
from dynmask.dma.slots import Slots
from dynmask.dma.windowed import kept_keys
from dynmask.masks import Documents, Lifetimes
from dynmask.ops import attention, bounded


def defined(score, *, keep, window, threshold=None, real=None, documents=None):
    """``[B, G, N, N]`` by the definition: rows one by one, the older keys sorted by score.

    A row of padding sees what the real token before it sees, and nothing behind the last one.
    """
    batch, groups, count = score.shape
    seen = torch.zeros(batch, groups, count, count, dtype=torch.bool)
    keep = count if keep is None else keep
    window = min(window, keep)
    real = torch.ones(batch, count, dtype=torch.bool) if real is None else real
    value = score.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for b in range(batch):
        places = real[b].nonzero().flatten().tolist()
        for g in range(groups):
            for row in range(places[-1] + 1 if places else 0):
                past = [j for j in places if j <= row]
                if documents is not None:
                    past = [j for j in past if documents[b, j] == documents[b, row]]
                near, older = past[max(0, len(past) - window) :], past[: max(0, len(past) - window)]
                if not window:
                    near, older = [], past
                best = sorted(older, key=lambda j: (-value[b, g, j].item(), j))
                if threshold is not None:
                    best = [j for j in best if score[b, g, j] >= threshold]
                seen[b, g, row, near + best[: keep - window]] = True
    return seen


def slots_of(real, documents=None):
    ids = torch.zeros(1, 1, dtype=torch.long)
    return Slots(ids, real, None if documents is None else Documents(documents))


def drawn(batch, groups, count, *, seed=0, distinct=5):
    """Scores with many ties, NaN and infinities among them."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.tensor([*range(distinct), float("nan"), -torch.inf, torch.inf, -0.0])
    return values[torch.randint(len(values), (batch, groups, count), generator=draw)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 24),
    keep=st.one_of(st.none(), st.integers(1, 26)),
    window=st.integers(0, 26),
    threshold=st.sampled_from([None, 2.0]),
    holes=st.sampled_from(["none", "some", "many"]),
    seed=st.integers(0, 10_000),
)
def test_selection_is_the_definition(count, keep, window, threshold, holes, seed):
    score = drawn(2, 2, count, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    share = {"none": 0.0, "some": 0.2, "many": 0.7}[holes]
    real = torch.rand(2, count, generator=draw) >= share
    rule = {"keep": keep, "window": window, "threshold": threshold}
    mask = select(score, **rule, slots=None if holes == "none" else slots_of(real))
    expected = defined(score, **rule, real=real)
    assert torch.equal(mask.dense(count), expected)
    assert mask.most >= int(expected.sum(-1).max())
    assert keep is None or mask.most <= keep


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    keep=st.integers(1, 12),
    window=st.integers(0, 12),
    threshold=st.sampled_from([None, 2.0]),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 10_000),
)
def test_windows_end_with_their_document(lengths, keep, window, threshold, padding, seed):
    left, right = padding
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    ids = torch.nn.functional.pad(ids, (left, right), mode="replicate")
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, :left] = False
    real[:, ids.shape[1] - right :] = False
    score = drawn(1, 2, ids.shape[1], seed=seed)
    rule = {"keep": keep, "window": window, "threshold": threshold}
    mask = select(score, **rule, slots=slots_of(real if left + right else None, ids))
    found = mask.dense(ids.shape[1])
    expected = defined(score, **rule, real=real, documents=ids)
    assert torch.equal(found[:, :, real[0]], expected[:, :, real[0]])
    assert not found[:, :, :left].any()
    assert mask.most <= keep


# Through a cache.

G, D = 2, 8
SPLITS = {
    "prompt, then tokens": (13, 14, 15, 16, 17, 18, 19, 24),
    "tokens": tuple(range(1, 25)),
    "chunks": (5, 12, 19, 20, 24),
    "to the brim": (6, 7, 24),
}


def tokens(count, batch=2):
    draw = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, batch, G, count, D, generator=draw)
    q = torch.randn(batch, 2 * G, count, D, generator=draw)
    return k, v, torch.randn(batch, G, count, generator=draw), q


def through(cache, parts, start, stop, impl="cpu", **rule):
    """Output of a step, and its k, v, bias and mask."""
    k, v, score, q = (t[:, :, start:stop] for t in parts)
    found = cache.extend(k, v, score, 0, **rule)
    return attention(q, found[0], found[1], found[3], bias=found[2], impl=impl), found


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(
    ("keep", "window"), [(6, 1), (6, 3), (6, 5), (6, 6), (1, 1), (100, 3), (None, 3)], ids=str
)
@pytest.mark.parametrize("threshold", [None, 0.3], ids=["all", "threshold"])
@pytest.mark.parametrize("padding", [None, "left", "in the prompt", "holes"])
def test_a_cache_shows_what_one_call_does(splits, keep, window, threshold, padding):
    parts = tokens(24)
    real = torch.ones(2, 24, dtype=torch.bool)
    if padding == "left":
        real[1, :9] = False
    elif padding == "in the prompt":
        real[1, max(0, splits[0] - 3) : splits[0]] = False
    elif padding == "holes":
        real = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) > 0.4
    rule = {"keep": keep, "window": window, "threshold": threshold}
    seen = defined(parts[2], **rule, real=real)
    truth = naive_attention(parts[3], parts[0], parts[1], seen, parts[2])
    cache, start = LifetimeCache(), 0
    for stop in splits:
        now = None if padding is None else real[:, start:stop]
        got, _ = through(cache, parts, start, stop, **rule, present=now)
        # What rows of padding see is not said.
        got, want = (t.transpose(1, 2)[real[:, start:stop]] for t in (got, truth[:, :, start:stop]))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        start = stop
    held = cache.layers[0].memory() / (2 * G * (8 * D + 12) + 2)
    if keep is not None:
        assert held <= keep + 1


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    keep=st.integers(1, 12),
    near=st.integers(0, 12),
    threshold=st.sampled_from([None, 2.0]),
    holes=st.sampled_from([0.0, 0.2, 0.7]),
    seed=st.integers(0, 10_000),
)
def test_any_steps_show_the_keys_of_one_call(sizes, keep, near, threshold, holes, seed):
    """Keys are told apart by their numbers; scores tie, and may be infinite or no numbers."""
    count, window = sum(sizes), min(near, keep)
    score = drawn(2, G, count, seed=seed)
    key = torch.arange(1.0, count + 1).expand(2, G, count)[..., None]
    real = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) >= holes
    rule = {"keep": keep, "window": window, "threshold": threshold}
    expected = defined(score, **rule, real=real)
    cache, start = LifetimeCache(), 0
    for size in sizes:
        stop = start + size
        new = (t[:, :, start:stop] for t in (key, key, score))
        now = {"present": real[:, start:stop]} if holes else {}
        k, _, _, mask = cache.extend(*new, 0, **rule, **now)
        seen = mask.dense(size)
        for b, g, row in itertools.product(range(2), range(G), range(size)):
            if real[b, start + row]:
                found = k[b, g, seen[b, g, row], 0].long() - 1
                assert found.tolist() == expected[b, g, start + row].nonzero().flatten().tolist()
        start = stop


@pytest.mark.parametrize("window", [1, 3, 6])
def test_bits_are_those_of_the_whole_cache(window):
    parts = tokens(60)
    cache, start = LifetimeCache(), 0
    for stop in (20, 21, 22, 40, 41, 60):
        got, _ = through(cache, parts, start, stop, keep=6, window=window)
        k, v, score, _ = (t[:, :, :stop] for t in parts)
        mask = select(score, keep=6, window=window)
        q = parts[3][:, :, start:stop]
        assert torch.equal(got, attention(q, k, v, mask, bias=score, impl="cpu"))
        start = stop


@pytest.mark.parametrize("window", [2, 6])
def test_memory_stops_growing(window):
    parts, sizes = tokens(64), set()
    cache = LifetimeCache()
    for start, stop in [(n, n + 8) for n in range(0, 48, 8)] + [(n, n + 1) for n in range(48, 64)]:
        through(cache, parts, start, stop, keep=6, window=window)
        sizes.add(cache.memory())
        # No view of a chunk or of all that came before.
        held = cache.layers[0]._kept.near.k.untyped_storage().nbytes()
        assert held <= 2 * G * (window + 1) * 4 * D
    assert len(sizes) == 1
    assert sizes.pop() <= 2 * G * 6 * (2 * 4 * D + 12)


@pytest.mark.parametrize("filled", [4, 15])
@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["beams", "repeat", "select"],
)
def test_batch_rows_follow(filled, window, padded, change, rows):
    parts = tokens(24)
    rule = {"keep": 6, "window": window}
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :5] = not padded

    def present(start, stop):
        return {"present": real[:, start:stop]} if padded else {}

    def present_of(start, stop):
        return {"present": real[rows, start:stop]} if padded else {}

    cache, other = LifetimeCache(), LifetimeCache()
    through(cache, parts, 0, filled, **rule, **present(0, filled))
    change(cache)
    taken = [t[rows] for t in parts]
    through(other, taken, 0, filled, **rule, **present_of(0, filled))
    for start, stop in ((filled, filled + 1), (filled + 1, 24)):
        now = present_of(start, stop)
        got, want = (through(c, taken, start, stop, **rule, **now)[0] for c in (cache, other))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.parametrize("filled", [3, 5, 15])
@pytest.mark.parametrize("removed", [0, 1, 3])
def test_crop_after_recording_leaves_no_trace(filled, removed, window):
    parts, rule = tokens(30), {"keep": 6, "window": window}
    cache, other = LifetimeCache(), LifetimeCache()
    through(cache, parts, 0, filled, **rule)
    through(other, parts, 0, filled, **rule)
    cache.activate_past_recording()
    for stop in (filled + 1, filled + 5):
        start = cache.get_seq_length()
        got, _ = through(cache, parts, start, stop, **rule)
        want = defined(parts[2][:, :, :stop], **rule)[:, :, start:]
        q, k, v, score = (parts[i][:, :, :stop] for i in (3, 0, 1, 2))
        want = naive_attention(q[:, :, start:], k, v, want, score)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    cache.crop(-removed)
    left = filled + 5 - removed
    through(other, parts, filled, left, **rule)
    cache.layers[0].record_past = False
    for start, stop in ((left, left + 1), (left + 1, 26)):
        got, want = (through(c, parts, start, stop, **rule)[0] for c in (cache, other))
        torch.testing.assert_close(got, want)


def test_crop_without_recording_is_refused():
    cache = LifetimeCache()
    through(cache, tokens(15), 0, 15, keep=6, window=6)
    with pytest.raises(ValueError, match="cannot remove the last 1 tokens"):
        cache.crop(-1)


def test_copies_and_moves():
    parts, rule = tokens(24), {"keep": 6, "window": 3}
    cache = LifetimeCache()
    through(cache, parts, 0, 15, **rule)
    copied = copy.deepcopy(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    changed = [t + 1 for t in parts]
    through(copied, changed, 15, 20, **rule)
    want = defined(parts[2][:, :, :16], **rule)[:, :, 15:]
    q, k, v, score = (parts[i][:, :, :16] for i in (3, 0, 1, 2))
    got, _ = through(cache, parts, 15, 16, **rule)
    want = naive_attention(q[:, :, 15:], k, v, want, score)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_inference_mode_can_be_left():
    parts, rule = tokens(24), {"keep": 6, "window": 3}
    cache = LifetimeCache()
    with torch.inference_mode():
        inside = [t.clone() for t in parts]
        through(cache, inside, 0, 15, **rule)
    for start in range(15, 24):
        out, _ = through(cache, parts, start, start + 1, **rule)
    assert out.isfinite().all()


@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.parametrize("steps", [(15, 16), (15, 20), (15, 24)])
def test_gradients_into_kept_keys_raise(window, steps):
    parts = [t.requires_grad_() for t in tokens(24)]
    cache = LifetimeCache()
    rule = {"keep": 6, "window": window, "impl": "reference"}
    first, _ = through(cache, parts, 0, 15, **rule)
    later, _ = through(cache, parts, *steps, **rule)
    first.sum().backward()
    with pytest.raises(ValueError, match="gradients do not flow into the keys"):
        later.sum().backward()


@pytest.mark.parametrize("filled", [3, 15])
def test_another_window_is_refused_and_nothing_lost(filled):
    parts, rule = tokens(24), {"keep": 6, "window": 3}
    cache = LifetimeCache()
    through(cache, parts, 0, filled, **rule)
    with pytest.raises(ValueError, match=r"window=2 differ from keep=6, .*window=3"):
        through(cache, parts, filled, filled + 1, keep=6, window=2)
    assert cache.get_seq_length() == filled
    for window in (-1, 7):
        with pytest.raises(ValueError, match=f"window={window} must be from 0 to keep=6"):
            through(LifetimeCache(), parts, 0, 5, keep=6, window=window)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_what_the_choice_leaves_open_does_not_matter(monkeypatch, padded, threshold):
    """On a GPU a key that no row from an offset on sees may have any expiry before."""
    draw = torch.Generator().manual_seed(4)
    plain = nearest.top_of_shown

    def loose(score, keep, shown, *, offset=0):
        mask = plain(score, keep, shown, offset=offset)
        last = torch.arange(score.shape[-1]).clamp_min(offset)
        anything = (torch.rand(mask.expiry.shape, generator=draw) * (last + 1)).int()
        expiry = torch.where(mask.expiry <= last, anything, mask.expiry)
        return Lifetimes(expiry, mask.most, mask.is_causal)

    monkeypatch.setattr(nearest, "top_of_shown", loose)
    parts = tokens(40)
    real = torch.rand(2, 40, generator=draw) > 0.3 * padded
    rule = {"keep": 6, "window": 2, "threshold": threshold}
    seen = defined(parts[2], **rule, real=real)
    truth = naive_attention(parts[3], parts[0], parts[1], seen, parts[2])
    for recording in (False, True):
        cache, start = LifetimeCache(), 0
        if recording:
            cache.activate_past_recording()
        for stop in (4, 5, 9, 15, 16, 30, 40):
            now = {"present": real[:, start:stop]} if padded else {}
            got, _ = through(cache, parts, start, stop, **rule, **now)
            got, want = (
                t.transpose(1, 2)[real[:, start:stop]] for t in (got, truth[:, :, start:stop])
            )
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
            start = stop


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_by_the_kernels(monkeypatch, padded):
    """On a GPU one kernel takes in what leaves the window, and slots are not sorted by arrival."""
    require_triton()
    needs(lacks_kernels)
    from dynmask.masks.triton.select import expiry_of_top
    from dynmask.ops.triton.insert import insert

    monkeypatch.setattr(bounded, "_insert_function", lambda device: insert)
    monkeypatch.setattr("dynmask.ops.bounded_rules._expiry_of_top", expiry_of_top)
    device = "cuda" if GPU else "cpu"
    parts, rule = tokens(24), {"keep": 6, "window": 2, "threshold": 0.3}
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :9] = not padded
    seen = defined(parts[2], **rule, real=real)
    truth = naive_attention(parts[3], parts[0], parts[1], seen, parts[2])
    k, v, score, q = (t.to(device) for t in parts)
    real = real.to(device)
    state = kept_keys(6, 2, batch=2, groups=G, dim=D, threshold=0.3, device=device)
    now = {"present": real[:, :12]} if padded else {}
    state.extend(k[:, :, :12], v[:, :, :12], score[:, :, :12], **now)
    for at in range(12, 24):
        one = slice(at, at + 1)
        now = {"present": real[:, at]} if padded else {}
        state.insert(k[:, :, one], v[:, :, one], score[:, :, one], **now)
        keys, values, bias, mask = state.view()
        assert keys.shape[2] == 6
        out = attention(q[:, :, one], keys, values, mask, bias=bias, impl="reference")
        torch.testing.assert_close(out.double().cpu(), truth[:, :, one], rtol=1e-5, atol=1e-5)
