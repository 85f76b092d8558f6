"""The Triton selection against the definition, and against the torch path that sorts."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER

triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from dynmask.masks.triton.select import Level, Plan, expiry_of_top, plan_of, run_plan  # noqa: E402
from dynmask.masks.triton.select_prefix import BLOCKS, prefix_of  # noqa: E402

KINDS = (
    "normal",
    "ties",
    "rising",
    "falling",
    "infinite",
    "constant",
    "drifting",
    "steps",
)
# Small levels, so that short inputs reach every branch: lists longer than a block, many children.
# Of prefixes, one block and blocks that are narrowed down once or twice.
PLANS = {
    "one": Plan((Level(16, 16, 1),), blocks=(32, 64)),
    "two": Plan((Level(32, 32, 1), Level(16, 16, 1)), blocks=(128,)),
    "three": Plan((Level(64, 64, 1), Level(32, 64, 1), Level(16, 16, 1)), blocks=(64,)),
    "best": Plan((Level(32, 64, 1), Level(16, 64, 1)), best=True, blocks=(32,)),
    "best-one": Plan((Level(32, 32, 1),), best=True, blocks=(64, 128)),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def scores(kind: str, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    steps = torch.arange(shape[-1], dtype=torch.float32).expand(shape)
    return {
        "normal": normal,
        "ties": normal.round(),
        "rising": steps.clone(),
        "falling": -steps,
        "infinite": torch.where(normal > 0.5, torch.inf, torch.where(normal < 0, -torch.inf, 0.0)),
        "constant": torch.full(shape, -2.5),
        "drifting": normal + steps / 10,
        "steps": (normal * 2).round() + steps // 7,
    }[kind]


def segments(kind: str, batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    if kind == "documents":
        return (torch.rand(batch, count, generator=generator) < 0.1).cumsum(-1).int()
    if kind == "extreme":
        middle = torch.arange(count) < count // 2
        return torch.where(middle, -(2**31), 2**31 - 1).int().expand(batch, count)
    return torch.randint(-2, 3, (batch, count), generator=generator, dtype=torch.int32)


def by_definition(score: Tensor, keep: int, segment: Tensor | None = None) -> Tensor:
    """``max(j, the keep-th smallest position of those that beat j)``, pair by pair."""
    count = score.shape[-1]
    slot = torch.arange(count)
    rival, own = score[..., :, None], score[..., None, :]
    beats = (rival > own) | ((rival == own) & (slot[:, None] < slot))
    if segment is not None:
        rival, own = segment[:, None, :, None], segment[:, None, None, :]
        beats = (rival > own) | ((rival == own) & beats)
    places = torch.where(beats, slot[:, None], NEVER).sort(-2).values
    if keep > count:
        return torch.full(score.shape, NEVER, dtype=torch.int32)
    return torch.maximum(places[..., keep - 1, :], slot).int()


def rows(expiry: Tensor, offset: int) -> Tensor:
    """Which keys the rows from ``offset`` on see."""
    slot = torch.arange(expiry.shape[-1])
    row = slot[offset:, None]
    return (slot <= row) & (row < expiry.cpu()[..., None, :])


@each_plan
@each_kind
def test_each_plan_follows_the_definition(kind: str, plan: Plan, device: str) -> None:
    score = scores(kind, (1, 1, 79))
    got = run_plan(score.to(device), 13, None, plan)
    assert torch.equal(got.cpu(), by_definition(score, 13))


@each_plan
@pytest.mark.parametrize("kind", ["documents", "extreme", "unordered"])
def test_a_higher_segment_beats(kind: str, plan: Plan, device: str) -> None:
    score = scores("ties", (1, 1, 67))
    segment = segments(kind, 1, 67)
    got = run_plan(score.to(device), 7, segment.to(device), plan)
    assert torch.equal(got.cpu(), by_definition(score, 7, segment))


@pytest.mark.parametrize(
    ("plan", "keep"),
    [("two", 1), ("two", 33), ("two", 64), ("two", 65), ("best", 1), ("best", 31), ("best", 32)],
)
@pytest.mark.parametrize("kind", ["normal", "rising"])
def test_any_keep(kind: str, plan: str, keep: int, device: str) -> None:
    score = scores(kind, (1, 1, 65), seed=keep)
    got = run_plan(score.to(device), keep, None, PLANS[plan])
    assert torch.equal(got.cpu(), by_definition(score, keep))


@pytest.mark.parametrize("count", [1, 2, 15, 17, 63])
def test_any_length(count: int, device: str) -> None:
    score = scores("normal", (1, 2, count), seed=count)
    got = run_plan(score.to(device), 5, None, PLANS["best"])
    assert torch.equal(got.cpu(), by_definition(score, 5))


@each_kind
@pytest.mark.parametrize(("count", "keep"), [(300, 40), (97, 97)])
def test_the_usual_plan_agrees_with_the_torch_path(
    kind: str, count: int, keep: int, device: str
) -> None:
    score = scores(kind, (1, 1, count), seed=count)
    want = Lifetimes.top(score, keep=keep).expiry
    assert torch.equal(expiry_of_top(score.to(device), keep).cpu(), want)


@pytest.mark.parametrize(
    ("kind", "offset"),
    [*((kind, 50) for kind in KINDS), ("drifting", 1), ("drifting", 9), ("steps", 68)],
)
@each_plan
def test_rows_from_an_offset_on(kind: str, plan: Plan, offset: int, device: str) -> None:
    score = scores(kind, (1, 1, 71), seed=offset)
    want = by_definition(score, 13)
    got = run_plan(score.to(device), 13, None, plan, offset)
    assert torch.equal(rows(got, offset), rows(want, offset))
    unseen = ~rows(want, offset).any(-2)[..., :offset]
    assert bool((got.cpu()[..., :offset][unseen] <= offset).all())


@each_plan
@pytest.mark.parametrize(
    ("kind", "count"), [*((kind, 71) for kind in KINDS), ("ties", 20), ("ties", 97)]
)
def test_the_last_row_alone(kind: str, plan: Plan, count: int, device: str) -> None:
    score = scores(kind, (1, 2, count), seed=count)
    alive = by_definition(score, 13) >= count
    got = run_plan(score.to(device), 13, None, plan, count)
    assert torch.equal(got.cpu(), torch.where(alive, NEVER, torch.arange(count)).int())


@each_plan
@pytest.mark.parametrize("kind", ["documents", "extreme", "unordered"])
@pytest.mark.parametrize("offset", [41, 67])
def test_a_higher_segment_beats_behind_an_offset(
    kind: str, plan: Plan, offset: int, device: str
) -> None:
    score = scores("ties", (2, 1, 67), seed=offset)
    segment = segments(kind, 2, 67)
    got = run_plan(score.to(device), 7, segment.to(device), plan, offset)
    want = by_definition(score, 7, segment)
    assert torch.equal(rows(got, offset), rows(want, offset))
    assert torch.equal(got.cpu() >= 67, want >= 67)


def test_equal_keys_of_a_prefix_go_to_the_earlier_ones(device: str) -> None:
    # Six of eight are wanted, three in each block of 32; those of the second come last.
    score = torch.zeros(1, 1, 64)
    equal = [3, 7, 8, 30, 33, 40, 41, 63]
    score[..., equal] = 1
    got = run_plan(score.to(device), 6, None, PLANS["best"], 64)
    assert (got[0, 0] == NEVER).nonzero()[:, 0].tolist() == equal[:6]


def test_strides_behind_an_offset(device: str) -> None:
    score = scores("normal", (70, 3, 4)).bfloat16().permute(2, 1, 0)[::2]
    segment = segments("unordered", 70, 4).T[::2]
    got = run_plan(score.to(device), 6, segment.to(device), PLANS["three"], 60)
    assert torch.equal(rows(got, 60), rows(by_definition(score.float(), 6, segment), 60))


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("offset", "count", "keep", "prefix"),
    [
        (0, 100, 9, 0),
        (50, 100, 9, 50),
        (99, 100, 9, 100),
        (100, 100, 9, 100),
        (2**20, 2**20, 2**13, 2**20),
        (2**20, 2**20, 2**15, 0),  # blocks of half of what is wanted would never get fewer
        (2**14, 2**20, 2**19, 2**14),
    ],
)
def test_prefix_of(offset: int, count: int, keep: int, prefix: int, segmented: bool) -> None:
    assert prefix_of(offset, count, keep, segmented=segmented) == prefix
    assert prefix_of(2**19, 2**20, BLOCKS[-1] // 2 + 1, segmented=segmented) == 0


@pytest.mark.parametrize("kind", ["drifting", "steps"])
@pytest.mark.parametrize("offset", [0, 250, 299, 300])
def test_the_usual_plan_behind_an_offset(kind: str, offset: int, device: str) -> None:
    score = scores(kind, (1, 1, 300), seed=offset)
    want = Lifetimes.top(score, keep=40).expiry
    got = expiry_of_top(score.to(device), 40, None, offset)
    assert torch.equal(rows(got, offset), rows(want, offset))
    assert torch.equal(got.cpu() >= 300, want >= 300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too long for the interpreter")
@each_kind
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("count", "keep", "offset"),
    [
        (8193, 2048, 8192),
        (32768, 2048, 32767),
        (40000, 2048, 39999),
        (1000003, 2048, 1000002),
        (1000003, 20000, 1000002),
        (40000, 2048, 39000),
        (100003, 2048, 20001),
        (300001, 300, 100000),
    ],
)
def test_long_inputs_behind_an_offset(
    kind: str, count: int, keep: int, offset: int, segmented: bool
) -> None:
    score = scores(kind, (1, 2, count), seed=count).cuda()
    segment = segments("documents", 1, count).cuda() // 997 if segmented else None
    want = expiry_of_top(score, keep, segment)
    got = expiry_of_top(score, keep, segment, offset)
    # A key that dies before the offset may have any expiry up to it.
    slot = torch.arange(count, device="cuda")
    floor = slot.clamp_min(offset)
    assert torch.equal(torch.maximum(got, floor), torch.maximum(want, floor))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too long for the interpreter")
@pytest.mark.parametrize("kind", [*KINDS, "documents"])
@pytest.mark.parametrize(
    ("count", "keep"),
    [(1000, 64), (16001, 2048), (40000, 2048), (100003, 1), (100003, 2048), (200001, 20000)],
)
def test_long_inputs_agree_with_the_torch_path(kind: str, count: int, keep: int) -> None:
    documents = None
    if kind == "documents":
        documents = (torch.arange(count)[None] // 9973).int()
    score = scores("ties" if documents is not None else kind, (1, 2, count), seed=count)
    want = Lifetimes.top(score, keep=keep, documents=documents).expiry
    got = expiry_of_top(score.cuda(), keep, None if documents is None else documents.cuda()).cpu()
    if documents is not None:
        got = torch.minimum(got, ((documents + 1) * 9973).clamp_max(count)[:, None])
    assert torch.equal(got, want)


def test_strides_and_types(device: str) -> None:
    wide = scores("normal", (70, 3, 4)).bfloat16()
    score = wide.permute(2, 1, 0)[::2]
    segment = segments("unordered", 70, 4).T[::2]
    got = run_plan(score.to(device), 6, segment.to(device), PLANS["two"])
    assert torch.equal(got.cpu(), by_definition(score.float(), 6, segment))
    assert got.is_contiguous()


def test_nan_is_least_and_zero_has_no_sign(device: str) -> None:
    score = torch.tensor([0.0, -0.0, torch.nan, -torch.inf, 0.0, -0.0, 1.0, torch.nan])
    score = score.repeat(4)[None, None]
    clean = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    got = run_plan(score.to(device), 3, None, PLANS["one"])
    assert torch.equal(got.cpu(), by_definition(clean, 3))


def test_the_worst_of_equal_keys_is_the_last_block_s(device: str) -> None:
    # Lists are looked at in blocks of 16: both ones stand at the same place of theirs.
    score = torch.zeros(1, 1, 48)
    score[..., [3, 19]] = 1
    score[..., [40, 41]] = 2
    got = run_plan(score.to(device), 2, None, PLANS["one"])
    assert got[0, 0, [3, 19, 40, 41]].tolist() == [41, 40, NEVER, NEVER]
    assert torch.equal(got.cpu(), by_definition(score, 2))


@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 0, 5), (1, 2, 0)])
def test_nothing_to_select(shape: tuple[int, int, int], device: str) -> None:
    assert expiry_of_top(torch.empty(shape, device=device), 2).shape == shape


@pytest.mark.parametrize("count", [1, 2**14, 2**16, 2**16 + 1, 2**20, 2**23])
@pytest.mark.parametrize("keep", [1, 2048, 2**14, 2**15, 2**18])
def test_plans_are_sound(count: int, keep: int) -> None:
    plan = plan_of(count, keep)
    sizes = [level.size for level in plan.levels]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 8 == 0 for size in sizes)
    assert not plan.best or keep <= sizes[0]
