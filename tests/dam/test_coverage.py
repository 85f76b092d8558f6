import math

import pytest
import torch

from dynmask.dam import CoverageMeter, gate_heads, true_mask
from dynmask.masks import Stripes

HEADS, LENGTH = 3, 13


def attention(size, seed=0):
    logits = 3 * torch.randn(HEADS, size, size, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -math.inf).softmax(-1)


def make_stripes():
    return Stripes(
        columns=(torch.tensor([0, 4]), torch.tensor([], dtype=torch.int64), torch.tensor([2])),
        offsets=(torch.tensor([0]), torch.tensor([0, 1, 6]), torch.tensor([0, 12])),
        full_heads=torch.zeros(HEADS, dtype=torch.bool),
        corner=true_mask(attention(LENGTH, seed=9), 0.2),
    )


def measure(stripes, texts, length=LENGTH, every=1):
    meter = CoverageMeter(stripes, capture_length=length)
    for text in texts:
        rows = torch.arange(0, text.shape[-1], every)
        meter.add(text[:, rows], rows)
    return meter.result()


def naive(texts, stripes, every):
    """Mean, tail and corner mean by a loop over pairs."""
    beyond, late, corner = ([[] for _ in range(HEADS)] for _ in range(3))
    for text in texts:
        size = text.shape[-1]
        for head in range(HEADS):
            for i in range(0, size, every):
                kept = kept_corner = 0.0
                for j in range(i + 1):
                    seen = j in stripes.columns[head].tolist()
                    seen |= i - j in stripes.offsets[head].tolist()
                    kept += seen * text[head, i, j].item()
                    seen |= i < LENGTH and stripes.corner[head, i, j].item()
                    kept_corner += seen * text[head, i, j].item()
                whole = text[head, i].sum().item()
                if i >= LENGTH:
                    beyond[head].append(kept / whole)
                else:
                    corner[head].append(kept_corner / whole)
                    if i >= size / 2:
                        late[head].append(kept / whole)
    used = beyond if beyond[0] else late
    worst = math.ceil(0.1 * len(used[0]))
    mean = [sum(rows) / len(rows) for rows in used]
    tail = [sum(sorted(rows)[:worst]) / worst for rows in used]
    return mean, tail, [sum(rows) / len(rows) for rows in corner]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([13, 13], id="L"),
        pytest.param([5, 12, 13], id="none beyond L"),
        pytest.param([14], id="one row beyond L"),
        pytest.param([5, 65, 1, 13, 29], id="some beyond L"),
    ],
)
def test_coverage_equals_a_loop_over_pairs(sizes, every):
    if sizes == [14] and every == 3:
        sizes = [17]  # so that a row beyond L is sampled
    texts = [attention(size, seed) for seed, size in enumerate(sizes)]
    found = measure(make_stripes(), texts, every=every)
    for got, want in zip(found, naive(texts, make_stripes(), every), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.tensor(want).double(), rtol=1e-5, atol=1e-6)


def test_columns_that_cover_all_of_the_corner_are_seen_through():
    # Within L a column for every key keeps all; a longer text shows that they keep little.
    stripes = Stripes(
        columns=(torch.arange(LENGTH),) * HEADS,
        offsets=(torch.tensor([0]),) * HEADS,
        full_heads=torch.zeros(HEADS, dtype=torch.bool),
    )
    within = measure(stripes, [attention(LENGTH)])
    beyond = measure(stripes, [attention(LENGTH), attention(8 * LENGTH)])
    assert torch.equal(within.mean, torch.ones(HEADS))
    assert torch.equal(beyond.corner_mean, torch.ones(HEADS))
    assert (beyond.mean < 0.6).all()
    assert gate_heads(beyond.mean, 0.95).all()


def test_a_head_that_keeps_all_has_coverage_1_exactly():
    coverage = measure(Stripes.causal(HEADS), [attention(50).half()])
    assert torch.equal(coverage.mean, torch.ones(HEADS))
    assert torch.equal(coverage.tail, torch.ones(HEADS))
    assert not gate_heads(coverage.mean, 1.0).any()


def test_the_tail_sees_rare_rows_that_the_mean_hides():
    size = 200 + LENGTH
    text = torch.eye(size).repeat(HEADS, 1, 1)
    text[0, -10:] = 0
    text[0, -10:, 100] = 1  # one row in twenty looks back at position 100
    coverage = measure(Stripes.streaming(HEADS, sinks=1, window=1), [text])
    assert coverage.mean[0] == pytest.approx(0.95)
    assert coverage.tail[0] == pytest.approx(0.5)
    assert coverage.tail[1:].tolist() == [1, 1]


def test_rows_without_attention_count_as_kept():
    coverage = measure(make_stripes(), [torch.zeros(HEADS, 20, 20)])
    assert torch.equal(coverage.tail, torch.ones(HEADS))


def test_nan_is_refused():
    text = attention(6)
    text[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        measure(make_stripes(), [text])


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="holdout"):
        measure(make_stripes(), [])
    with pytest.raises(ValueError, match="holdout"):
        measure(make_stripes(), [torch.zeros(HEADS, 0, 0)])
    meter = CoverageMeter(make_stripes(), capture_length=LENGTH)
    meter.add(attention(20)[:, -1:], torch.tensor([19]))
    with pytest.raises(ValueError, match="below capture_length=13"):
        meter.result()


@pytest.mark.parametrize(
    "shape", [(2, 4, 4), (3, 5, 4), (1, 3, 4, 4)], ids=["heads", "rows", "dimensions"]
)
def test_shapes_are_checked(shape):
    with pytest.raises(ValueError, match=r"\[3, 4, N\]"):
        CoverageMeter(make_stripes(), capture_length=LENGTH).add(
            torch.zeros(shape), torch.arange(4)
        )


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, math.nan])
def test_gate_target_is_checked(target):
    with pytest.raises(ValueError, match="coverage="):
        gate_heads(torch.ones(2), target)


def test_gate_is_dense_below_the_target_only():
    assert gate_heads(torch.tensor([0.949, 0.95, 0.951]), 0.95).tolist()[0::2] == [True, False]
