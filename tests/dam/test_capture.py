import math

import pytest
import torch

from dynmask.dam import MapAccumulator

LENGTH = 11


def attention(size, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(heads, size, size, generator=generator)
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1)


def padded(texts, total, starts, fill=math.nan):
    """Put texts into one batch; what a row does not own is filled with garbage."""
    batch = torch.full((len(texts), texts[0].shape[0], total, total), fill)
    stops = []
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        stop = start + text.shape[-1]
        batch[row, :, start:stop, start:stop] = text
        stops.append(stop)
    return batch, torch.tensor(starts), torch.tensor(stops)


def one_by_one(texts, length, eps):
    total = torch.zeros(texts[0].shape[0], length, length, dtype=torch.float64)
    count = torch.zeros(length, length, dtype=torch.float64)
    for text in texts:
        for i in range(min(text.shape[-1], length)):
            for j in range(i + 1):
                total[:, i, j] += text[:, i, j]
                count[i, j] += 1
    return total, count, total / (count + eps)


SIZES = {"full": [11, 11, 11], "ragged": [1, 7, 11, 3], "short": [4, 6], "long": [15, 11, 2]}


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_padded_batches_equal_a_loop_over_texts(sizes, side):
    texts = [attention(size, seed=seed) for seed, size in enumerate(sizes)]
    total = max(sizes) + 3
    starts = [
        {"left": total - size, "right": 0, "both": (total - size) // 2}[side] for size in sizes
    ]
    maps = MapAccumulator(2, LENGTH, eps=1e-10)
    maps.add(*padded(texts[:2], total, starts[:2]))
    if texts[2:]:
        maps.add(*padded(texts[2:], total, starts[2:]))
    want_sum, want_count, want_mean = one_by_one(texts, LENGTH, 1e-10)
    torch.testing.assert_close(maps.sum.double(), want_sum, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(maps.mean().double(), want_mean, rtol=1e-6, atol=1e-7)
    causal_counts = torch.where(torch.ones(LENGTH, LENGTH).tril() > 0, maps.count[:, None], 0)
    assert torch.equal(causal_counts.double(), want_count)


def test_an_empty_row_adds_nothing():
    maps = MapAccumulator(2, LENGTH)
    maps.add(torch.full((1, 2, 5, 5), math.nan), torch.tensor([3]), torch.tensor([3]))
    assert not maps.sum.any()
    assert not maps.count.any()
    assert torch.equal(maps.mean(), torch.zeros(2, LENGTH, LENGTH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_are_float32_whatever_comes(dtype):
    maps = MapAccumulator(2, LENGTH)
    text = attention(LENGTH).to(dtype)
    for _ in range(300):
        maps.add(text[None], torch.tensor([0]), torch.tensor([LENGTH]))
    assert maps.sum.dtype == torch.float32
    torch.testing.assert_close(maps.mean(), text.float(), rtol=1e-5, atol=1e-6)


def test_gradients_are_not_kept():
    maps = MapAccumulator(2, LENGTH)
    maps.add(attention(5).requires_grad_()[None], start=torch.tensor([0]), stop=torch.tensor([5]))
    assert not maps.mean().requires_grad


BAD = {
    "heads": ((1, 3, 5, 5), [0], [5], r"\[B, 2, T, T\]"),
    "not-square": ((1, 2, 5, 4), [0], [4], r"\[B, 2, T, T\]"),
    "three-dimensions": ((2, 5, 5), [0], [5], r"\[B, 2, T, T\]"),
    "batch": ((2, 2, 5, 5), [0], [5], "B=2"),
    "past-the-end": ((1, 2, 5, 5), [0], [6], "row 0: start=0, stop=6"),
    "reversed": ((1, 2, 5, 5), [4], [3], "row 0: start=4, stop=3"),
    "negative": ((1, 2, 5, 5), [-1], [3], "row 0: start=-1"),
}


@pytest.mark.parametrize(("shape", "start", "stop", "message"), BAD.values(), ids=BAD)
def test_shapes_and_runs_are_checked(shape, start, stop, message):
    maps = MapAccumulator(2, LENGTH)
    with pytest.raises(ValueError, match=message):
        maps.add(torch.zeros(shape), torch.tensor(start), torch.tensor(stop))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="heads=0"):
        MapAccumulator(0, 8)
