"""Batches of running text and of associative recall, and how steps are cut into micro batches."""

import dataclasses
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from dynmask.train.batches import HeldOut, Steps, positions
from dynmask.train.corpus import Corpus
from dynmask.train.mqar import Mqar, Recall, _subset
from dynmask.train.recipe import Recipe
from dynmask.train.sections import Phase, Text, WarmupStableDecay
from dynmask.train.source import Step
from dynmask.train.windows import Windows

END = 0


def numbered(tokens, every=10):
    """A corpus whose tokens count up, save that each ``every``-th one ends a document."""
    ids = np.arange(1, tokens + 1, dtype=np.uint16)
    ids[every - 1 :: every] = END
    return Corpus(ids, [])


def step(within, rows, length, phase=0, seed=0):
    return Step(within, phase, within, rows, length, seed)


@pytest.mark.parametrize("length", [7, 64, 99])
def test_an_epoch_takes_every_window_once(length):
    windows = Windows(numbered(1000, every=2000), END, packed=False)
    count, seen = windows.count(length), []
    starts = [windows.at(step(n, 1, length)).ids[0] for n in range(2 * count)]
    for row in starts:
        assert (np.diff(row) == 1).all(), "a window is running text"
        seen.append(int(row[0]))
    first, second = seen[:count], seen[count:]
    for epoch in (first, second):
        assert len({start % length for start in epoch}) == 1
        assert len(set(epoch)) == count
    assert first != second
    assert sorted(first) != first


def test_windows_do_not_depend_on_how_they_are_asked_for():
    windows = Windows(numbered(1000), END, packed=True)
    whole = windows.at(step(0, 6, 64)).ids
    again = np.concatenate([windows.at(step(n, 2, 64)).ids for n in (0, 1, 2)])
    np.testing.assert_array_equal(whole, again)
    assert not np.array_equal(whole, windows.at(step(0, 6, 64, seed=1)).ids)
    assert not np.array_equal(whole, windows.at(step(0, 6, 64, phase=1)).ids)


def test_text_of_a_single_window():
    windows = Windows(numbered(70), END, packed=False)
    assert windows.at(step(5, 3, 64)).ids.shape == (3, 64)
    with pytest.raises(ValueError, match="70 tokens, one sequence 71"):
        windows.require(71)


def test_documents_of_packed_windows():
    batch = Windows(numbered(500), END, packed=True).at(step(0, 4, 64))
    for ids, weights, documents in zip(batch.ids, batch.weights, batch.documents, strict=True):
        new = 0
        for slot, token in enumerate(ids):
            assert documents[slot] == new
            after_end = slot > 0 and ids[slot - 1] == END
            assert weights[slot] == (0.0 if after_end else 1.0)
            new += token == END
    unpacked = Windows(numbered(500), END, packed=False).at(step(0, 4, 64))
    assert unpacked.documents is None
    assert (unpacked.weights == 1).all()


def test_positions():
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert positions(documents).tolist() == expected


@pytest.mark.parametrize("length", [64, 111, 256])
def test_recall_answers_each_key_once(length):
    data = Mqar(vocab=128, pairs=20, filler=5)
    batch = Recall(data).at(step(3, 40, length))
    pairs = min(20, length // 4)
    for ids, weights in zip(batch.ids, batch.weights, strict=True):
        known = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(known) == pairs
        assert all(1 <= key < 64 <= value < 128 for key, value in known.items())
        answers = np.flatnonzero(weights)
        assert (weights[answers] == 1).all()
        assert answers.min() > 2 * pairs
        asked = {ids[slot - 1]: ids[slot] for slot in answers}
        assert asked == known
        rest = np.ones(length, dtype=bool)
        rest[: 2 * pairs] = rest[answers] = rest[answers - 1] = False
        assert ((ids[rest] >= 128) & (ids[rest] < data.vocab_size)).all()


def test_keys_are_drawn_evenly():
    drawn = _subset(np.random.default_rng(0), 24_000, 4, 3)
    orders = Counter(map(tuple, drawn.tolist()))
    assert set(orders) == set(permutations(range(4), 3))
    # Five standard deviations of a count of 1,000.
    assert all(abs(count - 1000) < 160 for count in orders.values())


def test_recall_with_fewer_pairs():
    recall = Recall(Mqar(vocab=128, pairs=20, fewest=3))
    counts = []
    for number in range(200):
        weights = recall.at(step(number, 2, 64)).weights
        first, second = weights.sum(1)
        assert first == second, "all rows of a step have as many"
        counts.append(int(first))
    assert set(counts) == set(range(3, 17))
    assert recall.at(step(0, 2, 8)).weights.sum() == 2 * 2, "a short row has room for two"


@pytest.mark.parametrize(("power", "low", "high"), [(1.0, 0.45, 0.55), (0.01, 0.05, 0.2)])
def test_where_questions_stand(power, low, high):
    length = 1024
    batch = Recall(Mqar(vocab=128, pairs=4, power=power)).at(step(0, 400, length))
    slots = (np.nonzero(batch.weights)[1] - 9) / (length - 10)
    assert low < slots.mean() < high


def test_recall_follows_seed_and_step():
    recall = Recall(Mqar(vocab=128, pairs=20))
    first = recall.at(step(1, 4, 128)).ids
    np.testing.assert_array_equal(first, recall.at(step(1, 4, 128)).ids)
    for other in (step(2, 4, 128), step(1, 4, 128, seed=1)):
        assert not np.array_equal(first, recall.at(other).ids)
    with pytest.raises(ValueError, match="3 tokens has no room"):
        recall.require(3)


RECIPE = Recipe(
    model={"type": "dma"},
    data=Text(),
    phases=(Phase(64, 3), Phase(128, 2)),
    tokens_per_step=512,
    schedule=WarmupStableDecay(1, 1),
)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_up_the_step(parts):
    source = Windows(numbered(2000), END, packed=True)
    whole, cut = Steps(source, RECIPE), Steps(source, RECIPE, parts=parts)
    assert (len(whole), len(cut)) == (5, 5 * parts)
    for number in (0, 4):
        items = [cut[number * parts + part] for part in range(parts)]
        for name in ("input_ids", "weights", "documents", "position_ids"):
            together = torch.cat([item[name] for item in items])
            assert torch.equal(together, whole[number][name])
        # Over all micro batches the norms add up to the weights that count.
        total = whole[number]["weights"][:, 1:].sum()
        assert sum(item["norm"] for item in items) == pytest.approx(total.item())
        assert whole[number]["norm"] == total


def test_steps_depend_on_seed_and_number_alone(sequences):
    steps = Steps(sequences, RECIPE)
    late = steps[4]
    assert late["input_ids"].shape == late["weights"].shape == (4, 128)
    assert steps[0]["input_ids"].shape == (8, 64)
    assert torch.equal(Steps(sequences, RECIPE)[4]["input_ids"], late["input_ids"])
    other = dataclasses.replace(RECIPE, seed=1)
    assert not torch.equal(Steps(sequences, other)[4]["input_ids"], late["input_ids"])


def test_held_out_rows_are_not_those_of_training():
    recall = Recall(Mqar(vocab=128, pairs=8))
    held_out = HeldOut(recall, RECIPE)
    assert len(held_out) == RECIPE.eval_sequences
    assert held_out[3]["input_ids"].shape == (1, 128)
    assert torch.equal(held_out[3]["input_ids"], HeldOut(recall, RECIPE)[3]["input_ids"])
    seen = Steps(recall, RECIPE)[3]["input_ids"]
    assert not (seen[:, :16] == held_out[3]["input_ids"][:, :16]).all(1).any()
