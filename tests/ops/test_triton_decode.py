"""The decode kernel, and what must be equal whatever kernel runs."""

import pytest
import torch
from attention_cases import lifetimes, padding
from kernel_cases import (
    GPU,
    MASKS,
    check,
    each_dtype,
    each_kind,
    inputs,
    needs_gpu,
    place,
    require_triton,
)

from dynmask.masks import Documents, Lifetimes
from dynmask.ops import attention

require_triton()

from dynmask.ops.triton import decode, operators  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
close = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture
def ran(monkeypatch):
    """Names of the kernels that attended, in order."""
    names = []

    def spy(name):
        run = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *args: names.append(name) or run(*args))

    spy("attend")
    spy("attend_decode")
    return names


@pytest.fixture(params=[1 << 20, 64], ids=["one split", "splits"])
def splits(request, monkeypatch):
    split(monkeypatch, request.param)


def split(monkeypatch, keys):
    """Let a program have so many keys."""
    monkeypatch.setattr(decode, "_LEAST_CHUNK", keys)


def check_decode(ran, q, k, v, mask, bias=None):
    check(q, k, v, mask, bias, gradients=False)
    assert ran == ["attend_decode"]


@each_kind
@pytest.mark.parametrize(
    ("q_len", "biased", "chunk"),
    [(1, True, 64), (3, False, 1 << 20), (30, True, 64)],
    ids=["q1-bias-splits", "q3", "q30-bias-splits"],
)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(ran, monkeypatch, kind, q_len, biased, chunk, dtype, dim):
    split(monkeypatch, chunk)
    q, k, v, bias = inputs(2, 4, 2, q_len, 270, dim, dtype=dtype, biased=biased)
    check_decode(ran, q, k, v, MASKS[kind](270), bias)


@each_dtype
@pytest.mark.parametrize("dim", [1, 16, 31, 64, 80, 128, 256])
def test_head_sizes(ran, splits, dim, dtype):
    q, k, v, bias = inputs(1, 4, 2, 2, 111, dim, dtype=dtype)
    check_decode(ran, q, k, v, lifetimes(1, 2, 111), bias)


@each_dtype
@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 8, 64])
def test_group_ratios(ran, splits, ratio, dtype):
    q, k, v, bias = inputs(2, 2 * ratio, 2, 1, 111, 16, dtype=dtype)
    check_decode(ran, q, k, v, lifetimes(2, 2, 111), bias)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 111, *([1000] if GPU else [])])
def test_lengths(ran, splits, length):
    q, k, v, bias = inputs(2, 4, 2, 1, length, 16)
    check_decode(ran, q, k, v, lifetimes(2, 2, length), bias)


@pytest.mark.parametrize("best", [slice(64), slice(-64, None)], ids=["best first", "best last"])
def test_more_splits_than_are_added_at_once(ran, best, monkeypatch):
    count = 64 * 37 + 5
    split(monkeypatch, 64)
    monkeypatch.setattr(decode, "processors", lambda device: 1000)
    q, k, v, bias = inputs(1, 2, 1, 2, count, 16)
    bias[..., best] += 3
    check_decode(ran, q, k, v, Lifetimes.top(torch.randn(1, 1, count), keep=300), bias)


@pytest.mark.parametrize("kind", ["listed", "any"])
def test_strides(ran, splits, kind):
    q, k, v, bias = inputs(2, 4, 2, 5, 111, 16)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    # A cache with room, in which nothing else may be read.
    k = torch.nn.functional.pad(k, (0, 0, 0, 40), value=torch.nan)[:, :, :-40]
    mask = MASKS[kind](111)
    strided = Lifetimes(mask.expiry.permute(2, 0, 1).contiguous().permute(1, 2, 0), mask.most)
    check_decode(ran, q, k, v, strided, bias.mT.contiguous().mT)


def test_hidden_keys_are_not_read(ran, splits):
    q, k, v, bias = place(*inputs(1, 2, 1, 2, 200, 16))
    (expiry,) = place(Lifetimes.top(torch.randn(1, 1, 200), keep=9).expiry)
    hidden = expiry[0, 0] <= 198
    dirty_k, dirty_v = (t.masked_fill(hidden[:, None], torch.nan) for t in (k, v))
    mask = Lifetimes(expiry)
    expected = attention(q, k, v, mask, bias=bias, impl="triton")
    got = attention(q, dirty_k, dirty_v, mask, bias=bias, impl="triton")
    assert torch.equal(got, expected)
    assert ran == ["attend_decode"] * 2


def test_bias_of_minus_infinity_empties_rows(splits):
    q, k, v, bias = place(*inputs(1, 4, 2, 3, 200, 16))
    (expiry,) = place(Lifetimes.window(200, window=20).expiry)
    bias[..., 150:] = -torch.inf
    out, lse = attention(q, k, v, Lifetimes(expiry), bias=bias, impl="triton", return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("q_len", "grad", "kernel"),
    [
        (32, False, "attend_decode"),
        (33, False, "attend"),
        (32, True, "attend"),
        (1, True, "attend"),
    ],
)
def test_few_rows_without_gradients_are_decoded(ran, q_len, grad, kernel):
    q, k, v, _ = place(*inputs(1, 2, 1, q_len, 70, 16))
    mask = Lifetimes.window(70, window=9).to(q.device)
    out = attention(q.requires_grad_(grad), k, v, mask, impl="triton")
    assert out.requires_grad == grad
    with torch.no_grad():
        attention(q, k, v, mask, impl="triton")
    assert ran == [kernel, "attend_decode" if q_len <= 32 else "attend"]


# What must be equal whatever runs. Rows enough for the gathering kernels, and few for decode's.


def attend(q, k, v, mask, bias):
    q, k, v, bias = place(q, k, v, bias)
    return attention(q, k, v, mask.to(q.device), bias=bias, impl="triton").cpu()


@pytest.mark.parametrize("keep", [30, 130], ids=["listed", "dense"])
@pytest.mark.parametrize("size", [1, 33, 70])
def test_chunks_give_the_rows_of_the_whole(keep, size):
    q, k, v, bias = inputs(1, 2, 1, 150, 150, 16)
    mask = Lifetimes.top(bias, keep=keep)
    whole = attend(q, k, v, mask, bias)
    for top in range(0, 150, size) if size > 1 else (0, 5, 127, 128, 149):
        here, past = slice(top, min(150, top + size)), slice(min(150, top + size))
        part = attend(
            q[:, :, here],
            k[:, :, past],
            v[:, :, past],
            Lifetimes(mask.expiry[..., past], keep),
            bias[..., past],
        )
        torch.testing.assert_close(part, whole[:, :, here], **close)


@pytest.mark.parametrize("keep", [30, 130], ids=["listed", "dense"])
def test_a_bounded_cache_attends_as_the_whole_one(keep):
    q, k, v, bias = inputs(1, 2, 1, 150, 150, 16)
    whole = attend(q, k, v, Lifetimes.top(bias, keep=keep), bias)
    kept = torch.empty(0, dtype=torch.int64)
    for top, last in ((0, 70), (70, 140), (140, 149), (149, 150)):
        slots = torch.cat([kept, torch.arange(top, last)])
        mask = Lifetimes.top(bias[..., slots], keep=keep)
        part = attend(q[:, :, top:last], k[:, :, slots], v[:, :, slots], mask, bias[..., slots])
        torch.testing.assert_close(part, whole[:, :, top:last], **close)
        kept = slots[mask.expiry[0, 0] >= len(slots)]


@pytest.mark.parametrize("keep", [30, 130], ids=["listed", "dense"])
@pytest.mark.parametrize("changed", [1, 129, 149])
def test_the_future_does_not_change_the_past(keep, changed):
    q, k, v, bias = inputs(1, 2, 1, 150, 150, 16)
    before = attend(q, k, v, Lifetimes.top(bias, keep=keep), bias)
    for t in (k, v):
        t[:, :, changed:] += 3
    bias[..., changed:] += 5  # Enough to be kept.
    after = attend(q, k, v, Lifetimes.top(bias, keep=keep), bias)
    torch.testing.assert_close(after[:, :, :changed], before[:, :, :changed], **close)
    assert not torch.allclose(after[:, :, changed:], before[:, :, changed:])


@pytest.mark.parametrize("keep", [20, 150], ids=["listed", "dense"])
def test_packed_documents_are_attended_one_by_one(keep):
    ids = torch.tensor([[0] * 40 + [1] + [2] * 129])
    q, k, v, bias = inputs(1, 2, 1, 170, 170, 16)
    out = attend(q, k, v, Lifetimes.top(bias, keep=keep, documents=Documents(ids)), bias)
    for first, last in ((0, 40), (40, 41), (41, 170)):
        at = slice(first, last)
        mask = Lifetimes.top(bias[..., at], keep=keep)
        one = attend(q[:, :, at], k[:, :, at], v[:, :, at], mask, bias[..., at])
        torch.testing.assert_close(out[:, :, at], one, **close)


@pytest.mark.parametrize("keep", [20, 150], ids=["listed", "dense"])
@pytest.mark.parametrize("start", [0, 3, 30], ids=lambda n: f"{n} left")
def test_padding_changes_nothing(keep, start):
    q, k, v, bias = inputs(1, 2, 1, 130, 130, 16)
    expected = attend(q, k, v, Lifetimes.top(bias, keep=keep), bias)
    wide = [torch.nn.functional.pad(t, (0, 0, start, 30 - start), value=7.0) for t in (q, k, v)]
    wide_bias = torch.nn.functional.pad(bias, (start, 30 - start), value=9.0)
    mask = Lifetimes.top(wide_bias, keep=keep, padding=padding((start, start + 130)))
    out = attend(*wide, mask, wide_bias)
    torch.testing.assert_close(out[:, :, start : start + 130], expected, **close)
    assert (out[:, :, :start] == 0).all()
    assert (out[:, :, start + 130 :] == 0).all()


@pytest.mark.parametrize("q_len", [1, 130])
@pytest.mark.parametrize("mask", ["top", "window"])
def test_keeping_all_is_causal(mask, q_len):
    q, k, v, _ = inputs(2, 4, 2, q_len, 130, 16)
    every = {
        "top": Lifetimes.top(torch.randn(2, 2, 130), keep=130),
        "window": Lifetimes.window(130, window=130),
    }[mask]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(2, 1),
        v.repeat_interleave(2, 1),
        attn_mask=torch.ones(130, 130, dtype=torch.bool).tril()[-q_len:],
    )
    torch.testing.assert_close(attend(q, k, v, every, None), expected, **close)


@needs_gpu
@pytest.mark.parametrize("count", [300, 70_000], ids=["one split", "splits"])
def test_a_captured_graph_follows_new_contents(count):
    torch.use_deterministic_algorithms(False)
    q, k, v, bias = place(*inputs(2, 8, 2, 1, count, 64, dtype=torch.bfloat16))
    score = torch.randn(2, 2, 2, count, device=q.device)
    first, second = (Lifetimes.top(s, keep=100).expiry for s in score)
    mask = Lifetimes(first.clone(), 100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention(q, k, v, mask, bias=bias, impl="triton")  # Compiles.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, mask, bias=bias, impl="triton")
    for expiry in (second, first, torch.zeros_like(first)):
        mask.expiry.copy_(expiry)
        q.normal_()
        graph.replay()
        expected = attention(q, k, v, Lifetimes(expiry), bias=bias, impl="triton")
        assert torch.equal(out, expected)
    assert (out == 0).all()
