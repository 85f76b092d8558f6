"""What a full cache gives up, against the definition."""

from __future__ import annotations

import pytest
import torch

from dynmask.dam.evict import RECENT, SINKS, importance, kept, last_real


def by_definition(q, k, rows, slots, scale):
    """One loop a key, in float64."""
    q, k = q.double(), k.double()
    batch, heads, n, _ = q.shape
    groups, size = k.shape[1:3]
    out = torch.full((batch, size), -1.0, dtype=torch.float64)
    for b in range(batch):
        real = [s for s in range(size) if slots[b, s]]
        for g in range(groups):
            square = dict.fromkeys(real, 0.0)
            of_group = range(g * heads // groups, (g + 1) * heads // groups)
            asked = [i for i in range(n) if rows[b, i]]
            for i in asked:
                seen = [s for s in real if s <= size - n + i]
                for h in of_group:
                    p = ((k[b, g, seen] @ q[b, h, i]) * scale).softmax(0)
                    for s, weight in zip(seen, p.tolist(), strict=True):
                        square[s] += weight**2 / (len(asked) * len(of_group))
            for place, s in enumerate(real):
                found = max(square[t] for t in real if abs(t - s) <= 16)
                out[b, s] = max(out[b, s], found)
                if place < SINKS or s >= size - RECENT:
                    out[b, s] = torch.inf
    return out


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize(
    ("size", "n", "empty", "silent"),
    [(200, 64, (0, 0), (0, 0)), (111, 7, (0, 30), (0, 3)), (140, 64, (5, 90), (0, 20))],
    ids=["whole", "few rows", "padded"],
)
def test_importance_is_its_definition(heads, groups, size, n, empty, silent):
    g = torch.Generator().manual_seed(size)
    q = torch.randn(2, heads, n, 8, generator=g) * 2
    k = torch.randn(2, groups, size, 8, generator=g)
    rows = torch.arange(n) >= torch.tensor(silent)[:, None]
    slots = torch.arange(size) >= torch.tensor(empty)[:, None]
    found = importance(q, k, rows=rows, slots=slots, scale=0.4)
    expected = by_definition(q, k, rows, slots, 0.4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


def test_what_stays_is_in_order():
    score = torch.tensor([[0.5, torch.inf, -1.0, 0.1, 0.7, torch.inf]])
    assert kept(score, 4).tolist() == [[0, 1, 4, 5]]


def test_last_real_rows_stand_at_the_end():
    q = torch.arange(10.0).view(2, 1, 5, 1)
    real = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    found, is_real = last_real(q, real, 4)
    assert found[0, 0, 1:, 0].tolist() == [0.0, 1.0, 3.0]
    assert found[1, 0, :, 0].tolist() == [6.0, 7.0, 8.0, 9.0]
    assert is_real.tolist() == [[False, True, True, True], [True] * 4]
