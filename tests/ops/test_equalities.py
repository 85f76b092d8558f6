"""The equalities that DESIGN.md promises."""

import pytest
import torch
from attention_cases import padding, stripes, tensors
from torch.nn.functional import scaled_dot_product_attention

from dynmask.masks import Stripes
from dynmask.ops import attention

each_impl = pytest.mark.parametrize("impl", ["reference", "sdpa", "cpu", "auto"])
close = {"rtol": 2e-5, "atol": 2e-6}


def keep_all(heads: int, length: int) -> dict[str, Stripes]:
    every = torch.arange(length)
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(heads, dtype=torch.bool)
    return {
        "full heads": Stripes.causal(heads),
        "every column": Stripes((every,) * heads, (zero,) * heads, none),
        "every offset": Stripes((zero[:0],) * heads, (every,) * heads, none),
        "both": Stripes((every,) * heads, (every,) * heads, none),
    }


@each_impl
@pytest.mark.parametrize("kind", keep_all(1, 1))
@pytest.mark.parametrize("length", [1, 111, 600])
def test_keep_all_is_sdpa(impl, kind, length):
    q, k, v = tensors(2, 4, 2, length, length, 32)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = attention(q, k, v, keep_all(4, length)[kind], impl=impl)
    torch.testing.assert_close(out, expected, **close)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
def test_no_mask_is_causal_aligned_bottom_right(impl):
    q, k, v = tensors(1, 4, 2, 70, 70, 32)
    whole = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for rows in (1, 20, 70):
        out = attention(q[:, :, -rows:], k, v, impl=impl)
        torch.testing.assert_close(out, whole[:, :, -rows:], **close)


@each_impl
def test_decode_is_the_last_prefill_row(impl):
    q, k, v = tensors(2, 4, 2, 200, 200, 32)
    mask = stripes(4, 200, corner=60, full=(1,))
    whole = attention(q, k, v, mask, impl=impl)
    for n in (1, 59, 60, 61, 128, 200):
        out = attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], mask, impl=impl)
        torch.testing.assert_close(out, whole[:, :, n - 1 : n], **close)


@each_impl
@pytest.mark.parametrize("size", [2, 37, 64])
def test_chunked_is_whole_prefill(impl, size):
    q, k, v = tensors(1, 4, 2, 150, 150, 32)
    mask = stripes(4, 150, corner=50, full=(3,))
    whole = attention(q, k, v, mask, impl=impl)
    parts = [
        attention(q[:, :, a : a + size], k[:, :, : a + size], v[:, :, : a + size], mask, impl=impl)
        for a in range(0, 150, size)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, **close)


@each_impl
@pytest.mark.parametrize("q_len", [None, 1, 30], ids=["prefill", "decode", "chunk"])
def test_left_and_right_padding_change_nothing(impl, q_len):
    length, slots = 90, 120
    q, k, v = tensors(1, 4, 2, length, length, 32)
    mask = stripes(4, length, corner=20, full=(1,))
    alone = attention(q, k, v, mask, impl=impl)[0]

    def shifted(t, start):
        out = torch.randn(t.shape[1], slots, t.shape[3])
        out[:, start : start + length] = t[0]
        return out

    starts = (0, 11, slots - length)
    qs, ks, vs = (torch.stack([shifted(t, s) for s in starts]) for t in (q, k, v))
    padded = mask & padding(*((s, s + length) for s in starts))
    q_len = q_len or slots
    out = attention(qs[:, :, -q_len:], ks, vs, padded, impl=impl)
    for b, start in enumerate(starts):
        rows = torch.arange(slots - q_len, slots) - start
        real = (rows >= 0) & (rows < length)
        assert (out[b, :, ~real] == 0).all()
        torch.testing.assert_close(out[b, :, real], alone[:, rows[real]], **close)


@each_impl
def test_the_future_never_changes_the_past(impl):
    q, k, v = tensors(1, 4, 2, 130, 130, 32)
    mask = stripes(4, 130, corner=20, full=(1,))
    before = attention(q, k, v, mask, impl=impl)
    for cut in (1, 64, 100):
        q2, k2, v2 = (t.clone() for t in (q, k, v))
        for t in (q2, k2, v2):
            t[:, :, cut:] = 1e3
        after = attention(q2, k2, v2, mask, impl=impl)
        torch.testing.assert_close(after[:, :, :cut], before[:, :, :cut], **close)
        assert not torch.allclose(after[:, :, cut:], before[:, :, cut:])


@each_impl
def test_results_are_the_same_every_time(impl):
    q, k, v = tensors(1, 4, 2, 300, 300, 32)
    mask = stripes(4, 300)
    assert attention(q, k, v, mask, impl=impl).equal(attention(q, k, v, mask, impl=impl))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("corner", [0, 40])
def test_what_is_hidden_may_hold_anything(impl, value, which, corner):
    inputs = dict(zip("qkv", tensors(2, 4, 2, 130, 130, 32), strict=True))
    mask = stripes(4, 130, corner=corner, full=(1,)) & padding((0, 130), (9, 130))
    before = attention(**inputs, mask=mask, impl=impl)
    slots = torch.tensor([3, 64, 120])
    inputs[which] = inputs[which].index_fill(2, slots, value)
    after = attention(**inputs, mask=mask, impl=impl)
    if which == "q":
        clean = torch.ones(130, dtype=torch.bool).index_fill(0, slots, False).expand(2, 4, -1)
    else:
        clean = ~mask.dense(130)[..., slots].any(-1)
    torch.testing.assert_close(after[clean], before[clean], **close)
    real = mask.dense(130).any(-1)
    assert not after[real & ~clean].isfinite().all(-1).any()
    # Decode of the last row, every head whose mask hides the slots.
    if which != "q":
        inputs["q"] = inputs["q"][:, :, -1:]
        last = attention(**inputs, mask=mask, impl=impl)[:, :, 0]
        torch.testing.assert_close(last[clean[..., -1]], before[:, :, -1][clean[..., -1]], **close)


def test_padding_may_hold_anything_in_decode():
    q, k, v = tensors(2, 4, 2, 1, 150, 32)
    mask = stripes(4, 150, full=(1, 2)) & padding((0, 150), (30, 150))
    before = attention(q, k, v, mask, impl="cpu")
    k[1, :, :30], v[1, :, :30] = float("nan"), float("inf")
    torch.testing.assert_close(attention(q, k, v, mask, impl="cpu"), before, **close)
