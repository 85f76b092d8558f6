"""DESIGN.md's contracts 1 to 6 and 9 of the op, as properties of drawn calls."""

import dataclasses

import pytest
import torch
from attention_cases import (
    blocks,
    lifetimes,
    naive_attention,
    naive_blocks,
    naive_lifetimes,
    naive_mask,
    padding,
    stripes,
    tensors,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from dynmask.dma.selection import select
from dynmask.dma.slots import Slots
from dynmask.masks import Blocks, Documents, Lifetimes, Stripes
from dynmask.ops import BoundedKeys, attention, supports

IMPLS = ["reference", "sdpa", "cpu", "triton"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
few = settings(max_examples=25)


@dataclasses.dataclass
class Call:
    """Arguments of `attention`, and the pairs that they mean, ``[B, H, Q, K]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Stripes | Lifetimes | Blocks
    bias: torch.Tensor | None
    seen: torch.Tensor

    @property
    def given(self):
        return self.q, self.k, self.v, self.mask


@st.composite
def calls(draw, dtypes=tuple(DTYPES)):
    batch, groups, ratio = (draw(st.integers(1, 3)) for _ in range(3))
    k_len = draw(st.integers(1, 40))
    q_len = draw(st.one_of(st.just(1), st.integers(1, k_len)))
    dim, seed = draw(st.sampled_from([16, 24, 32])), draw(st.integers(0, 9999))
    heads, dtype = groups * ratio, DTYPES[draw(st.sampled_from(dtypes))]
    q, k, v = tensors(batch, heads, groups, q_len, k_len, dim, dtype=dtype, seed=seed)
    if draw(st.booleans()):  # Tokens first, as models hand them on; every second row of a cache.
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k, v = (torch.stack([t, t], 3).flatten(2, 3)[:, :, ::2] for t in (k, v))
    kind = draw(st.sampled_from(["stripes", "lifetimes", "blocks"]))
    if kind == "stripes":
        full = tuple(draw(st.sets(st.integers(0, heads - 1), max_size=2)))
        mask = stripes(heads, k_len, seed=seed, corner=draw(st.sampled_from([0, 9])), full=full)
    elif kind == "lifetimes":
        mask = lifetimes(batch, groups, k_len, keep=draw(st.integers(1, 50)), seed=seed)
    else:
        mask = blocks(batch, groups, k_len, seed=seed)
    if draw(st.booleans()):
        runs = []
        for _ in range(batch):  # Also a row of padding alone.
            start = draw(st.integers(0, k_len))
            runs.append((start, draw(st.integers(start, k_len))))
        mask = mask & padding(*runs)
    naive = {
        Stripes: lambda: naive_mask(mask, q_len, k_len),
        Lifetimes: lambda: naive_lifetimes(mask, q_len),
        Blocks: lambda: naive_blocks(mask, q_len, k_len),
    }[type(mask)]()
    if naive.shape[1] not in (1, heads):
        naive = naive.repeat_interleave(ratio, 1)
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(batch, groups, k_len, generator=g) if draw(st.booleans()) else None
    return Call(q, k, v, mask, bias, naive.expand(batch, heads, q_len, k_len))


@pytest.mark.parametrize("impl", IMPLS)
@given(call=calls())
@few
def test_the_mask_it_was_given_and_no_other(impl, call, device):
    """1, 2, 4, 6: the pairs meant, empty rows 0, any shape, error of eager's size."""
    q, k, v, mask = (x.to(device) for x in call.given)
    bias = None if call.bias is None else call.bias.to(device)
    assume(supports(impl, q, k, v, mask, bias=bias) is None)
    out = attention(q, k, v, mask, bias=bias, impl=impl).cpu()
    truth = naive_attention(call.q, call.k, call.v, call.seen, call.bias)
    eager = naive_attention(call.q, call.k, call.v, call.seen, call.bias, dtype=call.q.dtype)
    assert out.dtype == call.q.dtype
    assert out.isfinite().all()
    assert (out[~call.seen.any(-1)] == 0).all()
    slack = 64 * torch.finfo(torch.float32).eps
    if impl != "sdpa" and call.q.dtype != torch.float32:
        # One rounding of the result, where eager's own roundings happen to cancel.
        slack += torch.finfo(call.q.dtype).eps * float(truth.abs().max())
    elif impl == "sdpa":
        slack += 4 * torch.finfo(call.q.dtype).eps * float(truth.abs().max())
    assert (out.double() - truth).abs().max() <= 2 * (eager.double() - truth).abs().max() + slack


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@given(call=calls(dtypes=("fp32",)))
@few
def test_empty_rows_have_no_lse(impl, call, device):
    """2: lse is -inf where a row sees nothing, and there alone."""
    q, k, v, mask = (x.to(device) for x in call.given)
    assume(supports(impl, q, k, v, mask, return_lse=True) is None)
    _, lse = attention(q, k, v, mask, impl=impl, return_lse=True)
    assert torch.equal(lse.cpu().isneginf(), ~call.seen.any(-1))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@given(call=calls(dtypes=("fp32",)))
@settings(max_examples=8)  # Backward in the interpreter takes seconds.
def test_empty_rows_have_no_gradient(impl, call, device):
    """2: gradients are 0 where nothing is seen, never NaN."""
    q, k, v = (x.to(device).requires_grad_() for x in (call.q, call.k, call.v))
    mask = call.mask.to(device)
    assume(supports(impl, q, k, v, mask) is None)
    attention(q, k, v, mask, impl=impl).sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (q.grad.cpu()[~call.seen.any(-1)] == 0).all()
    unseen = ~call.seen.any(2).unflatten(1, (call.k.shape[1], -1)).any(2)
    assert (v.grad.cpu()[unseen] == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "sdpa", "triton"])  # Others run all of these.
@given(call=calls(), asked=st.booleans())
@settings(max_examples=10)
def test_a_named_backend_runs_or_says_why_not(impl, call, asked, device):
    """3: what `supports` refuses raises its reason, whatever else could run the call."""
    q, k, v, mask = (x.to(device) for x in call.given)
    why = supports(impl, q, k, v, mask, return_lse=asked)
    assume(why is not None)
    with pytest.raises(ValueError) as raised:
        attention(q, k, v, mask, impl=impl, return_lse=asked)
    assert why in str(raised.value)


lengths = st.integers(1, 40)
seeds = st.integers(0, 9999)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@given(length=lengths, seed=seeds)
@few
def test_keeping_all_is_sdpa(length, seed):
    """5: keep-all == SDPA."""
    q, k, v = tensors(2, 4, 2, length, length, 16, seed=seed)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    every = torch.arange(length)
    whole = torch.zeros(2, 2, -(-length // 8), -(-length // 8)).int() + torch.arange(
        -(-length // 8)
    )
    for mask in (
        Stripes.streaming(4, sinks=0, window=length),
        Lifetimes.top(torch.randn(2, 2, length), keep=length),
        Lifetimes(torch.full((2, 2, length), length, dtype=torch.int32)),
        Blocks(whole.int(), torch.full(whole.shape[:3], whole.shape[3]).int(), 8, 8),
        Stripes((every,) * 4, (every[:1],) * 4, torch.zeros(4, dtype=torch.bool)),
    ):
        torch.testing.assert_close(attention(q, k, v, mask), dense, **CLOSE)


@given(length=lengths, step=st.integers(1, 9), seed=seeds)
@few
def test_stripes_in_chunks(length, step, seed):
    """5: chunked == whole prefill, decode == last row; 9: the density is the share of pairs."""
    q, k, v = tensors(1, 4, 2, length, length, 16, seed=seed)
    mask = stripes(4, length, seed=seed, full=(1,))
    whole = attention(q, k, v, mask)
    for first in range(0, length, step):
        until = min(first + step, length)
        part = attention(q[:, :, first:until], k[:, :, :until], v[:, :, :until], mask)
        torch.testing.assert_close(part, whole[:, :, first:until], **CLOSE)
    last = attention(q[:, :, -1:], k, v, mask)
    torch.testing.assert_close(last, whole[:, :, -1:], **CLOSE)
    pairs = naive_mask(mask, length, length).sum((0, 2, 3)).double()
    torch.testing.assert_close(mask.density(length), pairs / (length * (length + 1) / 2))


@given(
    length=lengths,
    keep=st.integers(1, 45),
    step=st.integers(1, 9),
    seed=seeds,
    tied=st.booleans(),
    data=st.data(),
)
@few
def test_the_top_of_a_score_in_chunks_and_from_a_bounded_cache(
    length, keep, step, seed, tied, data
):
    """5: chunked == whole, bounded == whole cache, and the future never changes the past."""
    q, k, v = tensors(1, 4, 2, length, length, 16, seed=seed)
    score = torch.randn(1, 2, length, generator=torch.Generator().manual_seed(seed))
    score = score.round() if tied else score
    mask = Lifetimes.top(score, keep=keep)
    whole = attention(q, k, v, mask, bias=score)
    kept = BoundedKeys(keep, batch=1, groups=2, dim=16)
    for first in range(0, length, step):
        rows, until = slice(first, min(first + step, length)), min(first + step, length)
        part = Lifetimes.top(score[:, :, :until], keep=keep)
        out = attention(
            q[:, :, rows], k[:, :, :until], v[:, :, :until], part, bias=score[:, :, :until]
        )
        torch.testing.assert_close(out, whole[:, :, rows], **CLOSE)
    for at in range(length):
        now = slice(at, at + 1)
        kept.insert(k[:, :, now], v[:, :, now], score[:, :, now])
        out = attention(q[:, :, now], kept.k, kept.v, Lifetimes(kept.expiry), bias=kept.score)
        torch.testing.assert_close(out, whole[:, :, now], **CLOSE)
    cut = data.draw(st.integers(0, length))
    other = score.clone()
    other[:, :, cut:] = torch.randn(1, 2, length - cut)
    seen, changed = mask.dense(length), Lifetimes.top(other, keep=keep).dense(length)
    assert torch.equal(seen[:, :, :cut], changed[:, :, :cut])
    pairs = seen.sum((2, 3)).double() / (length * (length + 1) / 2)
    torch.testing.assert_close(mask.density(), pairs)


@given(parts=st.lists(st.integers(1, 15), min_size=1, max_size=4), keep=st.integers(1, 9))
@few
def test_packed_padded_and_alone_are_the_same(parts, keep):
    """5: packed == one by one; left pad == right pad == none."""
    length, longest = sum(parts), max(parts)
    q, k, v = tensors(1, 2, 1, length, length, 16)
    score = torch.randn(1, 1, length)
    ids = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))[None]
    slots = Slots(torch.arange(length)[None], documents=Documents(ids))
    packed = attention(q, k, v, select(score, keep=keep, slots=slots), bias=score)
    first = 0
    for count in parts:
        own = slice(first, first + count)
        one = [x[:, :, own] for x in (q, k, v)]
        alone = attention(*one, Lifetimes.top(score[:, :, own], keep=keep), bias=score[:, :, own])
        torch.testing.assert_close(packed[:, :, own], alone, **CLOSE)
        for start in (0, longest - count):
            wide = [torch.randn(1, x.shape[1], longest, 16) for x in (q, k, v)]
            around = torch.randn(1, 1, longest)
            here = slice(start, start + count)
            for x, y in zip(wide, one, strict=True):
                x[:, :, here] = y
            around[:, :, here] = score[:, :, own]
            real = torch.zeros(1, longest, dtype=torch.bool)
            real[:, here] = True
            mask = select(around, keep=keep, slots=Slots(torch.arange(longest)[None], real))
            out = attention(*wide, mask, bias=around)
            torch.testing.assert_close(out[:, :, here], alone, **CLOSE)
            assert (out[:, :, : here.start] == 0).all()
            assert (out[:, :, here.stop :] == 0).all()
        first += count
