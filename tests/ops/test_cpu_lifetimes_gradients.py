"""Gradients of the cpu backend under lifetimes, against the reference's."""

import pytest
import torch
from attention_cases import tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from lifetimes_cases import MASKS, definition, expiries

from dynmask.masks import Lifetimes
from dynmask.ops import attention, choose, lifetimes_schedule


def gradients(impl, inputs, mask, bias, *, scale=None):
    """Of all inputs, for a loss in which output and log-sum-exp both count."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, bias) if x is not None]
    given_bias = None if bias is None else leaves[3]
    out, lse = attention(
        *leaves[:3], mask, bias=given_bias, scale=scale, impl=impl, return_lse=True
    )
    towards = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    loss = (out.double() * towards).sum() + 0.3 * lse[lse.isfinite()].double().square().sum()
    loss.backward()
    return [out, *(x.grad for x in leaves)]


def check(inputs, mask, bias=None, *, scale=None):
    """Hold outputs and gradients to the reference's in float64."""
    wide = [x.double() for x in inputs]
    wide_bias = None if bias is None else bias.double()
    expected = gradients("reference", wide, mask, wide_bias, scale=scale)
    found = gradients("cpu", inputs, mask, bias, scale=scale)
    likes = [inputs[0], *inputs, *([] if bias is None else [bias])]
    for got, truth, like in zip(found, expected, likes, strict=True):
        assert got.dtype == like.dtype
        eps = max(torch.finfo(x.dtype).eps for x in (inputs[0], like))
        assert (got.double() - truth).abs().max() <= 16 * eps * (1 + truth.abs().max())


@pytest.mark.parametrize("length", [5, 63, 65, 300])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_lengths_and_group_ratios(length, ratio):
    check(tensors(2, 2 * ratio, 2, length, length, 16), expiries(2, 2, length))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes(dtype):
    inputs = tensors(1, 4, 2, 150, 150, 32, dtype=dtype)
    check(inputs, expiries(1, 2, 150), torch.randn(1, 2, 150))


@pytest.mark.parametrize("q_len", [5, 33, 199])
def test_fewer_rows_than_keys(q_len):
    check(tensors(2, 4, 2, q_len, 200, 16), expiries(2, 2, 200))


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_one_expiry_for_all_rows_or_heads(batch, groups):
    bias = torch.randn(3, 2, 90)
    check(tensors(3, 4, 2, 90, 90, 16), expiries(batch, groups, 90), bias)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("q_len", [60, 301])
def test_masks(kind, q_len):
    check(tensors(2, 4, 2, q_len, 301, 16), MASKS[kind](301))


@pytest.mark.parametrize("tile", [32, 512])
@pytest.mark.parametrize("entries", [1, 1 << 20], ids=lambda n: f"at-most-{n}")
def test_any_tile_and_section(monkeypatch, tile, entries):
    monkeypatch.setattr(lifetimes_schedule, "_TILES", (tile,))
    monkeypatch.setattr(lifetimes_schedule, "_ENTRIES", entries)
    check(tensors(2, 4, 2, 333, 400, 16), expiries(2, 2, 400), torch.randn(2, 2, 400))


def test_bias_that_hides():
    bias = torch.randn(2, 2, 90)
    bias[:, 0, 60:] = -torch.inf
    check(tensors(2, 4, 2, 90, 90, 16), MASKS["top"](90), bias)


def test_scale_and_strides():
    q = torch.randn(2, 90, 16, 4).permute(0, 3, 1, 2)
    k = torch.randn(90, 2, 16, 4).permute(1, 3, 0, 2)[:, ::2]
    v = torch.randn(2, 2, 180, 32)[:, :, ::2, ::2]
    check((q, k, v), expiries(2, 2, 90), scale=0.75)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(5, 200),
    seed=st.integers(0, 2**31),
    ratio=st.integers(1, 3),
    biased=st.booleans(),
    data=st.data(),
)
def test_random_lifetimes(count, seed, ratio, biased, data):
    q_len = data.draw(st.integers(5, count))
    bias = torch.randn(1, 2, count) if biased else None
    check(tensors(1, 2 * ratio, 2, q_len, count, 8, seed=seed), expiries(1, 2, count, seed), bias)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in tensors(2, 2, 1, 8, 11, 2, dtype=torch.float64)]
    bias = torch.randn(2, 1, 11, dtype=torch.float64, requires_grad=True)
    mask = expiries(2, 1, 11, seed=3)

    def run(q, k, v, bias):
        out, lse = attention(q, k, v, mask, bias=bias, impl="cpu", return_lse=True)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(run, (*inputs, bias))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_goes_as_in_the_reference(bad):
    mask = expiries(2, 2, 120)
    q, k, v = tensors(2, 4, 2, 120, 120, 16)
    dead = ~definition(mask, 120, 1).any(2)
    assert dead.any()
    hidden = [x.masked_fill(dead[..., None], bad) for x in (k, v)]
    found, expected = (gradients(impl, (q, *hidden), mask, None) for impl in ("cpu", "reference"))
    assert found[0].isfinite().all()
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, equal_nan=True)


def test_nothing_of_the_size_of_the_logits_is_kept():
    length = 512
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 1, length, length, 8))
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(q, k, v, MASKS["window"](length), impl="cpu").sum().backward()
    assert kept
    assert max(kept) <= q.numel()


def test_auto_trains_by_tiles_where_keys_are_few():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 4096, 4096, 16))
    few = Lifetimes.top(torch.randn(1, 2, 4096), keep=256)
    assert choose(q, k, v, few) == "cpu"
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 64, 64, 16))
    assert choose(q, k, v, Lifetimes.top(torch.randn(1, 2, 64), keep=16)) == "sdpa"
