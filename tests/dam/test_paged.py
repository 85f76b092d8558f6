"""Decode steps over blocks of keys, against dense definitions written out here."""

from __future__ import annotations

import math

import pytest
import torch

from dynmask.dam.dynamic import Dynamic
from dynmask.dam.paged import PagedKeys
from dynmask.dam.paged_costs import page_costs, page_stats
from dynmask.dam.quantized import Quantized

B, G, H, D = 2, 2, 6, 8
BLOCK, NEAR = 4, 6
SETTINGS = Dynamic(coverage=0.9, tile=4, block=BLOCK, near=NEAR, landmarks=2, few=2, shortest=9)


def tensors(length, seed=0, sharp=2.0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, H, length, D), (B, G, length, D), (B, G, length, D)
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return q * sharp, k, v


def attended(q, k, v, real, coverage):
    """One row at the end of one kv head's keys: ``q [R, D]``, ``k [K, D]``, by definition."""
    length = len(k)
    logits = (q @ k.T * D**-0.5).masked_fill(~real, -torch.inf)
    far = max(0, length - 1 - NEAR) // BLOCK
    at = [slice(j * BLOCK, j * BLOCK + BLOCK) for j in range(far)]
    whole = [bool(real[s].all()) for s in at]
    counted = logits.clone()
    for s, is_whole in zip(at, whole, strict=True):
        if not is_whole:
            counted[:, s] = -torch.inf
    total = counted.logsumexp(-1, keepdim=True)
    p = (logits - total).exp()
    summary = [k[s].mean(0) @ q.T * D**-0.5 for s in at]
    cost = []
    for s, mean, is_whole in zip(at, summary, whole, strict=True):
        a = (mean[:, None] - total).exp()
        cost.append(float((p[:, s] - a).square().sum(1).mean()) if is_whole else 2.0)
    left, budget = set(), (1 - coverage) ** 2
    for j in sorted(range(far), key=lambda j: cost[j]):
        budget -= cost[j]
        if budget < 0:
            break
        left.add(j)
    pieces, values, seen = [], [], 0
    for j, s in enumerate(at):
        if j in left:
            pieces.append(summary[j][:, None] + math.log(BLOCK))
            values.append(v[s].mean(0, keepdim=True))
            seen += 1
        else:
            pieces.append(logits[:, s])
            values.append(v[s])
            seen += int(real[s].sum())
    pieces.append(logits[:, far * BLOCK :])
    values.append(v[far * BLOCK :])
    seen += int(real[far * BLOCK :].sum())
    return torch.cat(pieces, 1).softmax(-1) @ torch.cat(values), seen * len(q)


def expected(q, k, v, real=None, coverage=0.9):
    """The last row of all heads."""
    out, seen = torch.empty(B, H, 1, D, dtype=torch.float64), 0
    for b in range(B):
        of_row = torch.ones(k.shape[2], dtype=torch.bool) if real is None else real[b]
        for g in range(G):
            heads = slice(g * H // G, (g + 1) * H // G)
            out[b, heads, 0], n = attended(q[b, heads, -1], k[b, g], v[b, g], of_row, coverage)
            seen += n
    return out, seen


@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("length", [9, 10, 11, 63, 111])
def test_a_row_is_its_definition(length, coverage):
    q, k, v = tensors(length)
    paged = PagedKeys(Dynamic(**{**vars(SETTINGS), "coverage": coverage}))
    paged.append(k, v)
    step = paged.attend(q[:, :, -1:])
    out, seen = expected(q, k, v, coverage=coverage)
    torch.testing.assert_close(step.out, out)
    if length > NEAR + BLOCK:
        assert int(step.shown) == seen <= step.causal == B * H * length
    else:
        assert step.shown is None


def test_some_blocks_are_chosen_and_some_are_not():
    q, k, v = tensors(111)
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    out, seen = expected(q, k, v)
    assert 0.2 < seen / (B * H * 111) < 0.8
    assert not torch.allclose(out, dense)
    assert ((out - dense).norm() / dense.norm()) < 0.35


def test_token_by_token_over_grown_buffers_is_the_whole():
    length = 700
    q, k, v = tensors(length, sharp=1.0)
    paged = PagedKeys(SETTINGS)
    at = 0
    for size in [300, 1, 1, 1, 5, 64, 1, *[1] * (length - 373)]:
        paged.append(k[:, :, at : at + size], v[:, :, at : at + size])
        at += size
        if size == 1 and at % 41 in (0, 1):
            out, _ = expected(q[:, :, :at], k[:, :, :at], v[:, :, :at])
            torch.testing.assert_close(paged.attend(q[:, :, at - 1 : at]).out, out)
    assert paged.tokens == at == length
    assert torch.equal(paged.keys, k)
    assert torch.equal(paged.values, v)
    # Room for a sixteenth more, and at least 256 tokens; a summary for each block.
    slots = paged.nbytes / (2 * B * G * D * 8)
    assert length * (1 + 1 / BLOCK) <= slots <= (length * 17 / 16 + 256 + BLOCK) * (1 + 1 / BLOCK)


def test_taken_back_tokens_leave_nothing():
    q, k, v = tensors(120)
    _, other_k, other_v = tensors(120, seed=1)
    paged = PagedKeys(SETTINGS)
    paged.append(k[:, :, :90], v[:, :, :90])
    paged.append(other_k[:, :, :20], other_v[:, :, :20])
    paged.crop(37)
    paged.append(k[:, :, 73:], v[:, :, 73:])
    out, _ = expected(q, k, v)
    torch.testing.assert_close(paged.attend(q[:, :, -1:]).out, out)


@pytest.mark.parametrize("side", ["left", "middle", "all"])
def test_padding_is_not_seen_and_its_blocks_have_no_summary(side):
    length = 90
    q, k, v = tensors(length)
    real = torch.ones(B, length, dtype=torch.bool)
    real[1, {"left": slice(0, 18), "middle": slice(33, 50), "all": slice(0, length - 1)}[side]] = 0
    # What padding holds must not matter.
    k[1, :, ~real[1]], v[1, :, ~real[1]] = 50.0, 1e3
    paged = PagedKeys(SETTINGS)
    paged.append(k, v)
    step = paged.attend(q[:, :, -1:], real)
    out, seen = expected(q, k, v, real)
    torch.testing.assert_close(step.out, out)
    assert int(step.shown) == seen


def test_several_rows_and_short_sequences_see_every_key():
    q, k, v = tensors(50)
    paged = PagedKeys(SETTINGS)
    paged.append(k, v)
    real = torch.ones(B, 50, dtype=torch.bool)
    real[0, :7] = False
    for rows, kept in ((5, 50), (1, 8)):
        paged.crop(paged.tokens - kept)
        for mask in (None, real[:, :kept]):
            step = paged.attend(q[:, :, kept - rows : kept], mask)
            assert step.shown is None
            seen = torch.ones(rows, kept, dtype=torch.bool).tril(kept - rows)[None, None]
            if mask is not None:
                seen = seen & mask[:, None, None]
            torch.testing.assert_close(
                step.out,
                torch.nn.functional.scaled_dot_product_attention(
                    q[:, :, kept - rows : kept],
                    *(t[:, :, :kept] for t in (k, v)),
                    attn_mask=seen,
                    enable_gqa=True,
                ),
            )


def test_coverage_of_one_is_exact():
    q, k, v = tensors(77)
    paged = PagedKeys(Dynamic(**{**vars(SETTINGS), "coverage": 1}))
    paged.append(k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    torch.testing.assert_close(paged.attend(q[:, :, -1:]).out, dense)


def test_batch_rows_are_taken_with_all_that_is_theirs():
    q, k, v = tensors(100)
    paged = PagedKeys(SETTINGS, quantized=True)
    paged.append(k, v)
    before = paged.attend(q[:, :, -1:]).out
    order = torch.tensor([1, 0, 1])
    paged.select(order)
    torch.testing.assert_close(paged.attend(q[order, :, -1:]).out, before[order])


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    q, k, v = tensors(40)
    paged = PagedKeys(SETTINGS, quantized=True)
    with torch.inference_mode():
        paged.append(k[:, :, :39].clone(), v[:, :, :39].clone())
    paged.append(k[:, :, 39:], v[:, :, 39:])
    assert paged.attend(q[:, :, -1:]).out.isfinite().all()


def test_costs_are_those_of_the_softmax():
    g = torch.Generator().manual_seed(3)
    q = torch.randn(B, G, 3, D, generator=g, dtype=torch.float64)
    k = torch.randn(B, G, 5, BLOCK, D, generator=g, dtype=torch.float64)
    near = torch.randn(B, G, 3, generator=g, dtype=torch.float64)
    means = k.mean(3)
    cost = page_costs(page_stats(q, k, means, 0.7), near, BLOCK)
    logits = torch.einsum("bgrd,bgnjd->bgrnj", q, k) * 0.7
    total = torch.cat([logits.flatten(3), near[..., None]], -1).logsumexp(-1)[..., None, None]
    p = (logits - total).exp()
    a = (torch.einsum("bgrd,bgnd->bgrn", q, means)[..., None] * 0.7 - total).exp()
    torch.testing.assert_close(cost, (p - a).square().sum(-1).mean(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_within_half_a_step(dtype):
    g = torch.Generator().manual_seed(0)
    blocks = (torch.randn(1, 2, 3, 16, 10, generator=g) * 5 + 40).to(dtype)
    blocks[0, 0, 0, :, 3] = 7.0  # A channel of equal keys.
    found = Quantized.of(blocks)
    assert found.codes.shape == (1, 2, 3, 16, 5)
    wide = blocks.float()
    step = (wide.amax(3) - wide.amin(3)) / 15
    error = (found.keys() - wide).abs()
    assert (error <= step.unsqueeze(3) * 0.501 + 1e-5).all()
    # And no better, or they would not be four bits.
    assert (error.amax(3) > step * 0.2).sum() >= step.numel() - 1
    assert torch.equal(found.keys()[0, 0, 0, :, 3], wide[0, 0, 0, :, 3])


def test_blocks_are_summarised_in_parts(monkeypatch):
    q, k, v = tensors(111)
    steps = []
    for cells in (1 << 24, 3 * B * G * BLOCK * D, 1):
        monkeypatch.setattr("dynmask.dam.paged._CELLS", cells)
        paged = PagedKeys(SETTINGS, quantized=True)
        for first, last in ((0, 50), (50, 111)):
            paged.append(k[:, :, first:last], v[:, :, first:last])
        steps.append(paged.attend(q[:, :, -1:]).out)
    assert steps[0].equal(steps[1])
    assert steps[0].equal(steps[2])


def test_keys_in_four_bits_choose_much_the_same():
    settings = Dynamic(**{**vars(SETTINGS), "block": 16, "tile": 16, "coverage": 0.95})
    length, exact, coarse = 800, PagedKeys(settings), PagedKeys(settings, quantized=True)
    q, k, v = (t.float() for t in tensors(length, sharp=1.5))
    for paged in (exact, coarse):
        paged.append(k[:, :, :-3], v[:, :, :-3])
        for i in range(3):
            at = slice(length - 3 + i, length - 2 + i)
            paged.append(k[:, :, at], v[:, :, at])
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)
    steps = [paged.attend(q[:, :, -1:]) for paged in (exact, coarse)]
    off = [float((step.out - dense).norm() / dense.norm()) for step in steps]
    assert not torch.equal(steps[0].out, steps[1].out)
    assert off[1] < 1.3 * off[0]
    assert abs(int(steps[0].shown) / int(steps[1].shown) - 1) < 0.1
    # Half a byte a number, and two floats a channel of a block.
    assert coarse.nbytes > exact.nbytes


@pytest.mark.parametrize(("block", "fits"), [(64, True), (512, False)])
def test_blocks_too_large_for_a_program_are_not_quantized(monkeypatch, block, fits):
    """On a GPU a program holds a block in float32; the shared memory is some 200 KiB."""
    asked = []

    def on_a_gpu(x, name, *, cells=0, **options):
        asked.append(cells)
        return print if cells <= 1 << 16 else None

    monkeypatch.setattr("dynmask.dam.paged.by_kernels", on_a_gpu)
    keys = PagedKeys(Dynamic(block=block, near=0))
    keys.append(torch.randn(1, 1, 600, 256), torch.randn(1, 1, 600, 256))
    assert asked == [block * 256]
    assert (keys._codes is not None) == fits
