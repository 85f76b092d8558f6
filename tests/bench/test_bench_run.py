"""The harness on a CPU at tiny sizes: documents, errors, timing, inputs."""

import dataclasses
import itertools
import json

import pytest
import torch

import dynmask
from dynmask.bench import BENCHMARKS, SCORES, Settings, environment, run_benchmark, settings_for
from dynmask.bench.engine import Engine, engine_for, unused, visible_pairs
from dynmask.bench.inputs import make_inputs, make_score
from dynmask.bench.results import failures, load
from dynmask.bench.timing import Clock, Run, Times, measure, ratio
from dynmask.masks import Lifetimes

RIGHT = Engine.named("reference")


def tiny(benchmark, **changed):
    chosen = {"lengths": (40, 65), "scores": ("normal", "dma"), "keep": 8, "rounds": 3}
    return settings_for(benchmark, device="cpu", **(chosen | {"impl": "reference"} | changed))


def cells_of(document):
    return [
        (cell["length"], cell.get("call") or cell.get("cache"), cell["score"])
        for cell in document["cells"]
    ]


PARTS = {"decode": ("bounded", "unbounded"), "table2": ("prefill", "decode", "bounded")}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_document(benchmark, tmp_path):
    lengths_done = []
    settings = tiny(benchmark)
    document = run_benchmark(
        settings,
        on_cells=lambda doc, new: lengths_done.append((doc["complete"], new[0]["length"])),
    )
    assert failures(document) == []
    assert lengths_done == [(False, 40), (True, 65)]
    expected = itertools.product((40, 65), PARTS.get(benchmark, (None,)), ("normal", "dma"))
    assert sorted(cells_of(document), key=str) == sorted(expected, key=str)
    for cell in document["cells"]:
        assert cell["times"]
        for time in cell["times"].values():
            assert 0 < time["low"] <= time["median"] <= time["high"]
            assert time["rounds"] == 3
    assert document["device"]["type"] == "cpu"
    assert document["versions"]["dynmask"] == dynmask.__version__
    assert "transformers" not in document["versions"]
    assert Settings(**document["settings"]) == settings
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document, allow_nan=False))
    assert load(path) == json.loads(path.read_text())


def test_op_counts_what_it_says():
    document = run_benchmark(tiny("op", scores=("normal",), lengths=(65,)))
    (cell,) = document["cells"]
    score = make_score(tiny("op"), "normal", 65)
    seen = Lifetimes.top(score, keep=8).dense(65)
    assert cell["pairs"] == int(seen.sum()) * 2  # two query heads to a kv head
    assert cell["density"] == pytest.approx(float(seen.double().mean()) * 65 / 33)
    attention = cell["times"]["attention"]["median"]
    assert cell["useful_flops"] == pytest.approx(4 * 32 * cell["pairs"] / attention)
    dense = cell["dense"]
    assert dense["flops"]["flash"] * dense["times"]["flash"]["median"] == pytest.approx(
        4 * 32 * 4 * 65 * 33
    )
    median = dense["times"][dense["fastest"]]["median"] / cell["times"]["total"]["median"]
    assert cell["ratio"]["median"] == pytest.approx(median)
    assert cell["ratio"]["low"] <= median <= cell["ratio"]["high"]


def test_a_backend_with_a_schedule_is_timed_with_it():
    made = []
    engine = dataclasses.replace(RIGHT, prepare=lambda mask, q, k: made.append((mask, q, k)))
    document = run_benchmark(tiny("op", lengths=(40,), scores=("normal",)), engine=engine)
    (cell,) = document["cells"]
    assert "schedule" in cell["times"]
    assert "first" not in cell["times"]
    assert {(q, k) for _, q, k in made} == {(40, 40)}
    assert len({id(mask) for mask, _, _ in made}) == len(made)  # a fresh one each time


def late(score, keep, offset=0):
    """A wrong selection: keeps one key too many."""
    return Lifetimes.top(score, keep=keep + 1, offset=offset)


@pytest.mark.parametrize("benchmark", ["table2", "decode"])
def test_one_query_row_is_selected_alone(benchmark):
    offsets = set()

    def select(score, keep, offset=0):
        offsets.add((score.shape[-1], offset))
        return Lifetimes.top(score, keep=keep, offset=offset)

    document = run_benchmark(
        tiny(benchmark, lengths=(40,)), engine=dataclasses.replace(RIGHT, select=select)
    )
    assert failures(document) == []
    assert offsets == {(40, 39)} | ({(40, 0)} if benchmark == "table2" else set())


def coarse(q, k, v, mask, bias):
    """A wrong attention: 2 % off."""
    return RIGHT.attend(q, k, v, mask, bias) * 1.02


class WrongBias(torch.autograd.Function):
    """Right forward, doubled gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def wrong_gradient(q, k, v, mask, bias):
    return RIGHT.attend(q, k, v, mask, WrongBias.apply(bias))


@pytest.mark.parametrize(
    ("benchmark", "change", "message"),
    [
        ("op", {"select": late}, "selection"),
        ("op", {"attend": coarse}, "attention"),
        ("select", {"select": late}, "selection"),
        ("decode", {"attend": coarse}, "attention"),
        ("backward", {"select": late}, "selection"),
        ("backward", {"attend": coarse}, "attention"),
        ("backward", {"attend": wrong_gradient}, "dbias"),
        ("table2", {"select": late}, "selection"),
        ("table2", {"attend": coarse}, "attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())).__name__,
)
def test_wrong_results_are_errors_and_never_timed(benchmark, change, message):
    engine = dataclasses.replace(RIGHT, **change)
    document = run_benchmark(tiny(benchmark, lengths=(40,)), engine=engine)
    assert len(failures(document)) == len(document["cells"]) > 0
    for cell in document["cells"]:
        assert message in cell["error"]
        assert "times" not in cell
        assert "ratio" not in cell


def test_one_wrong_kind_costs_its_own_cell_only():
    def select(score, keep, offset=0):
        return late(score, keep) if float(score.min()) > 0 else Lifetimes.top(score, keep=keep)

    document = run_benchmark(
        tiny("op", lengths=(40,)), engine=dataclasses.replace(RIGHT, select=select)
    )
    assert [(cell["score"], cell["status"]) for cell in document["cells"]] == [
        ("normal", "ok"),
        ("dma", "error"),
    ]


def test_a_crash_costs_one_length_only():
    def attend(q, k, v, mask, bias):
        if k.shape[2] == 40:
            raise RuntimeError("out of memory")
        return RIGHT.attend(q, k, v, mask, bias)

    document = run_benchmark(tiny("op"), engine=dataclasses.replace(RIGHT, attend=attend))
    assert [(cell["length"], cell["status"]) for cell in document["cells"]] == [
        (40, "error"),
        (65, "ok"),
        (65, "ok"),
    ]
    assert "out of memory" in document["cells"][0]["error"]


class FakeClock(Clock):
    """Every call takes what its run returns, in seconds; keeps the order."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.calls = []

    def seconds(self, run):
        name, took = run()
        self.calls.append(name)
        return took


def test_rounds_are_interleaved():
    clock = FakeClock()
    runs = {"a": Run(lambda: ("a", 0.1)), "b": Run(lambda: ("b", 0.2))}
    times = measure(runs, clock, rounds=4, warmups=3, budget=100.0)
    assert clock.calls == [*"aaa", *"bbb", *"abababab"]
    assert times["b"] == Times(0.2, 0.2, 0.2, 4)


def test_costly_runs_get_fewer_rounds():
    clock = FakeClock()
    runs = {"slow": Run(lambda: ("slow", 5.0)), "fast": Run(lambda: ("fast", 0.1))}
    times = measure(runs, clock, rounds=10, warmups=5, budget=4.0)
    assert times["slow"].rounds == 3
    assert times["fast"].rounds == 10
    assert clock.calls.count("slow") == 4  # one warm-up
    assert clock.calls.count("fast") == 15


def test_fresh_arguments_are_not_timed():
    given = iter(range(9))
    run = Run(lambda number: given_to.append(number), lambda: next(given))
    given_to = []
    times = measure({"a": run}, Clock(torch.device("cpu")), rounds=3, warmups=2, budget=9.0)
    assert given_to == [0, 1, 2, 3, 4]
    assert times["a"].rounds == 3


def test_quartiles_and_ratio():
    assert Times.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Times(3.0, 2.0, 4.0, 5)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 1)
    got = ratio(Times(6.0, 4.0, 8.0, 5), Times(2.0, 1.0, 4.0, 5))
    assert got == {"median": 3.0, "low": 1.0, "high": 8.0}


def test_scores_are_what_they_say():
    settings = tiny("op", batch=2)
    scores = {kind: make_score(settings, kind, 4000) for kind in SCORES}
    for score in scores.values():
        assert score.shape == (2, 2, 4000)
        assert score.dtype == torch.float32
    assert bool((scores["rising"].diff() > 0).all())
    assert bool((scores["dma"] > 0).all())

    def neighbours(score):
        return float(torch.corrcoef(torch.stack([score[0, 0, 1:], score[0, 0, :-1]]))[0, 1])

    assert abs(neighbours(scores["normal"])) < 0.1
    assert neighbours(scores["local"]) > 0.3
    assert float(scores["recent"][..., -1000:].mean() - scores["recent"][..., :1000].mean()) > 2
    # Rising scores keep a sliding window.
    window = Lifetimes.window(4000, window=8).expiry.expand(2, 2, -1)
    top = Lifetimes.top(scores["rising"], keep=8).expiry
    assert torch.equal(top.clamp_max(4000), window.clamp_max(4000))


def test_inputs_are_the_same_again_and_differ_from_each_other():
    settings = tiny("op")
    first, again = make_inputs(settings, 40), make_inputs(settings, 40)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    score = make_score(settings, "normal", 40)
    assert not torch.equal(first.k[0, 0, 0], first.v[0, 0, 0])
    assert not torch.equal(first.q.flatten()[:80], score.flatten())
    assert make_inputs(settings, 40, q_len=1).q.shape == (1, 4, 1, 32)


def test_defaults_on_a_gpu_are_the_targets():
    settings = settings_for("op", device="cuda")
    assert settings.lengths == (8192, 32768, 131072, 524288)
    assert (settings.heads, settings.groups, settings.dim, settings.keep) == (32, 8, 128, 2048)
    assert settings.dtype == "bfloat16"
    assert settings_for("decode", device="cuda").batch == 64
    table = settings_for("table2", device="cuda")
    assert (table.lengths[0], table.lengths[-1], table.heads, table.groups) == (256, 32768, 2, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": 0}, "keep=0"),
        ({"lengths": (1,)}, "lengths"),
        ({"lengths": ()}, "lengths"),
        ({"scores": ("frob",)}, "frob"),
        ({"heads": 3}, "heads=3"),
        ({"rounds": 0}, "rounds=0"),
        ({"budget": 0.0}, "budget"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings(changed, message):
    with pytest.raises(ValueError, match=message):
        tiny("op", **changed)


def test_engine_is_checked_before_anything_is_measured():
    with pytest.raises(ValueError, match="frob"):
        engine_for(tiny("op", impl="frob"))
    assert engine_for(tiny("op", impl="auto")).impl != "auto"


def test_unused_forgets_the_schedule():
    mask = Lifetimes.window(10, window=3)
    mask.__dict__["_lists"] = "schedule"
    copy = unused(mask)
    assert torch.equal(copy.expiry, mask.expiry)
    assert copy.most == mask.most
    assert "_lists" not in copy.__dict__
    assert visible_pairs(mask, 4) == int(mask.dense(10).sum()) * 4


def test_no_commit_and_no_clocks_where_there_are_none(monkeypatch, tmp_path):
    installed = tmp_path / "site" / "dynmask" / "bench" / "environment.py"
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert environment.commit() is None
    assert environment.clocks("cpu") is None


def test_ceilings_are_rates():
    rates = environment.ceilings(Clock(torch.device("cpu")))
    assert rates["copy"] > 1e6
    assert rates["matmul"] > 1e6
