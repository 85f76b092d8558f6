"""What the flex backend tells torch: which blocks hold anything, and which are full."""

import pytest
import torch
from attention_cases import blocks, lifetimes, naive_attention, padding, stripes, tensors
from features import lacks_flex, needs

from dynmask.masks import Lifetimes, Stripes
from dynmask.ops import attention, supports
from dynmask.ops.flex_blocks import block_mask
from dynmask.ops.rows import causal_rows


def runs(length):
    return padding((7, length), (0, length * 2 // 3))


MASKS = {
    "causal": lambda n: None,
    "top": lambda n: lifetimes(2, 2, n),
    "padded top": lambda n: lifetimes(1, 2, n) & runs(n),
    "window": lambda n: Lifetimes.window(n, window=20, sinks=9),
    "blocks": lambda n: blocks(2, 2, n),
    "many small blocks": lambda n: blocks(1, 1, n, block=3, tile=2),
    "few large blocks": lambda n: blocks(1, 2, n, block=40, tile=33),
    "padded blocks": lambda n: blocks(1, 2, n) & runs(n),
    "stripes": lambda n: stripes(4, n, full=(1,)),
    "corner": lambda n: stripes(4, n, corner=13),
    "padded stripes": lambda n: stripes(4, n, corner=13, full=(1,)) & runs(n),
    "streaming": lambda n: Stripes.streaming(4, sinks=9, window=30),
}
each_mask = pytest.mark.parametrize("kind", MASKS)


def listed(number, order):
    """Blocks as ``[B, H, Tq, Tk]`` bool from counts and indices."""
    place = torch.arange(order.shape[-1])
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(
        -1, order.long(), place < number[..., None]
    )


def tiles(seen, size):
    """``[B, H, Tq, size, Tk, size]``, NaN where there is no row or key."""
    rows, keys = -seen.shape[2] % size, -seen.shape[3] % size
    cells = torch.nn.functional.pad(seen.float(), (0, keys, 0, rows), value=torch.nan)
    return cells.unflatten(3, (-1, size)).unflatten(2, (-1, size))


@each_mask
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("q_len", [1, 23, 60])
def test_blocks_hold_what_the_mask_shows(kind, size, q_len):
    mask = MASKS[kind](60)
    q, k, _ = tensors(2, 4, 2, q_len, 60, 16)
    made = block_mask(mask, q, k, size=size)
    partial = listed(made.kv_num_blocks, made.kv_indices).expand(2, 4, -1, -1)
    full = listed(made.full_kv_num_blocks, made.full_kv_indices).expand(2, 4, -1, -1)
    assert not (partial & full).any()
    seen = causal_rows(60 - q_len, 60, 60, q.device) if mask is None else mask.dense(q_len, 60)
    seen = seen.repeat_interleave(4 // seen.shape[1], 1).expand(2, 4, -1, -1)
    cells = tiles(seen, size)
    shown = (cells == 1).any(5).any(3)
    filled = ~(cells == 0).any(5).any(3)
    assert (shown <= (partial | full)).all()
    assert (full <= filled).all()
    # Only what the diagonal, padding or a corner cut may be listed in vain.
    if kind in ("causal", "window", "stripes", "streaming"):
        assert (partial | full).equal(shown)
    # Cut-off blocks are never full, and columns and offsets may fill a block together.
    whole = (torch.arange(0, q_len, size) + size <= q_len)[:, None] & (
        torch.arange(0, 60, size) + size <= 60
    )
    if kind in ("streaming", "stripes", "corner", "padded stripes"):
        assert (full <= filled & whole).all()
        assert full.any() or (kind, size, q_len) != ("streaming", 8, 60)
    else:
        assert full.equal(filled & whole)


@each_mask
def test_the_predicate_is_the_mask(kind):
    mask = MASKS[kind](60)
    q, k, _ = tensors(2, 4, 2, 23, 60, 16)
    seen = causal_rows(37, 60, 60, q.device) if mask is None else mask.dense(23, 60)
    seen = seen.repeat_interleave(4 // seen.shape[1], 1).expand(2, 4, -1, -1)
    places = torch.meshgrid(*(torch.arange(n) for n in seen.shape), indexing="ij")
    assert block_mask(mask, q, k).mask_mod(*places).equal(seen)


@pytest.mark.parametrize("q_len", [1, 2, 50], ids=lambda n: f"q{n}")
@pytest.mark.parametrize("kind", ["causal", "corner", "padded stripes"])
def test_stripes(kind, q_len):
    needs(lacks_flex)
    mask = MASKS[kind](60)
    q, k, v = tensors(2, 4, 2, q_len, 60, 16)
    bias = torch.randn(2, 2, 60)
    for extra in (None, bias):
        out, lse = attention(q, k, v, mask, bias=extra, impl="flex", return_lse=True)
        truth, true_lse = attention(q, k, v, mask, bias=extra, impl="reference", return_lse=True)
        torch.testing.assert_close(out, truth, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(lse, true_lse, rtol=2e-5, atol=2e-6)


def test_any_strides_and_scale():
    needs(lacks_flex)
    q = torch.randn(2, 50, 16, 4).permute(0, 3, 1, 2)
    k = torch.randn(50, 2, 16, 4).permute(1, 3, 0, 2)[:, ::2]
    v = torch.randn(2, 2, 100, 32)[:, :, ::2, ::2]
    mask = lifetimes(2, 2, 50)
    out = attention(q, k, v, mask, scale=0.5, impl="flex")
    expected = naive_attention(q * 2, k, v, mask.dense(50))
    torch.testing.assert_close(out, expected.float(), rtol=2e-5, atol=2e-6)


def test_it_says_what_it_cannot_do():
    needs(lacks_flex)
    q, k, v = tensors(1, 4, 2, 8, 8, 16)
    mask = lifetimes(1, 2, 8)
    q.requires_grad_()
    assert "no backward" in supports("flex", q, k, v, mask)
    with torch.no_grad():
        assert supports("flex", q, k, v, mask) is None
        out = attention(q, k, v, mask, impl="flex")
    assert not out.requires_grad
    assert "CUDA or CPU" in supports("flex", *(t.to("meta") for t in (q, k, v)))
    assert "no backward" in supports(
        "flex", q.detach(), k, v, bias=torch.zeros(1, 2, 8).requires_grad_()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_mask
@pytest.mark.parametrize("q_len", [1, 170, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_with_gradients(kind, q_len, dtype):
    needs(lacks_flex)
    mask = MASKS[kind](300)
    mask = None if mask is None else mask.to("cuda")
    results = []
    for impl, work in (("flex", dtype), ("reference", torch.float64)):
        q, k, v = (t.to(dtype).to("cuda", work) for t in tensors(2, 4, 2, q_len, 300, 32))
        bias = torch.linspace(-1, 1, 1200, device="cuda").view(2, 2, 300)
        inputs = [t.requires_grad_() for t in (q, k, v, bias)]
        out, lse = attention(q, k, v, mask, bias=bias, impl=impl, return_lse=True)
        (out * torch.linspace(-1, 1, 32, device="cuda", dtype=work)).sum().backward()
        results.append([out, lse, *(t.grad for t in inputs)])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)
