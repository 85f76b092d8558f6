"""The kernel that costs blocks against its definition in torch."""

import pytest
import torch
from kernel_cases import each_dtype, needs_gpu, place, require_triton

from dynmask.dam import dynamic, dynamic_cost
from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.dynamic_select import far_blocks

require_triton()

from dynmask.dam.triton import cost as kernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def check(
    q_len, k_len, *, heads=4, groups=2, dim=16, tile=16, block=8, near=10, marks=4, queries=4,
    dtype=torch.float32, sharp=1.0,
):  # fmt: skip
    torch.manual_seed(k_len)
    settings = Dynamic(
        tile=tile, block=block, near=near, landmarks=marks, queries=queries, shortest=0
    )
    q = (torch.randn(2, heads, q_len, dim) * sharp).to(dtype)
    k, v = (torch.randn(2, groups, k_len, dim).to(dtype) for _ in range(2))
    q, k, v = place(q, k, v)
    keys = Keys.build(k, v, block=block, tile=tile, marks=marks)
    first = k_len - q_len
    tiles = -(-k_len // tile) - first // tile
    far = far_blocks(settings, first // tile, tiles, q.device)
    rows, places = dynamic_cost.representatives(q, settings, groups, tiles, first)
    count = int(far.max())
    given = {"count": count, "first": first, "last": k_len, "tile": tile}
    given |= {"every": tile * heads // groups, "scale": dim**-0.5}
    found = kernel.block_costs(rows, places, keys, far, **given)
    wide = Keys(
        *(t.double() for t in (keys.landmarks, keys.k, keys.v, keys.bias)), block, keys.summaries
    )
    expected = dynamic_cost.block_costs(rows.double(), places, wide, far, **given)
    is_far = torch.arange(count, device=far.device) < far[:, None]
    assert is_far.any()
    assert found.shape == expected.shape
    assert found[is_far.expand_as(found)].isfinite().all()
    # Nothing is left that costs so much: how much more does not matter.
    found, expected = found.clamp_max(1e30), expected.clamp_max(1e30)
    # Costs are differences of larger sums: errors count beside the largest of a tile.
    most = expected.amax(-1, keepdim=True)
    eps = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    wrong = ((found - expected).abs() > eps * most + 1e-3 * expected + 1e-7) & is_far
    assert not wrong.any(), (found[wrong][:4], expected[wrong][:4])


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        {"q_len": 100, "k_len": 100},
        {"q_len": 37, "k_len": 111, "dim": 20},
        {"q_len": 1, "k_len": 70, "queries": 3},
        {"q_len": 75, "k_len": 75, "block": 4, "near": 0, "marks": 1, "queries": 1},
        {"q_len": 65, "k_len": 130, "heads": 3, "groups": 3, "marks": 8, "queries": 100},
        {"q_len": 90, "k_len": 90, "heads": 6, "groups": 1, "tile": 8, "queries": 5, "sharp": 40.0},
        {
            "q_len": 90,
            "k_len": 150,
            "heads": 6,
            "groups": 1,
            "block": 16,
            "marks": 8,
            "sharp": 60.0,
        },
    ],
    ids=["square", "chunk", "row", "means", "every", "sharp", "beyond-float32"],
)
def test_costs(case, dtype):
    check(**case, dtype=dtype)


def test_costs_in_chunks():
    check(40, 400, block=2, marks=2)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [4, 16])
def test_long(dim, dtype, heads):
    check(
        3000, 5001, heads=heads, groups=4, dim=dim, tile=64, block=64, near=64, marks=32,
        queries=16, dtype=dtype,
    )  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [4, 12, 16])
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_by_kernels_is_that_on_the_cpu(dim, heads, dtype, monkeypatch):
    torch.manual_seed(0)
    k_len, q_len = 4000, 2500
    k, v = torch.randn(2, 1, 4, k_len, dim).to(dtype).unbind()
    # Each 100 rows look at one far key, unlike its neighbours.
    at = torch.randint(0, k_len - q_len, (q_len // 100,))
    k[:, :, at] *= 3
    at = at.repeat_interleave(100)
    q = (k[:, :, at].repeat_interleave(heads // 4, 1) * 2 + torch.randn(1, heads, q_len, dim)).to(
        dtype
    )
    expected, ran = dynamic_attention(q, k, v, Dynamic())
    assert 0.03 < float(ran.shown) / ran.causal < 0.5
    monkeypatch.setattr(dynamic, "_CELLS", 4 * k_len * 10)  # Ten tiles a part.
    found, here = dynamic_attention(q.cuda(), k.cuda(), v.cuda(), Dynamic())
    assert here.impl == "triton"
    assert abs(int(here.shown) / int(ran.shown) - 1) < 0.01
    error = (found.cpu().double() - expected.double()).norm() / expected.double().norm()
    # A block whose cost is at the threshold may be kept here and not there.
    assert error < (1e-3 if dtype == torch.float32 else 1.5e-2)
