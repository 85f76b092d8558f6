"""benchmarks/trained: tiny runs of every method, resumption, the order of cells, and the page."""

import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from trained_arguments import arguments, breaks, late

from dynmask.assets import load_texts
from dynmask.train.models import build_model
from dynmask.train.mqar import Mqar
from dynmask.train.recipe import Recipe
from dynmask.train.trainer import NonFiniteLossError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "trained"
METHODS = ("mha", "swa", "mla", "nsa", "dma")
WINDOWED = "dma-window"  # Of the scaling experiment alone.
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OWN = {
    "mha": {"head_dim": 8, "num_key_value_heads": 1},
    "swa": {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 24},
    "mla": {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    "nsa": {"head_dim": 8, "num_key_value_heads": 1, "window": 24, "compress_hidden": 4},
    "dma": {"head_dim": 8, "num_key_value_heads": 1, "keep": 24},
    WINDOWED: {"head_dim": 8, "num_key_value_heads": 1, "keep": 24, "window": 12},
}


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    names = ("claims", "jobs", "grid", "cells", "mqar", "mqar_times", "scaling", "past")
    names += ("trained_page",)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            del sys.modules[name]


def recipes(source, target, **changes):
    """The committed recipes of a folder with tiny models and few steps."""
    target.mkdir()
    for method in (name for name in OWN if (source / f"{name}.yaml").exists()):
        raw = yaml.safe_load((source / f"{method}.yaml").read_text(encoding="utf-8"))
        raw["model"] |= TINY | OWN[method]
        raw |= {"phases": [{"length": 64, "steps": 3}], "tokens_per_step": 128} | changes
        raw |= {"log_every": 1, "eval_every": 3, "eval_sequences": 2}
        raw["schedule"]["warmup_steps"] = 1
        if "decay_steps" in raw["schedule"]:
            raw["schedule"]["decay_steps"] = 1
        (target / f"{method}.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


def write_grid(folder, **grid):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    return path


MQAR = {"lengths": [64, 32], "rows": 3, "tokens_per_call": 128}


@pytest.fixture
def recall(scripts, tmp_path):
    """Makes a runner of two methods, and what evaluates."""
    folder = tmp_path / "mqar"
    folder.mkdir()
    data = {"type": "mqar", "vocab": 64, "pairs": 8, "filler": 4}
    recipes(FOLDER / "mqar/d64", folder / "tiny", data=data)

    def make(methods=("mha", "dma"), lrs=(0.01,), seeds=(0,), **changes):
        path = write_grid(
            folder,
            methods=list(methods),
            lrs=list(lrs),
            seeds=list(seeds),
            parts=[{"name": "tiny", "recipes": "tiny"}],
            evaluation=MQAR,
            times={"tokens": 64, "rounds": 3},
        )
        grid = scripts.grid.Grid.load(path)
        return scripts.cells.Runner(grid, folder, arguments(tmp_path, **changes))

    def evaluate(model, tokenizer, cell):
        return scripts.mqar.evaluate(model, tokenizer, cell, evaluation=MQAR)

    return SimpleNamespace(make=make, evaluate=evaluate)


def test_every_method_is_trained_once(scripts, recall, tmp_path):
    first = recall.make(METHODS)
    first.run(recall.evaluate, keep=False)
    kept = scripts.cells.read_rows(first.args.out)
    assert [row["method"] for row in kept] == list(METHODS)
    for row in kept:
        assert "failed" not in row, row
        assert [(at["length"], at["pairs"]) for at in row["lengths"]] == [(64, 8), (32, 8)]
        assert all(0 <= at["accuracy"] <= 1 for at in row["lengths"])
        assert row["seed"] == 0
        assert row["steps"] == 3
        assert row["tokens"] == 3 * 128
        assert row["environment"]["device"]["name"]
        assert row["recipe"]["model"]["type"]
        assert row["valid_loss"] > 0
    assert [path.name for path in first.runs.iterdir()] == ["claims"], "nothing is kept"

    # A line that was cut off is written again; no other is.
    text = first.args.out.read_text()
    first.args.out.write_text(text[:-40])
    second = recall.make(METHODS)
    second.run(recall.evaluate, keep=False)
    again = scripts.cells.read_rows(first.args.out)
    assert [row["key"] for row in again] == [row["key"] for row in kept]
    assert again[:-1] == kept[:-1]
    assert again[-1]["loss"] == kept[-1]["loss"], "the same run"

    pages = scripts.trained_page
    text, pictures = pages.page({"mqar": again})
    assert not pictures
    for row in again:
        mean = 100 * row["lengths"][0]["accuracy"]
        assert (
            f"| {pages.NAMES[row['method']]} | {row['parameters'] / 1e6:.2f}M | 0.01 | 1 |" in text
        )
        assert f"| {mean:.1f} |" in text
    assert "against MHA" not in text


def test_methods_are_timed_together(scripts, recall, capsys):
    first = recall.make(lrs=[0.01, 0.02])
    first.run(recall.evaluate, keep=True)
    (part,) = first.grid.parts
    best = {m: scripts.grid.best_so_far(first.rows, part, m) for m in first.grid.methods}
    scripts.mqar_times.work(recall.make(("mha", "swa", "dma"), lrs=[0.01, 0.02]))
    *cells, row = first.rows
    assert len(cells) == 4
    assert row["environment"]["device"]["name"]
    assert {m: run["run"] for m, run in row["runs"].items()} == {
        m: one["run"] for m, one in best.items()
    }
    assert row["missing"] == {"swa": "no finished run"}
    assert [(at["length"], at["batch"], set(at["seconds"])) for at in row["times"]] == [
        (64, 1, {"mha", "dma"}),
        (32, 2, {"mha", "dma"}),
    ]
    assert all(one["rounds"] == 3 for at in row["times"] for one in at["seconds"].values())
    scripts.mqar_times.work(recall.make(("mha", "swa", "dma"), lrs=[0.01, 0.02]))
    assert len(first.rows) == 5, "they are there"
    assert "are there" in capsys.readouterr().out

    # Its model is gone, and its cells are as they were.
    assert row["initial"] == []
    shutil.rmtree(first.runs / best["mha"]["run"] / "model")
    scripts.mqar_times.work(recall.make(lrs=[0.01, 0.02]))
    assert first.rows[-1]["initial"] == ["mha"]
    assert set(first.rows[-1]["times"][0]["seconds"]) == {"mha", "dma"}
    cells = list(recall.make(lrs=[0.01, 0.02], seeds=(0, 1)).cells())
    assert [(c.method, c.recipe.seed) for c in cells[-2:]] == [("mha", 1), ("dma", 1)]
    text, _ = scripts.trained_page.page({"mqar": first.rows})
    assert "With initial weights: MHA.\n" in text
    for row, kind in zip(first.rows, ("cpu", *["cuda"] * len(first.rows)), strict=False):
        row["environment"]["device"]["type"] = kind
    assert "Trained on a CPU" not in text, "all were, or none"
    text, _ = scripts.trained_page.page({"mqar": first.rows})
    trained = f"{scripts.trained_page.NAMES[first.rows[0]['method']]} at 0.01 seed 0"
    assert f"Trained on a CPU in float32, the others on a GPU in bfloat16: {trained}.\n" in text


def test_ratios_are_those_of_one_process(scripts):
    def one(median, low, high):
        return {"median": median, "low": low, "high": high, "rounds": 3}

    at = {"length": 64, "batch": 2, "seconds": {"mha": one(4, 2, 5), "dma": one(2, 1, 3)}}
    row = {"part": "x", "runs": {"dma": 0, "mha": 0}, "times": [at], "missing": {"nsa": "gone"}}
    text = scripts.trained_page.times(row)
    assert "| MHA | 4000.00 |\n| DMA | 2000.00, 0.50 (0.20 to 1.50) |" in text
    assert "over 128 tokens" in text
    assert "Not timed: NSA (gone)." in text


def test_a_claim_is_one_process_s(scripts, tmp_path):
    claim = scripts.claims.claim
    with claim(tmp_path / "a", "one") as first, claim(tmp_path / "a", "one") as second:
        assert (first, second) == ("mine", "taken")
    with claim(tmp_path / "a", "one") as again, claim(tmp_path / "b", "one") as other:
        assert (again, other) == ("tried", "mine")
    with claim(tmp_path / "a", "another start") as later:
        assert later == "mine"


def test_lines_are_whole_when_many_write(scripts, tmp_path):
    out = tmp_path / "out.jsonl"
    row = {"key": "x", "curve": [0.5] * 20000}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: scripts.cells.append(out, row), range(40)))
    assert len(out.read_text().splitlines()) == 40
    assert scripts.cells.read_rows(out) == [row] * 40


def test_what_another_process_finds_brings_new_cells(scripts, recall, monkeypatch):
    """It has the one method's first seed: the second seed waits for what that finds."""
    runner = recall.make(["mha", "dma"], seeds=(0, 1))
    theirs, *_ = runner.cells()
    key = scripts.grid.digest([theirs.key, MQAR])
    claim = scripts.claims.claim(runner.runs / "claims" / key, "another start")
    assert claim.__enter__() == "mine"

    def finish(_):
        row = {"key": key, "part": "tiny", "method": "mha", "lr": 0.01, "seed": 0}
        row |= {"valid_loss": 1.0, "train_seconds": 0.0}
        scripts.cells.append(runner.args.out, row)
        claim.__exit__(None, None, None)

    own = SimpleNamespace(**{**vars(time), "sleep": finish})  # libraries sleep, too
    monkeypatch.setattr(scripts.cells, "time", own)
    runner.run(recall.evaluate, keep=False)
    assert [(row["method"], row["seed"]) for row in runner.rows] == [
        ("dma", 0),
        ("dma", 1),
        ("mha", 0),
        ("mha", 1),
    ]


def test_what_breaks_is_tried_once_in_a_start(scripts, recall):
    asked = []

    def broken(model, tokenizer, cell):
        asked.append(cell.method)
        raise ValueError("no figure")

    first = recall.make(["mha"])
    first.run(broken, keep=False)
    first.run(broken, keep=False)  # as another process of the same start would
    assert asked == ["mha"]


def test_a_process_that_is_killed_leaves_the_rest_to_the_others(scripts, tmp_path):
    args = arguments(tmp_path, jobs=2)
    args.runs.mkdir()
    with pytest.raises(SystemExit, match="1 of 2 processes broke"):
        scripts.jobs.go(args, breaks)
    pieces, processes = zip(*map(str.split, args.out.read_text().splitlines()), strict=True)
    assert sorted(pieces) == ["b", "c"]
    assert len(set(processes)) == 1
    assert str(os.getpid()) not in processes


def test_who_has_no_time_says_so(scripts, tmp_path, capsys):
    scripts.jobs.go(arguments(tmp_path), late)
    assert capsys.readouterr().out == "the budget is spent; the same command goes on\n"


def test_a_run_goes_on_where_the_time_ended(scripts, recall, monkeypatch):
    late = recall.make(budget_seconds=0.0)
    with pytest.raises(scripts.cells.OutOfTime):
        late.run(recall.evaluate, keep=False)
    assert not late.args.out.exists()
    short = recall.make(["dma"])
    monkeypatch.setattr(short, "left", lambda: 1e-6)
    with pytest.raises(scripts.cells.OutOfTime):
        short.run(recall.evaluate, keep=False)
    assert not short.args.out.exists()
    recall.make(["dma"]).run(recall.evaluate, keep=False)
    (row,) = scripts.cells.read_rows(short.args.out)
    assert [session["steps"] for session in row["sessions"]] == [1, 3]
    assert [step for step, *_ in row["curve"]] == [1, 2, 3]


def test_a_model_without_figures_is_not_trained_again(scripts, recall, monkeypatch):
    def broken(model, tokenizer, cell):
        raise ValueError("no figure")

    first = recall.make(["mha"])
    first.run(broken, keep=False)
    (row,) = scripts.cells.read_rows(first.args.out)
    assert row["failed"] == "ValueError: no figure"
    monkeypatch.setattr(scripts.cells, "train", None)
    recall.make(["mha"]).run(recall.evaluate, keep=False)
    rows = scripts.cells.read_rows(first.args.out)
    assert ["failed" in row for row in rows] == [True, False]
    assert len(scripts.trained_page.finished(rows)) == 1


def test_a_run_that_diverges_is_a_figure(scripts, recall, monkeypatch):
    def diverges(recipe, *args, **kwargs):
        Path(args[0]).mkdir(parents=True)
        raise NonFiniteLossError("the loss of step 2 is nan; its batch is in a file")

    monkeypatch.setattr(scripts.cells, "train", diverges)
    first = recall.make(["mha"], lrs=[0.01, 9.0])
    first.run(recall.evaluate, keep=False)
    assert [row["diverged"] for row in first.rows] == ["the loss of step 2 is nan"] * 2
    assert "| MHA | diverged | diverged |" in scripts.trained_page.page({"mqar": first.rows})[0]
    ran = {"method": "mha", "lr": 0.01, "seed": 0}
    lost, elsewhere = (first.rows[0] | {"seed": 1}), (first.rows[1] | {"seed": 1})
    assert scripts.trained_page.seeds_of([ran, lost, elsewhere], [ran]) == "1 (1 diverged)"
    assert scripts.trained_page.seeds_of([ran, elsewhere], [ran]) == "1"
    monkeypatch.setattr(scripts.cells, "train", None)
    recall.make(["mha"], lrs=[0.01, 9.0]).run(recall.evaluate, keep=False)


def test_only_and_set(scripts, recall):
    chosen = recall.make(lrs=[0.01, 0.02], only=["method=dma", "lr=0.02,1e-2"], set=["log_every=2"])
    assert [(c.method, c.recipe.lr) for c in chosen.cells()] == [("dma", 0.01), ("dma", 0.02)]
    assert [c.recipe.log_every for c in chosen.cells()] == [2, 2]
    plain = recall.make(lrs=[0.01, 0.02], only=["method=dma"])
    assert [c.key for c in plain.cells()] == [c.key for c in chosen.cells()]
    with pytest.raises(SystemExit, match="--only width=3"):
        recall.make(only=["width=3"])
    with pytest.raises(ValueError, match="--set lr=3"):
        list(recall.make(set=["lr=3"]).cells())
    assert scripts.cells.chosen(["part=d128, 512 pairs,d64"]) == {
        "part": {"d128, 512 pairs", "d64"}
    }


def test_cells_come_in_tables(scripts):
    """One rate and seed of all methods, the other rates, other seeds at the best rate, parts."""
    parts = tuple(scripts.grid.Part(name, lrs=(1.0, 2.0), seeds=(5, 6)) for name in ("a", "b"))
    grid = scripts.grid.Grid("x", ("mha", "dma"), parts, {})
    rows, seen = [], []
    loss = {("mha", 1.0): 3.0, ("mha", 2.0): 2.5, ("dma", 1.0): 2.0, ("dma", 2.0): None}
    for part, method, lr, seed in scripts.grid.in_order(grid, lambda *c: c, lambda: rows):
        seen.append((part.name, method, lr, seed))
        if (part.name, method) != ("b", "dma"):
            row = {"part": part.name, "method": method, "lr": lr, "seed": seed}
            rows.append(row | {"valid_loss": loss[method, lr]})
    assert seen == [
        *[("a", m, lr, 5) for lr in (1.0, 2.0) for m in ("mha", "dma")],
        ("a", "mha", 2.0, 6),
        ("a", "dma", 1.0, 6),
        *[("b", m, lr, 5) for lr in (1.0, 2.0) for m in ("mha", "dma")],
        ("b", "mha", 2.0, 6),  # dma's rates are not all there
    ]


def test_accuracy_is_that_of_the_values(scripts):
    """A model that knows every other pair's value, and one that names any token."""
    task = Mqar(vocab=64, pairs=4, filler=4)

    def oracle(input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 68)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids[:-1]):
                if token < 32 and at >= 8:  # a key behind the pairs
                    place = ids.index(token)
                    if place < 8 and place % 4 == 0:
                        logits[row, at, ids[place + 1]] = 1.0
        return SimpleNamespace(logits=logits)

    found = scripts.mqar.accuracy(oracle, task, 32, rows=5, tokens=64)
    assert found == {"length": 32, "pairs": 4, "rows": 5, "accuracy": 0.5, "error": 0.0}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for number, text in enumerate(load_texts("haystack")):
        (folder / f"train-{number}.txt").write_text(3 * text, encoding="utf-8")  # keys
    (folder / "valid.txt").write_text(load_texts("calibration")[0], encoding="utf-8")
    return folder


def test_scaling_and_past(scripts, books, tmp_path):
    sizes, beyond = tmp_path / "scaling", tmp_path / "past"
    sizes.mkdir()
    beyond.mkdir()
    recipes(FOLDER / "scaling/10M", sizes / "tiny")
    parts = [{"name": "tiny", "recipes": "tiny", "lrs": [0.01], "seeds": [0]}]
    evaluation = {"length": 64, "windows": 3}
    path = write_grid(
        sizes, methods=["mha", "swa", "nsa", "dma", WINDOWED], parts=parts, evaluation=evaluation
    )
    grid = scripts.grid.Grid.load(path)
    texts = [load_texts("perplexity")[0][:4000]]

    def evaluate(model, tokenizer, cell):
        return scripts.scaling.evaluate(model, tokenizer, cell, texts=texts, evaluation=evaluation)

    runner = scripts.cells.Runner(grid, sizes, arguments(tmp_path, data=books))
    runner.run(evaluate, keep=True)
    first = scripts.cells.read_rows(runner.args.out)
    assert [row["method"] for row in first] == list(grid.methods)
    for row in first:
        assert "failed" not in row, row
        assert len(row["perplexity"]["rows"]) == 3
        assert row["epochs"] == pytest.approx(3 * 128 / row["corpus_tokens"], abs=1e-4)
        model = runner.runs / row["run"] / "model"
        assert (model / "config.json").exists()
        assert not list(model.parent.glob("checkpoint-*"))
        assert (model.parent / "corpus").resolve() == runner.runs / "corpus", "tokenised once"
        assert str(tmp_path) not in json.dumps(row)

    fewer = tmp_path / "fewer"
    shutil.copytree(books, fewer)
    (fewer / "train-0.txt").unlink()
    given = arguments(tmp_path, data=fewer, runs=tmp_path / "other", only=["method=mha"])
    more = dataclasses.replace(grid, parts=(dataclasses.replace(grid.parts[0], lrs=(0.02,)),))
    with pytest.raises(SystemExit, match="give the same files, or another --out"):
        scripts.cells.Runner(more, sizes, given).run(evaluate, keep=True)
    assert scripts.cells.read_rows(runner.args.out) == first

    recipe = yaml.safe_load((FOLDER / "past/continue.yaml").read_text(encoding="utf-8"))
    recipe |= {"phases": [{"length": 128, "steps": 2}], "tokens_per_step": 256}
    recipe["schedule"]["warmup_steps"] = 1
    (beyond / "continue.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    asked = {"tasks": ["longeval", "needle"], "lengths": [400], "n": 2, "questions": 2, "seed": 1}
    del parts[0]["recipes"]
    path = write_grid(beyond, methods=["mha", "nsa", "dma"], parts=parts, evaluation=asked)
    grid = scripts.grid.Grid.load(path)
    later = arguments(tmp_path, data=books, out=tmp_path / "past.jsonl")
    for _ in range(2):
        runner = scripts.cells.Runner(grid, beyond, later)
        scripts.past.fill(runner, first, load_texts("haystack")[:1])
    second = scripts.cells.read_rows(later.out)
    assert [(row["task"], row["method"]) for row in second] == [
        (task, method) for task in ("longeval", "needle") for method in ("mha", "nsa", "dma")
    ]
    for row in second:
        assert "failed" not in row, row
        assert len(row["result"]["marks"]) == row["result"]["n"] == 2
        assert 300 < row["result"]["prompt_tokens"] <= 400
        assert row["recipe"]["model"]["from"] in {r["run"] for r in first}
        assert str(tmp_path) not in json.dumps(row)

    page = tmp_path / "page" / "trained.md"
    scripts.trained_page.write({"scaling": first, "past": second}, page)
    text = page.read_text()
    for name, row in (("DMA", first[-2]), ("DMA, 256 nearest", first[-1])):
        assert f"| {name} | 0.1M | 0.01 | 1 | {row['perplexity']['score']:.3f} |" in text
    assert first[-1]["valid_loss"] != first[-2]["valid_loss"]
    assert "| needle | NSA | 1 | 0 (0 to 66) |" in text
    assert (page.parent / "trained-past-tiny.svg").read_text().count("<svg") == 1


def test_no_page_without_cells(scripts, tmp_path):
    page = tmp_path / "trained.md"
    with pytest.raises(ValueError, match="no finished cells"):
        scripts.trained_page.write({"mqar": [{"key": "a", "failed": "x"}]}, page)
    assert not page.exists()


def test_windows_are_compared_in_pairs(scripts):
    shown = scripts.trained_page.against([([1.1, 2.1], [1.0, 2.0]), ([1.3, 2.3], [1.0, 2.0])])
    change = f"{math.expm1(0.2):+.2%}"
    assert shown == f"{change} ({change} to {change})"


def test_amounts_of_text_are_told_by_seed(scripts):
    def row(method, seed, tokens):
        given = {"method": method, "lr": 0.002, "seed": seed}
        return given | {"corpus_tokens": tokens, "epochs": 6e6 / tokens}

    alike = [row("mha", 0, 2_000_000), row("nsa", 0, 2_000_000)]
    epochs = scripts.trained_page.epochs
    assert epochs(alike) == "3.00 epochs of 2.0M tokens of books"
    assert epochs([*alike, row("dma", 0, 1_000_000), row("dma", 1, 1_000_000)]) == (
        "seed 0: 3.00 epochs of 2.0M tokens of books, but 6.00 epochs of 1.0M tokens of books for "
        "DMA at 0.002; seed 1: 6.00 epochs of 1.0M tokens of books"
    )


def test_runs_that_were_made_twice_are_told(scripts):
    def row(key, score, **more):
        given = {"key": key, "method": "mha", "seed": 1, "part": "10M"}
        return given | {"perplexity": {"score": score}} | more

    first, again = [row("a", 36.88, compiled=True)], [row("a", 38.19), row("b", 1.0)]
    said = scripts.trained_page.repeated(first, again)
    assert said.startswith("**The same run twice**, recipe, seed 1 and text alike, at 10M: ")
    assert "at 10M: MHA 36.9 (compiled) and 38.2 (not compiled). " in said
    assert scripts.trained_page.repeated([row("a", 36.88)], [row("b", 1.0)]) == ""


GRIDS = {name: FOLDER / name / "grid.yaml" for name in ("mqar", "scaling")}


@pytest.mark.parametrize("name", GRIDS)
def test_committed_recipes_are_alike(scripts, name):
    """Methods of a part differ in the model's fields alone; all take part in every part."""
    grid = scripts.grid.Grid.load(GRIDS[name])
    assert grid.methods == METHODS + (WINDOWED,) * (name == "scaling")
    for part in grid.parts:
        cells = [
            grid.cell(GRIDS[name].parent, part, method, part.lrs[0], 0, free=[])
            for method in grid.methods
        ]
        # The rate is chosen by what the last step finds.
        assert all(cell.recipe.eval_every == cell.recipe.steps for cell in cells)
        made = [cell.named for cell in cells]
        for one in made:
            assert {**one, "model": 0} == {**made[0], "model": 0}
        widths = {one["model"]["hidden_size"] for one in made}
        layers = {one["model"]["num_hidden_layers"] for one in made}
        assert len(widths) == len(layers) == 1


@pytest.mark.parametrize("size", ["10M", "30M", "80M"])
def test_parameters_are_equal(size):
    counts = {}
    for method in (*METHODS, WINDOWED):
        recipe = Recipe.load(FOLDER / "scaling" / size / f"{method}.yaml")
        with torch.device("meta"):
            model = build_model(recipe, vocab_size=4096)
        counts[method] = sum(parameter.numel() for parameter in model.parameters())
        assert recipe.steps * recipe.tokens_per_step == pytest.approx(60e6, rel=0.01)
    assert counts["mha"] == pytest.approx(int(size[:-1]) * 1e6, rel=0.14)
    for method, count in counts.items():
        assert count == pytest.approx(counts["mha"], rel=0.01), method


@pytest.mark.parametrize("size", ["10M", "30M", "80M"])
def test_half_of_the_keys_are_the_nearest(size):
    plain, windowed = (
        Recipe.load(FOLDER / "scaling" / size / f"{method}.yaml").identity()
        for method in ("dma", WINDOWED)
    )
    assert windowed["model"].pop("window") == 256 == plain["model"]["keep"] // 2
    assert windowed == plain


def test_the_questions_past_the_length_can_be_read(scripts):
    grid = scripts.grid.Grid.load(FOLDER / "past/grid.yaml")
    recipe = Recipe.load(FOLDER / "past/continue.yaml")
    scaling = scripts.grid.Grid.load(GRIDS["scaling"])
    assert recipe.longest == scaling.evaluation["length"] < max(grid.evaluation["lengths"])
    assert {part.name for part in grid.parts} == {part.name for part in scaling.parts}


def test_the_kept_page_is_that_of_the_kept_cells(scripts, tmp_path):
    kept = FOLDER.parents[1] / "docs/results/trained.md"
    pages = scripts.trained_page
    files = {name: pages.RESULTS / f"trained_{name}.jsonl" for name in pages.EXPERIMENTS}
    rows = {name: scripts.cells.read_rows(path) for name, path in files.items()}
    if not any(rows.values()):
        assert not kept.exists(), "a page without cells"
        return
    pages.write(rows, tmp_path / "trained.md")
    assert (tmp_path / "trained.md").read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")
