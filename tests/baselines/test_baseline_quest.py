"""Quest against its definition, page by page."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dynmask.baselines.quest import Quest
from dynmask.ops import attention

SCALE = 0.3
HEADS = pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"]
)


def draw(length, heads, groups, *, batch=2, dim=8, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, groups, length, dim, dtype=torch.float64)


def row_by_definition(q, k, pages):
    """``[B, H, K]``: what the last row sees."""
    batch, heads, dim = q.shape[0], q.shape[1], q.shape[3]
    length = k.shape[2]
    seen = torch.zeros(batch, heads, length, dtype=torch.bool)
    own = (length - 1) // 16
    for b in range(batch):
        for h in range(heads):
            row, keys = q[b, h, -1].tolist(), k[b, h // (heads // k.shape[1])]
            bound = {}
            for page in range(own):
                inside = keys[page * 16 : page * 16 + 16].tolist()
                bound[page] = sum(max(row[d] * key[d] for key in inside) for d in range(dim))
                # It bounds every logit of the page.
                logits = keys[page * 16 : page * 16 + 16] @ q[b, h, -1]
                assert bound[page] >= float(logits.max()) - 1e-9
            best = sorted(bound, key=lambda page: -bound[page])[: pages - 1]
            for page in [*best, own]:
                seen[b, h, page * 16 : page * 16 + 16] = True
    return seen


@HEADS
@pytest.mark.parametrize("prompt", [63, 64, 65, 97])
@pytest.mark.parametrize("pages", [1, 3])
def test_rows_equal_the_definition(prompt, pages, heads, groups):
    q, k = draw(prompt + 20, heads, groups)
    selector = Quest(budget=16 * pages + 5).selector(2, 4)
    assert selector.mask(q[:, :, :prompt], k[:, :, :prompt], scale=SCALE) is None
    for end in range(prompt + 1, prompt + 21):
        row = q[:, :, end - 1 : end]
        seen = selector.mask(row, k[:, :, :end], scale=SCALE).dense(1, end)[:, :, 0]
        assert seen.equal(row_by_definition(row, k[:, :, :end], pages))
        assert seen[..., -1].all()


def test_a_question_runs_dense_and_its_keys_are_in_pages():
    q, k = draw(120, 4, 2)
    selector = Quest(budget=32).selector(2, 4)
    selector.mask(q[:, :, :50], k[:, :, :50], scale=SCALE)
    assert selector.mask(q[:, :, 50:101], k[:, :, :101], scale=SCALE) is None
    row = q[:, :, 101:102]
    seen = selector.mask(row, k[:, :, :102], scale=SCALE).dense(1, 102)[:, :, 0]
    assert seen.equal(row_by_definition(row, k[:, :, :102], 2))


def test_a_cache_within_the_budget_runs_dense():
    q, k = draw(50, 2, 1)
    selector = Quest(budget=48).selector(2, 4)
    selector.mask(q[:, :, :20], k[:, :, :20], scale=SCALE)
    dense = [
        selector.mask(q[:, :, end - 1 : end], k[:, :, :end], scale=SCALE) is None
        for end in range(21, 51)
    ]
    assert dense == [end <= 48 for end in range(21, 51)]


def test_a_share_is_of_the_first_call():
    q, k = draw(101, 2, 1)
    selector = Quest(budget=0.5).selector(2, 4)
    selector.mask(q[:, :, :99], k[:, :, :99], scale=SCALE)  # 50 keys are three whole pages.
    for end in (100, 101):
        row = q[:, :, end - 1 : end]
        seen = selector.mask(row, k[:, :, :end], scale=SCALE).dense(1, end)[:, :, 0]
        assert seen.equal(row_by_definition(row, k[:, :, :end], 3))


def test_a_tiny_share_keeps_the_own_page():
    q, k = draw(65, 2, 1)
    selector = Quest(budget=0.01).selector(2, 4)
    selector.mask(q[:, :, :64], k[:, :, :64], scale=SCALE)
    seen = selector.mask(q[:, :, 64:], k, scale=SCALE).dense(1, 65)
    assert seen[..., 64].all()
    assert not seen[..., :64].any()


def test_first_layers_are_dense():
    q, k = draw(100, 2, 1)
    for layer, first, dense in [
        (0, 2, True),
        (1, 2, True),
        (2, 2, False),
        (3, 2, False),
        (0, 0, False),
    ]:
        selector = Quest(budget=16, dense_layers=first).selector(layer, 4)
        selector.mask(q[:, :, :99], k[:, :, :99], scale=SCALE)
        assert (selector.mask(q[:, :, 99:], k, scale=SCALE) is None) == dense


def test_going_back_gives_the_same_again():
    q, k = draw(120, 4, 2)
    other = draw(120, 4, 2, seed=9)[1]
    other[:, :, :70] = k[:, :, :70]
    selector = Quest(budget=32).selector(2, 4)
    selector.mask(q[:, :, :60], k[:, :, :60], scale=SCALE)
    selector.mask(q[:, :, 60:70], k[:, :, :70], scale=SCALE)

    def rows(keys):
        return [
            selector.mask(q[:, :, end - 1 : end], keys[:, :, :end], scale=SCALE).dense(1, end)
            for end in range(71, 100)
        ]

    first = rows(k)
    for seen, end in zip(rows(other), range(71, 100), strict=True):
        row = q[:, :, end - 1 : end]
        assert seen[:, :, 0].equal(row_by_definition(row, other[:, :, :end], 2))
    assert all(a.equal(b) for a, b in zip(rows(k), first, strict=True))


def test_a_state_is_not_changed():
    q, k = draw(100, 2, 1)
    selector = Quest(budget=16).selector(2, 4)
    _, state = selector.choose(q[:, :, :70], k[:, :, :70], None, scale=SCALE)
    before = state.low.clone(), state.high.clone()
    selector.choose(q[:, :, 70:], k, state, scale=SCALE)
    assert state.low.equal(before[0])
    assert state.high.equal(before[1])


@HEADS
def test_attention_over_chosen_pages(heads, groups):
    q, k = draw(90, heads, groups)
    v = torch.randn_like(k)
    selector = Quest(budget=32).selector(2, 4)
    selector.mask(q[:, :, :89], k[:, :, :89], scale=SCALE)
    mask = selector.mask(q[:, :, 89:], k, scale=SCALE)
    wide_k, wide_v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    out = attention(q[:, :, 89:], wide_k, wide_v, mask, scale=SCALE)
    seen = row_by_definition(q[:, :, 89:], k, 2)[:, :, None]
    expected = functional.scaled_dot_product_attention(
        q[:, :, 89:], wide_k, wide_v, attn_mask=seen, scale=SCALE
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"budget": 15}, "a page"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"dense_layers": -1}, "dense_layers"),
    ],
    ids=["small", "share-0", "share", "layers"],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        Quest(**changes)
