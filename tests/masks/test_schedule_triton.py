"""The key lists of the GPU kernels, key by key against their definitions."""

import pytest
import torch
from kernel_cases import MASKS, needs_gpu, place, require_triton

from dynmask.masks import Lifetimes

require_triton()

from dynmask.masks.triton import schedule, spans  # noqa: E402
from dynmask.masks.triton.schedule import TILE  # noqa: E402

each_mask = pytest.mark.parametrize("kind", MASKS)
each_shape = pytest.mark.parametrize(
    ("q_len", "k_len"),
    [(1, 1), (63, 63), (300, 300), (1, 300), (44, 300), (45, 300), (257, 700)],
    ids=lambda n: str(n),
)

pytestmark = pytest.mark.usefixtures("poisoned")


def most_seen(expiry):
    """The most keys that any row sees, row by row."""
    slot = torch.arange(expiry.shape[-1])
    alive = (slot <= slot[:, None]) & (slot[:, None] < expiry[..., None, :])
    return int(alive.sum(-1).max())


def side_by_side(mask):
    """The expiries as kernels read them, contiguous along K; one for all keys may be expanded."""
    (expiry,) = place(mask.expiry)
    return expiry if expiry.stride(-1) == 1 else expiry.contiguous()


def check_tiles(mask, q_len, most):
    expiry = side_by_side(mask)
    lists = schedule.tile_lists(expiry, q_len=q_len, most=most)
    keys, full, partial = (t.cpu() for t in lists)
    k_len = expiry.shape[-1]
    first = (k_len - q_len) // TILE
    tiles = -(-k_len // TILE) - first
    assert keys.shape == (*expiry.shape[:2], *schedule.list_shape(k_len, q_len, most))
    assert full.shape == partial.shape == (*expiry.shape[:2], tiles)
    slot = torch.arange(k_len)
    for b, g, t in torch.cartesian_prod(*(torch.arange(n) for n in full.shape)).tolist():
        e, listed = mask.expiry[b, g], keys[b, g, t]
        a = (first + t) * TILE
        end = min(a + TILE, k_len)
        by_all = (slot <= a) & (e >= end)
        by_some = (torch.maximum(slot, torch.tensor(a)) < e.clamp_max(end)) & ~by_all
        by_some &= slot < end
        # The order in a list is free; that each key is there once is not.
        assert listed[: full[b, g, t]].sort().values.equal(by_all.nonzero()[:, 0].int())
        n = int(partial[b, g, t])
        assert listed[len(listed) - n :].sort().values.equal(by_some.nonzero()[:, 0].int())


def check_spans(mask, q_len, most):
    expiry = side_by_side(mask)
    keys, counts = (t.cpu() for t in spans.span_lists(expiry, q_len=q_len, most=most))
    k_len = expiry.shape[-1]
    first = (k_len - q_len) // spans.SPAN
    assert counts.shape == (*expiry.shape[:2], -(-k_len // spans.SPAN) - first)
    slot = torch.arange(k_len)
    for b, g, u in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        e = mask.expiry[b, g]
        a = (first + u) * spans.SPAN
        seen = (e > slot) & (e > max(a, k_len - q_len))
        alive = ((slot < a) & seen).nonzero()[:, 0]
        alive = sorted(alive.tolist(), key=lambda j: (int(e[j]), j))
        born = ((slot >= a) & (slot < a + spans.SPAN) & seen).nonzero()[:, 0].tolist()
        assert keys[b, g, u, : counts[b, g, u]].tolist() == alive + born


@pytest.fixture
def short(monkeypatch):
    """Let short inputs have several coarse lists and spans, and lists of several blocks."""
    monkeypatch.setattr(schedule, "_COARSE", 256)
    monkeypatch.setattr(spans, "SPAN", 128)
    for module in (schedule, spans):
        monkeypatch.setattr(module, "_BLOCK", 64)


@each_shape
@each_mask
def test_tile_lists(short, kind, q_len, k_len):
    mask = MASKS[kind](k_len)
    check_tiles(mask, q_len, most_seen(mask.expiry))


@each_shape
@each_mask
def test_span_lists(short, kind, q_len, k_len):
    mask = MASKS[kind](k_len)
    check_spans(mask, q_len, most_seen(mask.expiry))


@pytest.mark.parametrize("most", [60, 61, 200, 300])
def test_any_bound_on_the_keys_of_a_row(short, most):
    mask = Lifetimes.top(torch.randn(1, 1, 300), keep=60)
    check_tiles(mask, 300, most)
    check_spans(mask, 300, most)


def test_strides_of_expiry(short):
    wide = Lifetimes.top(torch.randn(2, 3, 300), keep=50).expiry
    for expiry in (wide[:, :1].expand(2, 2, 300), wide.mT.contiguous().mT[:, ::2].contiguous()):
        check_tiles(Lifetimes(expiry), 300, 50)
        check_spans(Lifetimes(expiry), 300, 50)
    check_tiles(Lifetimes(wide[:, ::2]), 300, 50)
    check_spans(Lifetimes(wide[:, ::2]), 300, 50)


@needs_gpu
@pytest.mark.parametrize("kind", ["listed", "dense", "packed", "padded", "window"])
@pytest.mark.parametrize("q_len", [1, 4000, 13_001])
def test_long_lists(kind, q_len):
    mask = MASKS[kind](13_001)
    check_tiles(mask, q_len, mask.most)
    check_spans(mask, q_len, mask.most)


@pytest.mark.parametrize(("most", "listed"), [(0, True), (74, True), (75, False), (99, False)])
def test_lists_must_save_a_quarter(most, listed):
    assert schedule.is_listed(100, most) == listed


@each_mask
def test_usual_sizes(kind):
    mask = MASKS[kind](300)
    check_tiles(mask, 290, most_seen(mask.expiry))
    check_spans(mask, 290, most_seen(mask.expiry))
