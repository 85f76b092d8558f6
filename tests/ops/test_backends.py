"""Every backend computes the mask it was given."""

import pytest
import torch
from attention_cases import naive_attention, naive_mask, padding, stripes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.masks import Stripes
from dynmask.ops import attention, sdpa
from dynmask.ops.rows import dense_rows

IMPLS = ["reference", "sdpa", "cpu"]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def check(impl, q, k, v, mask, bias=None):
    """Hold the backend to twice the error of same-dtype eager."""
    seen = mask.dense(q.shape[2], k.shape[2])
    truth = naive_attention(q, k, v, seen, bias)
    eager = naive_attention(q, k, v, seen, bias, dtype=q.dtype)
    out = attention(q, k, v, mask, bias=bias, impl=impl)
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    # In float64 the truth is no better than what it judges.
    slack = 16 * torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    allowed = 2 * (eager.double() - truth).abs().max() + slack
    assert (out.double() - truth).abs().max() <= allowed


@each_impl
@pytest.mark.parametrize("length", [1, 63, 65, 111, 1000])
def test_lengths(impl, length):
    q, k, v = tensors(1, 4, 2, length, length, 32)
    check(impl, q, k, v, stripes(4, length, full=(1,)))


@each_impl
@pytest.mark.parametrize("dim", [16, 31, 80, 256])
def test_head_sizes(impl, dim):
    q, k, v = tensors(2, 2, 2, 65, 65, dim)
    check(impl, q, k, v, stripes(2, 65))


@each_impl
@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
def test_group_ratios(impl, ratio):
    q, k, v = tensors(1, 2 * ratio, 2, 111, 111, 16)
    check(impl, q, k, v, stripes(2 * ratio, 111, full=(ratio,)))


@each_impl
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("q_len", [1, 150], ids=["decode", "prefill"])
def test_dtypes(impl, dtype, q_len):
    q, k, v = tensors(1, 4, 2, q_len, 150, 64, dtype=dtype)
    check(impl, q, k, v, stripes(4, 150, full=(3,)))


@each_impl
@pytest.mark.parametrize("q_len", [1, 3, 30, 120], ids=lambda n: f"q{n}")
@pytest.mark.parametrize("corner", [0, 40, 200])
def test_corner_and_fewer_rows_than_keys(impl, q_len, corner):
    q, k, v = tensors(1, 4, 2, q_len, 120, 16)
    check(impl, q, k, v, stripes(4, 120, corner=corner, full=(0,)))


@each_impl
@pytest.mark.parametrize("q_len", [1, 50], ids=["decode", "prefill"])
def test_bias(impl, q_len):
    q, k, v = tensors(2, 4, 2, q_len, 50, 16)
    bias = torch.randn(2, 2, 50)
    check(impl, q, k, v, stripes(4, 50, full=(1,), corner=7), bias)
    check(impl, q, k, v, stripes(4, 50) & padding((3, 50), (0, 50)), bias)


@each_impl
@pytest.mark.parametrize("q_len", [1, 2, 50])
def test_any_strides(impl, q_len):
    q = torch.randn(2, q_len, 16, 4).permute(0, 3, 1, 2)
    k = torch.randn(50, 2, 16, 4).permute(1, 3, 0, 2)[:, ::2]
    v = torch.randn(2, 2, 100, 32)[:, :, ::2, ::2]
    check(impl, q, k, v, stripes(4, 50, full=(1,)))


LAYOUTS = {
    "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a longer cache": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
    "repeated": lambda t: t[:1, :1].expand(t.shape),
    "rows with gaps": lambda t: torch.cat([t, t[..., :3]], 3)[..., : t.shape[3]],
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("q_len", [1, 50], ids=["decode", "prefill"])
def test_cache_layouts(impl, layout, q_len):
    q, k, v = tensors(2, 4, 2, q_len, 50, 16)
    k, v = LAYOUTS[layout](k), LAYOUTS[layout](v)
    assert not k.is_contiguous()
    check(impl, q, k, v, stripes(4, 50, full=(1,)))


@each_impl
@pytest.mark.parametrize("q_len", [1, 4, 70])
def test_empty_rows_give_zero_and_minus_infinity(impl, q_len):
    mask = stripes(4, 70, full=(2,)) & padding((70, 70), (10, 40), (0, 70))
    q, k, v = tensors(3, 4, 2, q_len, 70, 16)
    check(impl, q, k, v, mask)
    seen = naive_mask(mask, q_len, 70)
    out = attention(q, k, v, mask, impl=impl)
    assert (out[~seen.any(-1)] == 0).all()
    if impl != "sdpa":
        _, lse = attention(q, k, v, mask, impl=impl, return_lse=True)
        logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@each_impl
@pytest.mark.parametrize("q_len", [1, 40])
def test_bias_of_minus_infinity_empties_rows(impl, q_len):
    q, k, v = tensors(1, 2, 1, q_len, 40, 16)
    bias = torch.zeros(1, 1, 40)
    bias[..., 5:] = -torch.inf
    mask = Stripes.streaming(2, sinks=0, window=3)
    check(impl, q, k, v, mask, bias)
    assert (attention(q, k, v, mask, bias=bias, impl=impl)[:, :, -1] == 0).all()


@each_impl
def test_scale(impl):
    q, k, v = tensors(1, 2, 1, 33, 33, 16)
    mask = stripes(2, 33)
    expected = attention(q * 3, k, v, mask, impl="reference")
    torch.testing.assert_close(attention(q, k, v, mask, scale=0.75, impl=impl), expected)


@settings(max_examples=40, deadline=None)
@given(
    columns=st.sets(st.integers(0, 300), max_size=60),
    lone=st.sets(st.integers(0, 300), max_size=6),
    window=st.integers(1, 300),
    holes=st.integers(1, 40),
    k_len=st.integers(1, 290),
    data=st.data(),
)
def test_random_stripes(columns, lone, window, holes, k_len, data):
    q_len = data.draw(st.integers(1, k_len))
    offsets = {0, *lone, *range(0, window, holes)}
    mask = Stripes(
        (torch.tensor(sorted(columns), dtype=torch.int64),),
        (torch.tensor(sorted(offsets), dtype=torch.int64),),
        torch.zeros(1, dtype=torch.bool),
    )
    q, k, v = tensors(1, 1, 1, q_len, k_len, 16)
    check("cpu", q, k, v, mask)


@pytest.mark.parametrize("corner", [0, 50])
@pytest.mark.parametrize("runs", [None, ((0, 300), (40, 300), (300, 300), (0, 120))], ids=str)
@pytest.mark.parametrize("k_len", [1, 111, 300])
def test_dense_rows_are_the_mask(corner, runs, k_len):
    mask = stripes(4, 300, corner=corner, full=(2,))
    if runs is not None:
        mask = mask & padding(*runs)
    whole = mask.dense(k_len)
    for first, last in ((0, k_len), (k_len - 1, k_len), (k_len // 3, k_len // 2 + 1)):
        assert dense_rows(mask, first, last, k_len).equal(whole[:, :, first:last])


@pytest.mark.parametrize("cells", [1, 3000])
def test_sdpa_in_blocks_of_rows(monkeypatch, cells):
    monkeypatch.setattr(sdpa, "_CPU_CELLS", cells)
    q, k, v = tensors(2, 4, 2, 65, 80, 16)
    mask = stripes(4, 80, corner=30, full=(1,)) & padding((7, 80), (0, 50))
    check("sdpa", q, k, v, mask)
    check("sdpa", q, k, v, mask, torch.randn(2, 2, 80))
