"""Keys of static heads, held without those that no later row sees, against the whole attention."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask import attention
from dynmask.dam import static_keys
from dynmask.dam.static_keys import SLACK, StaticKeys
from dynmask.dam.static_tables import LastRows
from dynmask.masks import Padding, Stripes

DIM = 8


def draw_stripes(heads, seed, *, columns=12, reach=(9, 40, 70, 23), corner=None, density=0.2):
    """Random ones; head ``h`` sees keys up to ``reach[h]`` back, and not all in between."""
    g = torch.Generator().manual_seed(seed)
    furthest = [reach[h % len(reach)] for h in range(heads)]
    return Stripes(
        tuple(torch.randperm(150, generator=g)[: columns * (h % 3)].unique() for h in range(heads)),
        tuple(
            torch.cat([torch.randperm(r, generator=g)[: r // 3], torch.tensor([0, r])]).unique()
            for r in furthest
        ),
        torch.zeros(heads, dtype=torch.bool),
        None
        if corner is None
        else (torch.rand(heads, corner, corner, generator=g) < density).tril(),
    )


def visible(stripes, real):
    """``[B, H, N, N]``: the stripes over each row's real tokens, as if nothing else were there."""
    batch, count = real.shape
    plain = stripes.dense(count)[0]
    seen = torch.zeros(batch, stripes.heads, count, count, dtype=torch.bool)
    for b in range(batch):
        at = real[b].nonzero().flatten()
        seen[b, :, at[:, None], at] = plain[:, : len(at), : len(at)]
    return seen


def whole_attention(q, k, v, seen, scale=None):
    """Softmax over what is seen, in the inputs' dtype; rows that see nothing give 0."""
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    logits = (q @ k.mT) * (DIM**-0.5 if scale is None else scale)
    weights = logits.float() if q.dtype == torch.bfloat16 else logits
    weights = weights.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
    return weights.to(q.dtype) @ v


def draw(batch, heads, groups, count, *, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, n, count, DIM, generator=g, dtype=torch.float64).to(dtype)
        for n in (heads, groups, groups)
    )


def held(stripes, groups, real, rows_from):
    """``[B, G, N]``: keys that any row from token ``rows_from`` on sees, however far in future."""
    batch, count = real.shape
    far = max(int(o[-1]) for o in stripes.offsets)
    corner = 0 if stripes.corner is None else stripes.corner.shape[1]
    columns = max((int(c[-1]) + 1 for c in stripes.columns if len(c)), default=0)
    future = torch.ones(batch, far + corner + columns + 2, dtype=torch.bool)
    seen = visible(stripes, torch.cat([real, future], 1))[:, :, rows_from:, :count].any(2)
    return seen.unflatten(1, (groups, -1)).any(2)


def step(keys, k, v, real, new, *, given=True):
    """Append tokens ``new``; flags only if they are ``given`` or some are False."""
    some = real[:, new]
    keys.append(k[:, :, new], v[:, :, new], some if given or not bool(some.all()) else None)


PADDING = {
    "no padding": torch.ones(3, 330, dtype=torch.bool),
    # The last batch row has a single token in the prompt.
    "left": torch.arange(330) >= torch.tensor([0, 31, 199])[:, None],
    "right and holes": (torch.arange(330) % torch.tensor([330, 7, 3])[:, None] != 2)
    & (torch.arange(330) < torch.tensor([330, 330, 260])[:, None]),
}


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("corner", [None, 50, 230], ids=["none", "in prompt", "beyond prompt"])
def test_decoding_is_whole_attention(ratio, padding, corner):
    real, groups = PADDING[padding], 3
    heads, count = groups * ratio, real.shape[1]
    stripes = draw_stripes(heads, ratio, corner=corner)
    q, k, v = draw(3, heads, groups, count)
    expected = whole_attention(q, k, v, visible(stripes, real))
    keys = StaticKeys(stripes, groups)
    smallest = count
    for first, last in itertools.pairwise([0, 200, 201, 209, *range(210, count), count]):
        new = slice(first, last)
        step(keys, k, v, real, new, given=first == 0)
        torch.testing.assert_close(keys.attend(q[:, :, new]), expected[:, :, new])
        keys.evict()
        smallest = min(smallest, int((keys.expanded()[0] != 0).any(3).sum(2).max()))
    assert keys.tokens == count
    assert smallest < count - SLACK  # Otherwise nothing was tested.


@pytest.mark.parametrize("padding", ["no padding", "left"])
def test_chunks_attend_to_the_expanded_keys(padding):
    real = PADDING[padding]
    stripes = draw_stripes(4, 3, corner=90)
    q, k, v = draw(3, 4, 2, 330, dtype=torch.float32)
    expected = whole_attention(q, k, v, visible(stripes, real))
    keys = StaticKeys(stripes, 2)
    for first, last in itertools.pairwise([0, 111, 174, 175, 240, 330]):
        new = slice(first, last)
        step(keys, k, v, real, new)
        mask = stripes
        if padding == "left":
            mask = stripes & Padding.from_mask(real[:, :last])
        out = attention(q[:, :, new], *keys.expanded(), mask)
        torch.testing.assert_close(out, expected[:, :, new], rtol=1e-4, atol=1e-5)
        keys.evict()
    old = keys.expanded()
    assert not old[0][:, :, 100:180].any(3).all()
    assert old[0][:, :, -SLACK:].equal(k[:, :, -SLACK:])
    assert old[1][:, :, -SLACK:].equal(v[:, :, -SLACK:])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_only_what_no_later_row_sees_is_given_up(data):
    """Any sequence of calls, with small numbers and so a small slack."""
    slack, groups, ratio = 4, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    heads = groups * ratio
    corner = data.draw(st.sampled_from([None, 1, 7, 14]))
    seed = data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    some = st.sets(st.integers(0, 20), max_size=4)
    stripes = Stripes(
        tuple(torch.tensor(sorted(data.draw(some)), dtype=torch.int64) for _ in range(heads)),
        tuple(torch.tensor(sorted({0, *data.draw(some)})) for _ in range(heads)),
        torch.zeros(heads, dtype=torch.bool),
        None if corner is None else (torch.rand(heads, corner, corner, generator=g) < 0.3).tril(),
    )
    batch = data.draw(st.integers(1, 2))
    q, k, v = draw(batch, heads, groups, 60, seed=seed)
    share = data.draw(st.sampled_from([1.0, 0.7]))
    real = torch.rand(batch, 60, generator=g) < share
    expected = whole_attention(q, k, v, visible(stripes, real))
    calls = st.sampled_from(["token", "token", "tokens", "evict", "evict", "crop", "crop far"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_keys, "SLACK", slack)
        keys, count, floor = StaticKeys(stripes, groups), 0, 0
        for call in data.draw(st.lists(calls, min_size=8, max_size=40)):
            if call == "evict":
                keys.evict()
                floor = max(floor, count - slack)
            elif call == "crop":
                gone = data.draw(st.integers(0, min(slack, count - floor)))
                keys.crop(gone)
                count -= gone
                # Others come instead.
                real[:, count:] = torch.rand(batch, 60 - count, generator=g) < share
                expected = whole_attention(q, k, v, visible(stripes, real))
            elif call == "crop far":
                try:
                    keys.crop(min(count, slack + 3))
                    count -= min(count, slack + 3)
                    floor = min(floor, count)  # Nothing was given up yet.
                except ValueError:
                    assert count - slack - 3 < floor
            else:
                new = 1 if call == "token" else data.draw(st.integers(1, 9))
                new = slice(count, min(count + new, 60))
                if new.stop == count:
                    break
                step(keys, k, v, real, new, given=data.draw(st.booleans()))
                count = new.stop
                torch.testing.assert_close(keys.attend(q[:, :, new]), expected[:, :, new])
            assert keys.tokens == count
            if keys.nbytes == 0:
                continue
            found, values = keys.expanded()
            there = found.ne(0).any(3)
            assert there[held(stripes, groups, real[:, :count], floor)].all()
            assert found.equal(k[:, :, :count] * there[..., None])
            assert values.equal(v[:, :, :count] * there[..., None])


@pytest.mark.parametrize("padding", ["no padding", "left"])
def test_all_that_no_later_row_sees_is_given_up(padding):
    real = PADDING[padding][:, :200]
    stripes = draw_stripes(6, 5, corner=139, density=0.02)
    _, k, v = draw(3, 6, 3, 200)
    keys = StaticKeys(stripes, 3)
    step(keys, k, v, real, slice(0, 200))
    keys.evict()
    there = keys.expanded()[0].ne(0).any(3)[:, :, : 200 - SLACK]
    assert there.equal(held(stripes, 3, real, 200 - SLACK)[:, :, : 200 - SLACK])


def test_memory_is_that_of_the_keys_that_stay():
    columns, far, groups, dim = 40, 200, 2, 64
    stripes = Stripes(
        (torch.arange(0, 80, 2),) * 4,
        (torch.arange(100), torch.tensor([0, 3, far]), torch.arange(50), torch.arange(9)),
        torch.zeros(4, dtype=torch.bool),
    )
    fused = torch.randn(1, 2 * groups, 4096, dim, dtype=torch.bfloat16)
    keys = StaticKeys(stripes, groups)
    keys.append(fused[:, :groups], fused[:, groups:])
    assert keys.nbytes >= fused.nbytes  # A view would hold all of it.
    keys.evict()
    a_slot = groups * (2 * dim * 2 + 8)
    assert keys.nbytes <= (columns + far + 2 * SLACK + 1) * a_slot
    sizes = set()
    for _ in range(500):
        one = torch.randn(1, groups, 1, dim, dtype=torch.bfloat16)
        keys.append(one, one)
        keys.attend(torch.randn(1, 4, 1, dim, dtype=torch.bfloat16))
        sizes.add(keys.nbytes)
        keys.evict()
    assert len(sizes) == 1
    assert max(sizes) <= (columns + far + 2 * SLACK + 1) * (a_slot + 4)


def test_without_evict_room_grows_by_parts():
    keys, moves = StaticKeys(draw_stripes(2, 0), 2), set()
    for _ in range(1000):
        keys.append(torch.ones(1, 2, 1, DIM), torch.ones(1, 2, 1, DIM))
        moves.add(keys.nbytes)
    assert len(moves) < 15


@pytest.mark.parametrize("padding", ["no padding", "left"])
def test_slack_can_be_taken_back(padding):
    real = PADDING[padding]
    stripes = draw_stripes(4, 8, corner=60)
    q, k, v = draw(3, 4, 2, 330)
    other = draw(3, 4, 2, 330, seed=1)
    keys = StaticKeys(stripes, 2)
    step(keys, k, v, real, slice(0, 300))
    keys.evict()
    before = copy.deepcopy(keys)
    with pytest.raises(ValueError, match=f"last {SLACK + 1} tokens cannot .* evict later"):
        keys.crop(SLACK + 1)
    with pytest.raises(ValueError, match="cannot"):
        keys.crop(-1)
    assert all(a.equal(b) for a, b in zip(keys.expanded(), before.expanded(), strict=True))
    keys.crop(SLACK)
    left = 300 - SLACK
    assert keys.tokens == left
    q, k, v = (
        torch.cat([a[:, :, :left], b[:, :, left:]], 2)
        for a, b in zip((q, k, v), other, strict=True)
    )
    expected = whole_attention(q, k, v, visible(stripes, real))
    for i in range(left, 330):
        new = slice(i, i + 1)
        step(keys, k, v, real, new, given=False)
        torch.testing.assert_close(keys.attend(q[:, :, new]), expected[:, :, new])
        keys.evict()
    # The copy went its own way.
    assert before.tokens == 300


def test_everything_can_be_taken_back_until_keys_are_given_up():
    keys = StaticKeys(draw_stripes(2, 0), 2)
    _, k, v = draw(1, 2, 2, 300)
    original = k.clone()
    keys.append(k, v)
    keys.crop(300)
    assert keys.tokens == 0
    keys.append(-k, v)
    assert keys.expanded()[0].equal(-original)
    assert k.equal(original)  # What was given is not written to.
    keys.crop(100)
    keys.append(k[:, :, :7], v[:, :, :7])
    assert keys.expanded()[0].equal(torch.cat([-original[:, :, :200], original[:, :, :7]], 2))
    assert k.equal(original)


def test_reset_forgets_all():
    stripes = draw_stripes(4, 2)
    keys = StaticKeys(stripes, 2)
    _, k, v = draw(3, 4, 2, 300)
    keys.append(k, v, PADDING["left"][:, :300])
    keys.evict()
    keys.reset()
    assert (keys.tokens, keys.nbytes) == (0, 0)
    q, k, v = draw(1, 4, 2, 80, seed=3, dtype=torch.float32)
    keys.append(k, v)
    expected = whole_attention(q, k, v, stripes.dense(80))
    torch.testing.assert_close(keys.attend(q), expected)


@pytest.mark.parametrize("padding", ["no padding", "left"])
@pytest.mark.parametrize("evicted", [False, True], ids=["as given", "evicted"])
def test_beams(padding, evicted):
    real = PADDING[padding]
    stripes = draw_stripes(4, 11)
    q, k, v = draw(3, 4, 2, 330)
    keys = StaticKeys(stripes, 2)
    step(keys, k, v, real, slice(0, 290))
    if evicted:
        keys.evict()
    keys.repeat(2)
    order = torch.tensor([5, 0, 4, 4, 1, 2])
    keys.select(order)
    q, k, v, real = (t.repeat_interleave(2, 0)[order] for t in (q, k, v, real))
    fresh = draw(6, 4, 2, 330, seed=9)
    q, k, v = (
        torch.cat([a[:, :, :290], b[:, :, 290:]], 2) for a, b in zip((q, k, v), fresh, strict=True)
    )
    expected = whole_attention(q, k, v, visible(stripes, real))
    for i in range(290, 330):
        new = slice(i, i + 1)
        step(keys, k, v, real, new, given=False)
        torch.testing.assert_close(keys.attend(q[:, :, new]), expected[:, :, new])
        keys.evict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errs_no_more_than_eager_in_the_same_dtype(dtype):
    stripes = draw_stripes(4, 7)
    q, k, v = draw(2, 4, 2, 300, dtype=dtype)
    seen = stripes.dense(300)
    exact = whole_attention(q.double(), k.double(), v.double(), seen, scale=0.3)
    eager = (whole_attention(q, k, v, seen, scale=0.3) - exact)[:, :, 290:].abs().max()
    keys = StaticKeys(stripes, 2)
    keys.append(k[:, :, :290], v[:, :, :290])
    keys.evict()
    keys.append(k[:, :, 290:], v[:, :, 290:])
    out = keys.attend(q[:, :, 290:], 0.3)
    assert out.dtype == dtype
    assert (out - exact[:, :, 290:]).abs().max() <= 2 * eager


def test_nothing_waits_for_the_device():
    """Meta tensors hold nothing that could be read."""
    stripes = draw_stripes(4, 7, corner=30)
    keys = StaticKeys(stripes, 2)
    sizes = [20, *[1] * 30, 290, *[1] * 200, 300]
    for n in sizes:
        q, k = (torch.empty(2, h, n, DIM, device="meta") for h in (4, 2))
        # Flags of padding on the CPU.
        keys.append(k, k, torch.arange(n) > torch.tensor([[3], [0]]) if n == 290 else None)
        assert (keys.attend(q) if n < 30 else keys.expanded()[0]).device.type == "meta"
        keys.evict()
    keys.crop(3)
    keys.repeat(2)
    assert keys.attend(torch.empty(4, 4, 1, DIM, device="meta")).shape == (4, 4, 1, DIM)


@pytest.mark.parametrize("then", ["nothing", "evict", "select"])
def test_a_prompt_in_inference_mode_and_gradients_elsewhere(then):
    stripes = draw_stripes(2, 7)
    q, k, v = draw(1, 2, 2, 300)
    real = torch.arange(300)[None] >= 5 * (then != "evict")
    expected = whole_attention(q, k, v, visible(stripes, real))
    with torch.inference_mode():
        keys = StaticKeys(stripes, 2)
        keys.append(k[:, :, :250] + 0, v[:, :, :250] + 0, real[:, :250])
        if then == "evict":
            keys.evict()
        elif then == "select":
            keys.select(torch.tensor([0]))
        keys.attend(q[:, :, 249:250])
    q, k, v = (t[:, :, 250:].clone().requires_grad_() for t in (q, k, v))
    for i in range(50):
        new = slice(i, i + 1)
        keys.append(k[:, :, new], v[:, :, new])
        out = keys.attend(q[:, :, new])
        torch.testing.assert_close(out, expected[:, :, 250:][:, :, new])
    assert out.requires_grad
    assert not keys.expanded()[0].requires_grad


def test_evict_looks_every_few_tokens_only(monkeypatch):
    looked, see = [], LastRows.see
    monkeypatch.setattr(LastRows, "see", lambda *given: looked.append(1) or see(*given))
    keys = StaticKeys(draw_stripes(2, 7), 2)
    for count in [300, *[1] * (3 * SLACK)]:
        keys.append(torch.ones(1, 2, count, DIM), torch.ones(1, 2, count, DIM))
        keys.evict()
    assert len(looked) == 4


def test_stripes_are_shared_and_derived_from_once():
    stripes = draw_stripes(2, 7, corner=30)
    keys = StaticKeys(stripes, 2)
    q, k, v = draw(1, 2, 2, 9)
    keys.append(k, v)
    keys.attend(q)
    derived = dict(stripes.derived)
    other = copy.deepcopy(keys)
    other.crop(1)
    assert keys.tokens == 9
    assert other._stripes is stripes
    StaticKeys(stripes, 2).append(k, v)
    assert stripes.derived == derived


def test_what_cannot_be_is_refused():
    stripes = draw_stripes(4, 1)
    with pytest.raises(ValueError, match=r"of_heads"):
        StaticKeys(Stripes.causal(4), 2)
    with pytest.raises(ValueError, match=r"stripes\.unpadded"):
        StaticKeys(stripes & Padding.from_mask(torch.ones(1, 3)), 2)
    for groups in (0, 3):
        with pytest.raises(ValueError, match=f"groups={groups} must divide the 4 heads"):
            StaticKeys(stripes, groups)
    keys = StaticKeys(stripes, 2)
    q, k, v = draw(2, 4, 2, 200, dtype=torch.float32)
    with pytest.raises(ValueError, match="append some first"):
        keys.expanded()
    with pytest.raises(ValueError, match="tokens that were appended"):
        keys.attend(q)
    keys.append(k, v)
    for bad in (k[:1], k[:, :1], k[..., :3], k[:, :, :0], k[0]):
        with pytest.raises(ValueError, match=r"must be \[B, 2, n, D\]"):
            keys.append(bad, bad)
    with pytest.raises(ValueError, match=r"must be \[B, 2, n, D\]"):
        keys.append(k, v[:, :, :3])
    with pytest.raises(ValueError, match="one dtype and device"):
        keys.append(k.double(), v)
    for flags in (torch.ones(2, 3).bool(), torch.ones(2, 200)):
        with pytest.raises(ValueError, match=r"real must be \[2, 200\] bool"):
            keys.append(k, v, flags)
    for bad in (q[:1], q[:, :2], q[..., :3]):
        with pytest.raises(ValueError, match=r"q must be \[B, 4, Q, D\]"):
            keys.attend(bad)
    keys.evict()
    with pytest.raises(ValueError, match=f"1 to {SLACK} can be attended: .* before evict"):
        keys.attend(q[:, :, : SLACK + 1])
    assert keys.tokens == 200
    expected = whole_attention(q, k, v, stripes.dense(200))[:, :, -SLACK:]
    torch.testing.assert_close(keys.attend(q[:, :, -SLACK:]), expected)
