"""The kernels that make dynamic masks, against plain torch and loops over their definitions."""

import pytest
import torch
from kernel_cases import each_dtype, needs_gpu, place, require_triton

from dynmask.dam import keep as torch_keep
from dynmask.dam import landmarks as torch_landmarks
from dynmask.dam.dynamic import Dynamic
from dynmask.dam.dynamic_gather import attend_gathered
from dynmask.dam.dynamic_keys import Keys
from dynmask.dam.dynamic_select import Choice, far_blocks

require_triton()

from dynmask.dam.triton import keep, landmarks, lists  # noqa: E402
from dynmask.masks.triton.block_lists import block_lists, immortal  # noqa: E402
from dynmask.ops.triton.forward import forward  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def check_landmarks(x, count):
    (on_device,) = place(x)
    marks, places = (t.cpu() for t in landmarks.landmarks(on_device, count))
    assert marks.dtype == x.dtype
    assert marks.is_contiguous()
    assert places.shape == (*x.shape[:3], count - 1)
    wide = x.double()
    distance = (wide - wide.mean(3, keepdim=True)).square().sum(-1)
    for i in range(count - 1):
        at = places[..., i, None]
        # Float32 does not tell distances apart that are closer.
        assert (distance.gather(-1, at) >= (1 - 1e-5) * distance.amax(-1, keepdim=True)).all()
        taken = wide.gather(3, at[..., None].expand(*at.shape, x.shape[4]))
        assert marks[:, :, i].equal(taken.squeeze(3).to(x.dtype))
        distance = distance.minimum((wide - taken).square().sum(-1)).scatter(-1, at, -1.0)
    left = (distance >= 0)[..., None]
    rest = (wide * left).sum(3) / left.sum(3)
    one_rounding = {"rtol": torch.finfo(x.dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(marks[:, :, -1], rest.to(x.dtype), **one_rounding)
    return places


@each_dtype
@pytest.mark.parametrize(
    ("block", "dim", "count"),
    [(8, 16, 3), (8, 16, 8), (64, 128, 9), (64, 20, 1), (13, 16, 13), (1, 16, 1), (20, 100, 2)],
    ids=lambda n: str(n),
)
def test_landmarks(dtype, block, dim, count):
    torch.manual_seed(block)
    # Blocks of a longer tensor, heads behind tokens in memory.
    x = torch.randn(2, 3 * block + 5, 2, dim).to(dtype).transpose(1, 2)
    check_landmarks(x[:, :, 2 : 2 + 3 * block].unflatten(2, (3, block)), count)


@pytest.mark.parametrize("count", [1, 9])
def test_landmarks_of_tiles_of_several_heads(count):
    # Queries as they lie, [B, G, R, T, tile, D]: the rows of a tile in one piece for each head.
    (lying,) = place(torch.randn(2, 3, 4, 5, 6, 16))
    x = lying.transpose(2, 3)
    marks, places = landmarks.landmarks(x, count)
    expected, at = landmarks.landmarks(x.flatten(3, 4), count)
    assert marks.equal(expected)
    assert places.equal(at)
    assert torch_landmarks.landmarks(x.double(), count)[1].equal(places)


@pytest.mark.parametrize("count", [4, 16])
def test_equally_far_vectors_are_taken_from_the_first_on(count):
    torch.manual_seed(0)
    # Few values, so that all distances are exact and many are equal.
    x = torch.randint(-1, 2, (2, 1, 5, 16, 16)).float()
    x[:, :, 1] = x[:, :, 1, :1]
    x[:, :, 2, 3:] = x[:, :, 2, 3:4]
    assert check_landmarks(x, count).equal(torch_landmarks.landmarks(x.double(), count)[1])


def test_landmarks_of_any_strides():
    check_landmarks(torch.randn(2, 2, 2, 20, 7).transpose(3, 4), 4)


def test_no_blocks_have_no_landmarks():
    marks, places = landmarks.landmarks(*place(torch.zeros(1, 2, 0, 8, 16)), 3)
    assert marks.shape == (1, 2, 3, 0, 16)
    assert places.shape == (1, 2, 0, 2)


@needs_gpu
def test_landmarks_of_many_queries():
    check_landmarks(torch.randn(2, 2, 300, 448, 128), 16)


def kept_by_definition(cost, far, allowed):
    """Try the thresholds from the largest down, none kept first, row by row."""
    kept = torch.zeros(cost.shape, dtype=torch.bool)
    for b, g, t in torch.cartesian_prod(*(torch.arange(n) for n in cost.shape[:3])).tolist():
        row = cost[b, g, t, : far[t]].double()
        kept[b, g, t, : far[t]] = True
        for least in [torch.inf, *sorted(set(row.tolist()), reverse=True)]:
            if row[row < least].sum() <= allowed:
                kept[b, g, t, : far[t]] = row >= least
                break
    return kept


def check_keep(cost, far, allowed):
    expected = kept_by_definition(cost, far, allowed)
    assert torch_keep.keep(cost, far, allowed).equal(expected)
    assert torch_keep.keep(cost.double(), far, allowed).equal(expected)
    behind = torch.arange(cost.shape[3]) >= far[:, None]
    found = keep.keep(*place(cost.masked_fill(behind, 1.0), far), allowed)
    assert found.dtype == torch.bool
    assert found.cpu().equal(expected)
    return expected


@pytest.fixture(params=[16384, 64], ids=["registers", "chunks"])
def either_way(request, monkeypatch):
    """Rows that stay in registers, and rows that are read again and again."""
    monkeypatch.setattr(keep, "_LONGEST", request.param)


# Sums of integers are exact, so many rows allow just what some costs add up to.
@pytest.mark.parametrize("allowed", [-1, 0, 9, 40, 10_000])
def test_keep_among_equal_costs(either_way, allowed):
    torch.manual_seed(allowed)
    far = torch.tensor([0, 1, 37, 64, 65])
    cost = torch.randint(0, 7, (1, 2, 5, 65)).float()
    cost *= torch.arange(65) < far[:, None]
    expected = check_keep(cost, far, allowed)
    assert expected.any() == (allowed < 10_000)


@pytest.mark.parametrize("count", [1, 63, 111])
def test_keep_of_any_size(either_way, count):
    torch.manual_seed(count)
    far = torch.tensor([count // 2, count])
    # Softmax rows: few large costs and many that are tiny, subnormal ones too.
    cost = torch.exp(8 * torch.randn(1, 2, 2, count) - 20) + 1e-41
    cost = cost * (torch.arange(count) < far[:, None])
    for share in (1e-4, 0.3):
        check_keep(cost, far, share * float(cost.sum(-1).mean()))


@pytest.mark.parametrize("allowed", [0, 12, 13, 25])
def test_keep_tells_neighbouring_numbers_apart(either_way, allowed):
    least = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    more = torch.nextafter(least, least + 1)
    cost = torch.cat([least, more], -1).repeat(1, 1, 1, 12)
    check_keep(cost, torch.tensor([24, 24]), allowed)


def test_keep_of_nothing():
    far = torch.zeros(3, dtype=torch.int64)
    for count in (0, 4):
        cost = torch.zeros(1, 2, 3, count)
        for found in (torch_keep.keep(cost, far, 0.1), keep.keep(*place(cost, far), 0.1)):
            assert found.shape == cost.shape
            assert not found.any()


@needs_gpu
@pytest.mark.parametrize("count", [2047, 16_384, 40_000])
def test_keep_in_long_rows(count):
    torch.manual_seed(count)
    far = torch.tensor([count, count - 1, count // 3])
    cost = torch.randint(0, 50, (2, 2, 3, count)).float() * (torch.arange(count) < far[:, None])
    check_keep(cost, far, 3 * count)


def draw_choice(first, last, share, settings, *, batch=2, groups=1):
    """Keys of ``last`` tokens and more, and a choice of any blocks, a ``share`` of them kept."""
    torch.manual_seed(last)
    top = first // settings.tile
    tiles = -(-last // settings.tile) - top
    far = far_blocks(settings, top, tiles, torch.device("cpu"))
    count = int(far.max())
    kept = (torch.rand(batch, groups, tiles, count) < share) & (torch.arange(count) < far[:, None])
    k, v = torch.randn(2, batch, groups, last + 11, 16)
    keys = Keys.build(k, v, block=settings.block, tile=settings.tile, marks=1)
    return Choice(kept, far, top, settings.tile, settings.block, settings.near), keys


def on_device(choice):
    kept, far = place(choice.kept, choice.far)
    return Choice(kept, far, choice.top, choice.tile, choice.block, choice.near)


def check_lists(first, last, share, settings):
    choice, keys = draw_choice(first, last, share, settings)
    slots, full, partial = (t.cpu() for t in lists.choice_lists(on_device(choice), keys, last))
    mask, end = choice.blocks(keys, last), keys.summaries + last
    shape = {"block": 1, "tile": settings.tile, "q_len": last - first}
    given = place(mask.indices, mask.counts, immortal(mask, end))
    theirs = [t.cpu() for t in block_lists(*given, **shape)]
    assert slots.is_contiguous()
    assert full.equal(theirs[1])
    assert partial.equal(theirs[2])
    for b, g, t in torch.cartesian_prod(*(torch.arange(n) for n in full.shape)).tolist():
        some, every = int(partial[b, g, t]), int(full[b, g, t])
        seen, tested = slots[b, g, t, :every].tolist(), slots[b, g, t, last - some :].tolist()
        begin, far = (choice.top + t) * settings.tile, int(choice.far[t])
        expected = []
        for block in range(far):
            of_block = range(block * settings.block, (block + 1) * settings.block)
            of_block = [keys.summaries + j for j in of_block]
            expected += of_block if choice.kept[b, g, t, block] else [block]
        near = range(far * settings.block, begin + 1)
        assert seen == expected + [keys.summaries + j for j in near]
        later = range(begin + 1, min(begin + settings.tile, last))
        assert tested == [keys.summaries + j for j in later]
        listed = theirs[0][b, g, t]
        assert listed[:every].sort().values.tolist() == sorted(seen)
        assert listed[len(listed) - some :].sort().values.tolist() == tested


@pytest.fixture
def short(monkeypatch):
    """Let short inputs have lists of several parts."""
    monkeypatch.setattr(lists, "_CELLS", 64)
    monkeypatch.setattr(lists, "_BLOCK", 32)


SIZES = {
    "square": (0, 111, {}),
    "inside a tile": (37, 100, {}),
    "whole tiles": (32, 96, {}),
    "one row": (100, 101, {}),
    "nothing far": (0, 23, {}),
    "no near keys": (3, 90, {"near": 0}),
    "odd": (40, 111, {"tile": 20, "block": 7}),
    "single keys": (50, 99, {"block": 1}),
    "long blocks": (65, 333, {"tile": 64, "block": 64, "near": 64}),
    "long tiles": (200, 500, {"tile": 128, "block": 8}),
    "blocks beyond a part": (70, 201, {"block": 65}),
}


@pytest.mark.parametrize(
    ("size", "share"),
    [*((size, 0.3) for size in SIZES), *((s, n) for s in ("inside a tile", "odd") for n in (0, 1))],
)
def test_lists(short, size, share):
    first, last, changes = SIZES[size]
    settings = {"tile": 16, "block": 8, "near": 10, "landmarks": 1, **changes}
    check_lists(first, last, share, Dynamic(**settings))


def test_lists_of_usual_parts():
    check_lists(70, 300, 0.5, Dynamic(tile=64, block=16, near=64, landmarks=1))


@needs_gpu
def test_long_lists():
    check_lists(18_000, 20_001, 0.1, Dynamic(tile=64, block=64, near=64))


def test_attention_over_the_lists():
    settings = Dynamic(tile=16, block=8, near=10, landmarks=1)
    first, last = 37, 100
    choice, keys = draw_choice(first, last, 0.4, settings, groups=2)
    q = torch.randn(2, 4, last - first, 16)
    expected = attend_gathered(q, keys, choice, first=first, scale=0.25)
    end = keys.summaries + last
    given = place(q, keys.k[:, :, :end], keys.v[:, :, :end], keys.bias[:, :, :end].contiguous())
    (expiry,) = place(torch.full((2, 2, end), end, dtype=torch.int32))
    made = lists.choice_lists(on_device(choice), keys, last)
    out, _ = forward(*given, expiry, made, 0.25, tile=settings.tile)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
