import pytest
import torch

from dynmask.masks.schedule import HeadSchedule

EMPTY = torch.empty(0, dtype=torch.int64)


def build(*parts) -> HeadSchedule:
    return HeadSchedule.build(EMPTY, torch.cat([torch.as_tensor(p).reshape(-1) for p in parts]))


def covered(schedule: HeadSchedule) -> list[int]:
    """Offsets that the schedule's fences let through, and the lone ones."""
    out = list(schedule.lone)
    for (low, high), fence in zip(schedule.bands, schedule.fences, strict=True):
        offsets = schedule.tile + high - 2 - (fence == 0).nonzero().flatten()
        assert bool(((offsets >= low) & (offsets < high)).all())
        out += offsets.tolist()
    return sorted(out)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 0.95])
def test_every_offset_is_run_once(seed, keep):
    g = torch.Generator().manual_seed(seed)
    offsets = (torch.rand(700, generator=g) < keep).nonzero().flatten()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), offsets]).unique()
    assert covered(HeadSchedule.build(EMPTY, offsets)) == offsets.tolist()


def test_a_window_is_one_solid_band_and_far_offsets_are_lone():
    schedule = build(torch.arange(400), [1000, 3000])
    assert schedule.bands == ((0, 400),)
    assert schedule.solid == (True,)
    assert schedule.lone == (1000, 3000)
    assert schedule.reach == 3000


def test_small_gaps_are_bridged_and_wide_ones_are_not():
    assert build(torch.arange(0, 600, 2)).bands == ((0, 599),)
    assert build(torch.arange(300), torch.arange(9000, 9300)).bands == ((0, 300), (9000, 9300))


@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 1000), (37, 5000), (999, 1000)])
def test_chunks_cover_the_rows(first, last):
    columns = torch.arange(0, 6000, 3)
    schedule = HeadSchedule.build(columns, torch.arange(200))
    row = first
    for chunk in schedule.chunks(first, last):
        assert chunk.row == row
        assert chunk.rows % schedule.tile == 0
        assert chunk.columns == int((columns < min(chunk.row + chunk.rows, last)).sum())
        row += chunk.rows
    assert last <= row < last + schedule.tile
    exact = sum(c.rows * c.width(schedule.tile) for c in schedule.chunks(first, last))
    assert schedule.computed_pairs(first, last) == exact + (last - first) * len(schedule.lone)
