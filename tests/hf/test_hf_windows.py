"""How calibration texts become calibration windows and held-out windows."""

from __future__ import annotations

import pytest
import torch

from dynmask.hf.windows import Text, cut, make_batches, make_windows, split

LENGTH = 24
NO_BOS = torch.empty(0, dtype=torch.int64)


class Words:
    """A tokenizer of words, with a BOS token before each text."""

    bos_token_id = 1

    def __call__(self, text, *, verbose):
        return {"input_ids": [1, *(3 + len(word) for word in text.split())]}


def numbered(sizes: list[int]) -> list[Text]:
    """Texts whose tokens are all different."""
    ids = torch.arange(sum(sizes)).split(sizes)
    return [Text(part, NO_BOS) for part in ids]


def windows(tokenizer, texts, **change):
    cuts = {"capture_length": LENGTH, "coverage_length": 4 * LENGTH, "holdout": 0.25, "seed": 0}
    return make_windows(tokenizer, texts, **{**cuts, **change})


def sizes_of(sizes, holdout=0.25, seed=0):
    kept, held = split(numbered(sizes), capture_length=LENGTH, holdout=holdout, seed=seed)
    return [text.tokens for text in kept], [text.tokens for text in held]


def test_windows_of_one_string_are_its_start_and_its_end():
    text = " ".join("x" * (n % 20 + 1) for n in range(120))
    body = torch.tensor([3 + n % 20 + 1 for n in range(120)])
    kept, held = windows(Words(), [text, "", "a b"], holdout=0.4)
    assert [len(w) for w in kept] == [24, 24, 24]  # 3 tokens are too few for a window
    assert [len(w) for w in held] == [49]
    assert all(w[0] == 1 for w in kept + held)
    assert torch.equal(torch.cat([w[1:] for w in kept]), body[:69])
    assert torch.equal(held[0][1:], body[72:])


@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_in_both_parts_and_held_out_runs_are_whole(seed):
    sizes = [100, 130, 90, 200, 7, 140, 3]
    texts = [text.ids.tolist() for text in numbered(sizes)]
    kept, held = windows(None, texts, seed=seed)
    used = torch.cat(kept + held)
    assert len(used.unique()) == len(used)
    assert max(map(len, kept)) == LENGTH
    assert all(6 <= len(window) <= 4 * LENGTH for window in held)
    assert max(map(len, held)) >= 90
    # A held-out text gives all its windows, one after another.
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    whole = {int(window[0]) for window in held} & set(starts)
    for start in whole:
        size = sizes[starts.index(start)]
        run = torch.cat([w for w in held if start <= int(w[0]) < start + size])
        assert torch.equal(run, torch.arange(start, start + len(run)))
        assert size - len(run) < 6


def test_the_share_that_is_held_out_is_about_the_wanted_one():
    sizes = [100, 110, 120, 90, 95, 105, 130, 115, 85, 100]
    for seed in range(20):
        kept, held = sizes_of(sizes, seed=seed)
        assert sorted(kept + held) == sorted(sizes)
        assert sum(held) == pytest.approx(0.25 * sum(sizes), abs=65)
    assert len({tuple(sizes_of(sizes, seed=seed)[1]) for seed in range(20)}) > 5
    assert sizes_of(sizes, seed=3) == sizes_of(sizes, seed=3)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("holdout", [0.01, 0.25, 0.99])
@pytest.mark.parametrize(
    "sizes",
    [[24, 24], [24, 10, 9], [23, 24, 23], [200, 30], [100, 6, 7, 100], [400, 6]],
    ids=str,
)
def test_both_parts_have_a_text_and_calibration_one_that_fills(sizes, holdout, seed):
    kept, held = sizes_of(sizes, holdout, seed)
    assert max(kept) >= LENGTH
    assert held


def test_the_only_text_that_fills_the_capture_length_calibrates():
    for seed in range(10):
        kept, held = sizes_of([23, 200, 22, 21], 0.9, seed)
        assert (kept, held) == ([200], [23, 22, 21])


def test_texts_longer_than_the_capture_length_are_held_out_first():
    for seed in range(10):
        assert max(sizes_of([100, 100, *[20] * 10], 0.25, seed)[1]) == 100


@pytest.mark.parametrize(
    ("size", "holdout", "expected"),
    [
        pytest.param(30, 0.25, 6, id="a quarter window at least"),
        pytest.param(40, 0.25, 10, id="the share"),
        pytest.param(40, 0.9, 16, id="a full window calibrates"),
        pytest.param(48, 0.25, 24, id="a full window if there are two"),
        pytest.param(200, 0.25, 50, id="the share of a long text"),
    ],
)
def test_a_single_text_is_held_out_at_its_end(size, holdout, expected):
    texts = numbered([size])
    (start,), (end,) = split(texts, capture_length=LENGTH, holdout=holdout, seed=0)
    assert torch.equal(torch.cat([start.ids, end.ids]), texts[0].ids)
    assert end.tokens == expected


def test_a_text_that_is_too_short_for_a_window_does_not_make_two():
    kept, held = sizes_of([48, 5])
    assert (kept, held) == ([24], [24])


def test_long_texts_count_with_16_capture_lengths():
    kept, held = windows(None, [[5] * 10_000])
    assert sum(map(len, kept + held)) == 16 * LENGTH
    kept, held = windows(None, [[5] * 10_000], coverage_length=912)
    assert sum(map(len, kept + held)) == 912


def test_cut():
    found = cut(numbered([50, 29, 5]), 24, least=6)
    assert [len(window) for window in found] == [24, 24, 24]


def test_batches():
    given = [torch.full((n,), n) for n in (5, 9, 8, 3, 9, 7)]
    batches = make_batches(given, 4)
    assert [b.lengths.tolist() for b in batches] == [[9, 9, 8, 7], [5, 3]]
    assert batches[1].attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
