"""What a run counts: exact after any number of calls, in memory that does not grow with them."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from itertools import accumulate

import pytest
import torch
from hf_models import make_model, make_plan, random_ids

from dynmask.hf import accelerate, tally
from dynmask.hf.tally import DeviceSum, Tally
from dynmask.masks import Stripes
from dynmask.ops import computed_pairs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONGEST = 3000


def some_stripes(seed):
    draw = torch.Generator().manual_seed(seed)

    def some(most, first=0):
        rest = 1 + torch.randperm(most, generator=draw)[:5].sort().values
        return torch.cat([torch.tensor([first]), rest]) if first == 0 else rest

    corner = torch.rand(2, 20, 20, generator=draw).gt(0.7).tril()
    return Stripes((some(90, 1), some(60, 1)), (some(40), some(99)), torch.zeros(2).bool(), corner)


def shown_before(mask):
    """By definition: pairs in rows ``0 .. n - 1`` for each n, over both heads."""
    row, key = torch.arange(LONGEST), torch.arange(150)
    counts = torch.zeros(LONGEST, dtype=torch.int64)
    for head in range(mask.heads):
        columns, offsets = mask.columns[head], mask.offsets[head]
        counts += (offsets <= row[:, None]).sum(1)
        near = torch.isin(row[:, None] - key, offsets)
        seen = torch.isin(key, columns) & (key <= row[:, None])
        seen[:20, :20] |= mask.corner[head]
        counts += (seen & ~near).sum(1)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).tolist()


def entries(of):
    """How many things the tally's containers hold."""
    total = 0
    for value in vars(of).values() if isinstance(of, Tally) else of:
        total += 1
        if isinstance(value, dict):
            total += entries(value.values())
        elif isinstance(value, list | tuple | set) or hasattr(value, "popleft"):
            total += entries(value)
    return total


def test_thousands_of_lengths_are_counted_exactly_in_flat_memory():
    masks, draw = [some_stripes(seed) for seed in range(2)], random.Random(0)
    before = [shown_before(mask) for mask in masks]
    causal_before = list(accumulate(range(LONGEST + 1)))
    counted, wanted, sizes, bytes_held = Tally(), Counter(), [], []
    tracemalloc.start()
    for number in range(2400):
        kind = draw.choice(["prefill", "chunk"])
        impl = draw.choice(["cpu", "sdpa"])
        length = draw.randrange(1, LONGEST)
        first = 0 if kind == "prefill" else draw.randrange(length)
        for layer, mask in enumerate(masks):
            counted.add(kind, impl)
            counted.add_layer(kind, impl, layer, mask, ((first, length), (0, 0)))
            causal = 2 * (causal_before[length] - causal_before[first])
            wanted[kind, "causal"] += causal
            wanted[kind, "shown"] += before[layer][length] - before[layer][first]
            wanted[kind, "computed"] += (
                int(computed_pairs(mask, length - first, length).sum()) if impl == "cpu" else causal
            )
        if number % 600 == 599:
            sizes.append(entries(counted))
            bytes_held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(sizes) == sizes[0] < 10 * tally._MOST_SHAPES
    assert bytes_held[-1] - bytes_held[0] < 100_000
    for _ in range(2):  # Reading changes nothing.
        found = counted.summary()
        assert sum(found["calls"].values()) == 4800
        for kind in ("prefill", "chunk"):
            shown, causal = wanted[kind, "shown"], wanted[kind, "causal"]
            assert found["density"][kind] == shown / causal
            assert found["computed_density"][kind] == wanted[kind, "computed"] / causal


def test_lengths_that_come_again_stay():
    """Those used all the time are not counted anew for every one that is used once."""
    counted, counts, mask = Tally(), [], some_stripes(0)
    count = counted._count
    counted._count = lambda shape: (counts.append(shape), count(shape))
    for length in range(1, 2000):
        for each in (length, 2500):
            counted.add_layer("prefill", "sdpa", 0, mask, ((0, each),))
    assert len(counts) == 2000 - tally._MOST_SHAPES
    assert all(shape[-1] != 2500 for shape in counts)


@pytest.mark.parametrize("mode", ["static", "auto", "dynamic", "dense"])
def test_a_runs_statistics_do_not_depend_on_how_much_is_kept(mode, monkeypatch):
    model = make_model("llama")
    plan, found = make_plan(model), []
    for most in (512, 4):
        monkeypatch.setattr(tally, "_MOST_SHAPES", most)
        with accelerate(model, plan, mode=mode) as run, torch.no_grad():
            for length in range(1, 60):
                model(random_ids(1 + length % 2, length))
                assert len(run._tally._shapes) <= most
        found.append(run.stats())
    assert found[0].pop("mask_seconds") > 0 or mode in ("dense", "dynamic")
    found[1].pop("mask_seconds")
    assert found[0] == found[1]
    assert found[0]["calls"] == {"prefill": 59 * 3}
    assert (found[0]["density"]["prefill"] == 1) is (mode in ("dense", "dynamic"))


class Event:
    """A CUDA event that happens when it is told to, or waited for."""

    waited: int = 0

    def __init__(self, at):
        self.at, self.happened = at, False

    def query(self):
        return self.happened

    def synchronize(self):
        Event.waited += not self.happened
        self.happened = True

    def elapsed_time(self, end):
        assert end.happened
        return end.at - self.at


@pytest.mark.parametrize("behind", [0, 30, 200, 10_000], ids=lambda n: f"{n} behind")
def test_events_are_added_up_as_they_happen(behind):
    """A GPU lags by so many calls; nobody waits for it unless it never comes."""
    Event.waited, counted, ends, most = 0, Tally(), [], 0
    for number in range(5000):
        ends.append(Event(2 * number + 1))
        counted.add_events(Event(2 * number), ends[-1])
        for end in ends[-behind - 1 :][:1] if len(ends) > behind else []:
            end.happened = True
        most = max(most, len(counted._events))
    assert most <= max(tally._MOST_EVENTS, min(behind + 1, tally._MOST_UNFINISHED)) + 1
    assert (Event.waited > 0) is (behind > tally._MOST_UNFINISHED)
    assert counted.mask_seconds == pytest.approx(5.0)
    assert not counted._events
    assert counted.mask_seconds == pytest.approx(5.0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_sum_on_the_device_in_and_out_of_inference_mode(device):
    total, wanted, taken = DeviceSum(torch.device(device)), 0, 0
    for number in range(2000):
        with torch.inference_mode(number % 3 == 0):
            count = torch.tensor(number, device=device) * 2
            taken += total.add(count, 2 * number)
        wanted += 2 * number
    assert taken == 0
    assert total.take() == wanted
    assert total.take() == 0


def test_a_sum_is_read_before_it_overflows():
    total, count = DeviceSum(torch.device("cpu")), 2**58 + 1
    taken = sum(total.add(torch.tensor(count), count) for _ in range(100))
    assert taken + total.take() == 100 * count > 2**64


@needs_gpu
def test_counts_from_several_streams():
    counted, device = Tally(), torch.device("cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    for number in range(3000):
        with torch.cuda.stream(streams[number % 3]):
            one = torch.ones((), dtype=torch.int64, device=device)
            counted.add_pairs("prefill", causal=4, shown=one, computed=one * 2)
    assert len(counted._sums) == 6
    found = counted.summary()
    assert found["density"] == {"prefill": 0.25}
    assert found["computed_density"] == {"prefill": 0.5}
