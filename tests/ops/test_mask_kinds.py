"""Lifetimes and Blocks through every backend that runs them without a kernel of its own."""

import pytest
import torch
from attention_cases import (
    blocks,
    lifetimes,
    naive_attention,
    naive_blocks,
    naive_lifetimes,
    padding,
    tensors,
)
from features import lacks_flex, needs

from dynmask.masks import Blocks, Documents, Lifetimes
from dynmask.ops import attention, reference, sdpa

each_impl = pytest.mark.parametrize("impl", ["reference", "sdpa", "flex", "auto"], indirect=True)
close = {"rtol": 2e-5, "atol": 2e-6}
RUNS = ((7, 60), (0, 41))

MASKS = {
    "top": lambda n: lifetimes(2, 2, n),
    "top, one head": lambda n: lifetimes(2, 1, n),
    "window": lambda n: Lifetimes.window(n, window=5, sinks=2),
    "padded top": lambda n: lifetimes(2, 2, n) & padding(*RUNS),
    "packed top": lambda n: lifetimes(1, 2, n) & Documents(torch.arange(n).expand(2, n) // 17),
    "nothing": lambda n: Lifetimes(torch.zeros(1, 1, n, dtype=torch.int32)),
    "blocks": lambda n: blocks(2, 2, n),
    "blocks, one head": lambda n: blocks(1, 1, n, block=5, tile=16),
    "padded blocks": lambda n: blocks(1, 2, n) & padding(*RUNS),
}
each_mask = pytest.mark.parametrize("kind", MASKS)


@pytest.fixture
def impl(request):
    if request.param == "flex":
        needs(lacks_flex)
    return request.param


def naive(mask, q_len, k_len):
    if isinstance(mask, Blocks):
        return naive_blocks(mask, q_len, k_len)
    return naive_lifetimes(mask, q_len)


@each_impl
@each_mask
@pytest.mark.parametrize("q_len", [1, 23, 60], ids=["decode", "chunk", "prefill"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_the_mask_is_computed(impl, kind, q_len, biased):
    mask = MASKS[kind](60)
    q, k, v = tensors(2, 6, 2, q_len, 60, 16)
    bias = torch.randn(2, 2, 60) if biased else None
    seen = naive(mask, q_len, 60)
    assert seen.equal(mask.dense(q_len, 60))
    out = attention(q, k, v, mask, bias=bias, impl=impl)
    expected = naive_attention(q, k, v, seen, bias)
    torch.testing.assert_close(out, expected.float(), **close)
    assert (out[~per_head(seen)] == 0).all()


def per_head(seen):
    """Which rows of ``[2, 6, Q]`` see a key."""
    some = seen.any(-1)
    return some.repeat_interleave(6 // some.shape[1], 1).expand(2, 6, -1)


@pytest.mark.parametrize("impl", ["reference", "flex"], indirect=True)
@each_mask
def test_log_sum_exp(impl, kind):
    mask = MASKS[kind](60)
    q, k, v = tensors(2, 6, 2, 41, 60, 16)
    bias = torch.randn(2, 2, 60)
    seen = naive(mask, 41, 60)
    out, lse = attention(q, k, v, mask, bias=bias, impl=impl, return_lse=True)
    logits = q @ k.repeat_interleave(3, 1).transpose(2, 3) / 4
    logits += bias.repeat_interleave(3, 1)[:, :, None]
    heads = seen.repeat_interleave(6 // seen.shape[1], 1)
    expected = logits.masked_fill(~heads, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)
    assert (lse == -torch.inf).equal(~per_head(seen))
    torch.testing.assert_close(out, naive_attention(q, k, v, seen, bias).float(), **close)


@each_impl
@pytest.mark.parametrize("kind", ["top", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(impl, kind, dtype):
    mask = MASKS[kind](65)
    q, k, v = tensors(2, 4, 2, 65, 65, 31, dtype=dtype)
    seen = naive(mask, 65, 65)
    truth = naive_attention(q, k, v, seen)
    eager = naive_attention(q, k, v, seen, dtype=dtype)
    out = attention(q, k, v, mask, impl=impl)
    assert out.dtype == dtype
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = 2 * (eager.double() - truth).abs().max() + 16 * eps
    assert (out.double() - truth).abs().max() <= allowed


@each_impl
def test_bias_of_minus_infinity_empties_rows(impl):
    q, k, v = tensors(1, 2, 1, 40, 40, 16)
    bias = torch.zeros(1, 1, 40)
    bias[..., 5:] = -torch.inf
    out = attention(q, k, v, Lifetimes.window(40, window=3), bias=bias, impl=impl)
    assert (out[:, :, 7:] == 0).all()
    assert (out[:, :, :7] != 0).all()


@each_impl
def test_keep_all_is_causal(impl):
    q, k, v = tensors(1, 4, 2, 65, 65, 16)
    expected = attention(q, k, v, impl="reference")
    every = torch.arange(9).expand(1, 1, 5, 9).int()
    all_blocks = Blocks(every, torch.full((1, 1, 5), 9, dtype=torch.int32), block=8, tile=13)
    for mask in (lifetimes(1, 2, 65, keep=65), all_blocks):
        torch.testing.assert_close(attention(q, k, v, mask, impl=impl), expected, **close)


@each_impl
def test_a_bounded_cache_attends_as_the_whole_one(impl):
    keep, count, size = 6, 50, 13
    q, k, v = tensors(1, 4, 1, count, count, 16)
    score = torch.randn(1, 1, count)
    whole = attention(q, k, v, Lifetimes.top(score, keep=keep), bias=score, impl=impl)
    kept = torch.empty(0, dtype=torch.int64)
    for top in range(0, count, size):
        slots = torch.cat([kept, torch.arange(top, min(top + size, count))])
        mask = Lifetimes.top(score[..., slots], keep=keep)
        part = attention(
            q[:, :, top : top + size],
            k[:, :, slots],
            v[:, :, slots],
            mask,
            bias=score[..., slots],
            impl=impl,
        )
        torch.testing.assert_close(part, whole[:, :, top : top + size], **close)
        kept = slots[mask.expiry[0, 0] >= len(slots)]


@each_impl
def test_packed_documents_are_attended_one_by_one(impl):
    ids = torch.tensor([[0] * 11 + [1] + [2] * 30])
    q, k, v = tensors(1, 4, 2, 42, 42, 16)
    score = torch.randn(1, 2, 42)
    mask = Lifetimes.top(score, keep=5, documents=Documents(ids))
    out = attention(q, k, v, mask, bias=score, impl=impl)
    for first, last in ((0, 11), (11, 12), (12, 42)):
        at = slice(first, last)
        alone = Lifetimes.top(score[..., at], keep=5)
        one = attention(
            q[:, :, at], k[:, :, at], v[:, :, at], alone, bias=score[..., at], impl="reference"
        )
        torch.testing.assert_close(out[:, :, at], one, **close)


@pytest.mark.parametrize("cells", [1, 3000])
@pytest.mark.parametrize("kind", ["padded top", "padded blocks"])
def test_sdpa_in_blocks_of_rows(monkeypatch, cells, kind):
    mask = MASKS[kind](60)
    q, k, v = tensors(2, 4, 2, 45, 60, 16)
    bias = torch.randn(2, 2, 60)
    expected = [attention(q, k, v, mask, bias=b, impl="reference") for b in (None, bias)]
    monkeypatch.setattr(sdpa, "_CPU_CELLS", cells)
    for b, whole in zip((None, bias), expected, strict=True):
        torch.testing.assert_close(attention(q, k, v, mask, bias=b, impl="sdpa"), whole, **close)


@pytest.mark.parametrize("cells", [1 << 24, 48], ids=["one-block", "recomputed-blocks"])
@pytest.mark.parametrize("kind", ["top", "blocks"])
def test_reference_passes_gradcheck(monkeypatch, cells, kind):
    monkeypatch.setattr(reference, "_CELLS", cells)
    q, k, v = tensors(2, 2, 1, 5, 6, 2, dtype=torch.float64)
    bias = torch.randn(2, 1, 6, dtype=torch.float64)
    some = padding((2, 6), (0, 5))
    mask = {"top": lifetimes(2, 1, 6, keep=2), "blocks": blocks(2, 1, 6, block=2, tile=3)}[kind]

    def run(q, k, v, bias):
        out, lse = attention(q, k, v, mask & some, bias=bias, impl="reference", return_lse=True)
        # No finite difference exists at -inf.
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (q, k, v, bias)))


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("kind", ["padded top", "padded blocks", "nothing"])
def test_gradients(impl, kind):
    mask = MASKS[kind](60)
    inputs = [t.requires_grad_() for t in tensors(2, 4, 2, 45, 60, 16)]
    bias = torch.randn(2, 2, 60, requires_grad=True)
    seen = naive(mask, 45, 60)
    weight = torch.randn(2, 4, 45, 16)
    (attention(*inputs, mask, bias=bias, impl=impl) * weight).sum().backward()
    got = [t.grad for t in (*inputs, bias)]
    copies = [t.detach().clone().requires_grad_() for t in (*inputs, bias)]
    logits = copies[0] @ copies[1].repeat_interleave(2, 1).transpose(2, 3) / 4
    logits = logits + copies[3].repeat_interleave(2, 1)[:, :, None]
    heads = seen.repeat_interleave(4 // seen.shape[1], 1).expand(2, 4, -1, -1)
    some = heads.any(-1, keepdim=True)
    weights = logits.masked_fill(~(heads | ~some), -torch.inf).softmax(-1) * some
    ((weights @ copies[2].repeat_interleave(2, 1)) * weight).sum().backward()
    for mine, copy in zip(got, copies, strict=True):
        torch.testing.assert_close(mine, copy.grad, rtol=1e-4, atol=1e-5)
    assert (got[0][~some[..., 0]] == 0).all()
