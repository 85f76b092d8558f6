"""The kernels of a decode step against their definitions in torch."""

import pytest
import torch
from kernel_cases import each_dtype, place, require_triton

from dynmask.dam import paged_select
from dynmask.dam.dynamic import Dynamic
from dynmask.dam.paged import PagedKeys
from dynmask.dam.paged_costs import page_stats
from dynmask.dam.paged_select import Pages
from dynmask.dam.quantized import Quantized
from dynmask.masks.lifetimes import NEVER

require_triton()

from dynmask.dam.triton import choose as choose_kernel  # noqa: E402
from dynmask.dam.triton import pages as stats_kernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def check(dtype, *, rows=3, blocks=11, block=16, dim=32, room=0, count=None, sharp=1.0):
    torch.manual_seed(blocks)
    batch, groups = 2, 2
    q = (torch.randn(batch, groups, rows, dim) * sharp).to(dtype)
    k = (torch.randn(batch, groups, blocks, block, dim) + 3).to(dtype)
    q, k = place(q, k)
    codes = Quantized.of(k)
    count = blocks if count is None else count
    # The mean keys stand in a buffer with other things.
    means = torch.cat([k.mean(3), torch.full_like(k[:, :, :1, 0], torch.nan)], 2)
    filled = Quantized(
        *(
            torch.cat([t, t.new_full((batch, groups, room, *t.shape[3:]), 255)], 2)
            for t in (codes.codes, codes.low, codes.step)
        )
    )
    found = stats_kernel.quantized_stats(
        q, filled, means[:, :, :count], count=count, scale=dim**-0.5
    )
    expected = page_stats(
        q.double(), codes.keys().double()[:, :, :count], means.double()[:, :, :count], dim**-0.5
    )
    # TF32 has ten bits.
    tolerance = 2e-3 * (1 + float(expected.top.abs().max()))
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.shape == (batch, groups, rows, count)
        torch.testing.assert_close(
            one.double(), other, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dim": 20, "rows": 1},
        {"dim": 64, "block": 64, "blocks": 9, "rows": 4},
        {"dim": 80, "block": 8, "rows": 17},
        {"dim": 256, "blocks": 2, "rows": 8},
        {"blocks": 1, "room": 3},
        {"blocks": 20, "count": 13, "room": 5},
        {"block": 12, "sharp": 6.0},
        {"rows": 64, "blocks": 3},
    ],
    ids=str,
)
def test_statistics_are_those_of_the_codes(dtype, case):
    check(dtype, **case)


def pages_of(dtype, *, heads=6, groups=2, length=300, block=16, near=20, dim=32, sharp=1.5):
    torch.manual_seed(length)
    q = (torch.randn(2, groups, heads // groups, dim) * sharp).to(dtype)
    k = (torch.randn(2, groups, length, dim) + 1).to(dtype)
    q, k = place(q, k)
    count = (length - near) // block
    blocks = k[:, :, : count * block].unflatten(2, (count, block))
    return q, Pages(k, blocks.mean(3), Quantized.of(blocks), block, count + 5)


def by_kernels_of(*names):
    """What `by_kernels` would return on a GPU, for some of the names."""
    functions = {
        "quantized_stats": stats_kernel.quantized_stats,
        "choose_pages": choose_kernel.choose_pages,
    }
    return lambda x, name, **limits: functions[name] if name in names else None


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"coverage": 0.85, "sharp": 3.0},
        {"coverage": 0.995, "sharp": 3.0},
        {"heads": 2, "length": 36},
        {"heads": 34, "length": 130, "block": 8, "dim": 20},
        {"length": 333, "near": 150, "block": 8},
    ],
    ids=str,
)
def test_a_choice_by_kernels_is_the_choice_in_torch(monkeypatch, dtype, case):
    settings = Dynamic(coverage=case.get("coverage", 0.95))
    q, pages = pages_of(dtype, **{k: v for k, v in case.items() if k != "coverage"})
    scale = q.shape[3] ** -0.5
    found = []
    for names in (("quantized_stats",), ("quantized_stats", "choose_pages")):
        monkeypatch.setattr(paged_select, "by_kernels", by_kernels_of(*names))
        found.append(paged_select.select(q, pages, settings, None, scale))
    (expected, shown), (expiry, count) = found
    assert expiry.shape == expected.shape == (2, 2, pages.room + pages.keys.shape[2])
    assert set(expiry.unique().tolist()) <= {0, NEVER}
    seen, wanted = expiry == NEVER, expected == NEVER
    assert int(count) == int(seen.sum())
    assert int(shown) == int(wanted.sum())
    # Whatever the costs: a block is seen by its keys or by its summary, and what is near is seen.
    blocks = seen[:, :, pages.room :][:, :, : pages.count * pages.block]
    blocks = blocks.unflatten(2, (pages.count, pages.block))
    assert torch.equal(blocks.all(-1), ~seen[:, :, : pages.count])
    assert torch.equal(blocks.any(-1), blocks.all(-1))
    assert not seen[:, :, pages.count : pages.room].any()
    assert seen[:, :, pages.room + pages.count * pages.block :].all()
    # A block whose cost is at the limit may go either way.
    assert (seen[:, :, : pages.count] != wanted[:, :, : pages.count]).sum() <= 2
    if pages.count > 2:
        assert 0 < blocks.all(-1).sum() < blocks[..., 0].numel()


def test_a_step_by_kernels_is_the_step_in_torch(monkeypatch):
    torch.manual_seed(0)
    settings = Dynamic(coverage=0.95, block=16, tile=16, near=16, landmarks=2, shortest=1)
    q, k, v = place(
        torch.randn(2, 8, 1, 32) * 1.5, torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32)
    )
    steps = []
    for names in ((), ("quantized_stats", "choose_pages")):
        paged = PagedKeys(settings, quantized=True)
        paged.append(k, v)
        monkeypatch.setattr(paged_select, "by_kernels", by_kernels_of(*names))
        steps.append(paged.attend(q))
    assert 0 < int(steps[0].shown) < steps[0].causal
    assert abs(int(steps[0].shown) - int(steps[1].shown)) <= 16 * 8
    torch.testing.assert_close(steps[0].out, steps[1].out, rtol=0.05, atol=0.02)
