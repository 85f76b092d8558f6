"""The kernel that reads 4-bit keys against its definition in torch."""

import pytest
import torch
from kernel_cases import each_dtype, place, require_triton

from dynmask.dam.dynamic import Dynamic
from dynmask.dam.paged import PagedKeys
from dynmask.dam.paged_costs import page_stats
from dynmask.dam.quantized import Quantized

require_triton()

from dynmask.dam.triton import pages as kernel  # noqa: E402

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
    found = kernel.quantized_stats(q, filled, means[:, :, :count], count=count, scale=dim**-0.5)
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


@pytest.mark.parametrize("heads", [2, 8])
def test_a_step_by_the_kernel_is_the_step_in_torch(monkeypatch, heads):
    torch.manual_seed(0)
    settings = Dynamic(coverage=0.95, block=16, tile=16, near=16, landmarks=2, shortest=1)
    q, k, v = place(
        torch.randn(2, heads, 1, 32) * 1.5, torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32)
    )
    steps = []
    for by_kernel in (False, True):
        paged = PagedKeys(settings, quantized=True)
        paged.append(k, v)

        def functions(x, name, by_kernel=by_kernel, **limits):
            if name == "quantized_stats" and by_kernel:
                return kernel.quantized_stats
            return None

        monkeypatch.setattr("dynmask.dam.paged.by_kernels", functions)
        steps.append(paged.attend(q))
    assert 0 < int(steps[0].shown) < steps[0].causal
    # A block whose cost is at the limit may go either way.
    assert abs(int(steps[0].shown) - int(steps[1].shown)) <= 16 * heads
    torch.testing.assert_close(steps[0].out, steps[1].out, rtol=0.05, atol=0.02)
