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


def naive(texts, stripes):
    alone, corner = [[] for _ in range(HEADS)], [[] for _ in range(HEADS)]
    for text in texts:
        for head in range(HEADS):
            for i in range(text.shape[-1]):
                kept = kept_corner = 0.0
                for j in range(i + 1):
                    seen = j in stripes.columns[head].tolist()
                    seen |= i - j in stripes.offsets[head].tolist()
                    kept += seen * text[head, i, j].item()
                    seen |= i < LENGTH and stripes.corner[head, i, j].item()
                    kept_corner += seen * text[head, i, j].item()
                whole = text[head, i].sum().item()
                alone[head].append(kept / whole)
                corner[head].append(kept_corner / whole)
    worst = math.ceil(0.1 * len(alone[0]))
    mean = [sum(rows) / len(rows) for rows in alone]
    tail = [sum(sorted(rows)[:worst]) / worst for rows in alone]
    return mean, tail, [sum(rows) / len(rows) for rows in corner]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "sizes",
    [pytest.param([13, 13], id="L"), pytest.param([5, 29, 1, 13], id="ragged and beyond L")],
)
def test_coverage_equals_a_loop_over_pairs(sizes, side):
    texts = [attention(size, seed) for seed, size in enumerate(sizes)]
    total = max(sizes) + 2
    batch = torch.full((len(texts), HEADS, total, total), math.nan)
    starts = [total - size if side == "left" else 0 for size in sizes]
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        batch[row, :, start : start + len(text[0]), start : start + len(text[0])] = text
    start = torch.tensor(starts)
    stop = start + torch.tensor(sizes)
    meter = CoverageMeter(make_stripes())
    meter.add(batch[:1], start[:1], stop[:1])
    meter.add(batch[1:], start[1:], stop[1:])
    for got, want in zip(meter.result(), naive(texts, make_stripes()), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.tensor(want).double(), rtol=1e-5, atol=1e-6)


def test_a_head_that_keeps_all_has_coverage_1_exactly():
    stripes = Stripes.causal(HEADS)
    meter = CoverageMeter(stripes)
    meter.add(attention(50).half()[None], torch.tensor([0]), torch.tensor([50]))
    coverage = meter.result()
    assert torch.equal(coverage.tail, torch.ones(HEADS))
    assert not gate_heads(coverage.tail, 1.0).any()


def test_the_tail_sees_rare_rows_that_the_mean_hides():
    size = 200
    text = torch.eye(size).repeat(HEADS, 1, 1)
    text[0, -10:] = 0
    text[0, -10:, 100] = 1  # one row in twenty looks back at position 100
    meter = CoverageMeter(
        Stripes.streaming(HEADS, sinks=1, window=1),
    )
    meter.add(text[None], torch.tensor([0]), torch.tensor([size]))
    coverage = meter.result()
    assert coverage.mean[0] == pytest.approx(0.95)
    assert coverage.tail[0] == pytest.approx(0.5)
    assert gate_heads(coverage.mean, 0.9).tolist() == [False] * HEADS
    assert gate_heads(coverage.tail, 0.9).tolist() == [True, False, False]


def test_rows_without_attention_count_as_kept():
    meter = CoverageMeter(make_stripes())
    meter.add(torch.zeros(1, HEADS, 4, 4), torch.tensor([0]), torch.tensor([4]))
    assert torch.equal(meter.result().tail, torch.ones(HEADS))


def test_nan_is_refused():
    text = attention(6)
    text[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        CoverageMeter(make_stripes()).add(text[None], torch.tensor([0]), torch.tensor([6]))


def test_no_rows_is_an_error():
    meter = CoverageMeter(make_stripes())
    meter.add(torch.zeros(1, HEADS, 4, 4), torch.tensor([2]), torch.tensor([2]))
    with pytest.raises(ValueError, match="holdout"):
        meter.result()


def test_heads_are_checked():
    with pytest.raises(ValueError, match=r"\[B, 3, T, T\]"):
        CoverageMeter(make_stripes()).add(
            torch.zeros(1, 2, 4, 4), torch.tensor([0]), torch.tensor([4])
        )


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, math.nan])
def test_gate_target_is_checked(target):
    with pytest.raises(ValueError, match="coverage="):
        gate_heads(torch.ones(2), target)


def test_gate_is_dense_below_the_target_only():
    assert gate_heads(torch.tensor([0.949, 0.95, 0.951]), 0.95).tolist()[0::2] == [True, False]
