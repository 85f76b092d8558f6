"""benchmarks/trained/mechanism.py: counts against dense definitions, tiny runs, the page."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from trained_arguments import arguments

from dynmask.assets import load_texts, load_tokenizer
from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.masks import Lifetimes
from dynmask.train.models import build_model
from dynmask.train.mqar import Mqar, Recall
from dynmask.train.source import Step

FOLDER = Path(__file__).parents[2] / "benchmarks" / "trained"
NAMES = (
    "claims",
    "jobs",
    "grid",
    "cells",
    "fixed",
    "mqar",
    "past",
    "trained_page",
    "kinds",
    "nearest",
    "picks",
    "picks_draw",
    "mechanism",
    "mechanism_page",
)


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            del sys.modules[name]


def random_scores(layers=2, heads=3, length=29, seed=0):
    """Few distinct values, so that some tie."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (layers, heads, length), generator=draw).float()


def kept_sets(score, keep):
    """Of one head, the keys that each row keeps, by sorting what it may see."""
    order = [sorted(range(i + 1), key=lambda j: (-score[j].item(), j)) for i in range(len(score))]
    return [set(row[:keep]) for row in order]


def expiry_of(score, keep):
    """``[layers, G, N]``, with lives cut off at the end."""
    return Lifetimes.top(score, keep=keep).expiry.long().clamp_max(score.shape[-1])


KEEP, LENGTH = 6, 29


def each_head(score):
    for layer in range(score.shape[0]):
        for head in range(score.shape[1]):
            yield layer, head, kept_sets(score[layer, head], KEEP)


def test_shares_by_position(scripts):
    score = random_scores()
    made = scripts.picks.places(expiry_of(score, KEEP), KEEP, first=2, last=4)
    for layer, head, kept in each_head(score):
        counts = {"first": 0, "last": 0, "rest": 0}
        for i in range(KEEP, LENGTH):
            for j in kept[i]:
                counts["last" if i - j < 4 else "first" if j < 2 else "rest"] += 1
        assert {name: int(made[name][0][layer, head]) for name in made} == counts
        assert sum(counts.values()) == KEEP * (LENGTH - KEEP)
    rows = range(KEEP, LENGTH)
    causal = {name: int(made[name][1].sum()) for name in made}
    assert causal["last"] == 4 * len(rows)
    assert causal["first"] == 2 * len(rows)
    assert sum(causal.values()) == sum(i + 1 for i in rows)


def test_shares_by_type(scripts):
    score = random_scores()
    of = torch.arange(LENGTH) % 3
    kinds = scripts.kinds.Kinds(("a", "b", "c"), of)
    made = scripts.picks.types(expiry_of(score, KEEP), KEEP, kinds)
    for layer, head, kept in each_head(score):
        for index, name in enumerate("abc"):
            count = sum(int(of[j]) == index for i in range(KEEP, LENGTH) for j in kept[i])
            assert int(made[name][0][layer, head]) == count
    for index, name in enumerate("abc"):
        count = sum(j % 3 == index for i in range(KEEP, LENGTH) for j in range(i + 1))
        assert int(made[name][1].sum()) == count


def test_lives(scripts):
    score = random_scores()
    made = scripts.picks.lives(expiry_of(score, KEEP))
    for layer, head, kept in each_head(score):
        rows = [sum(j in row for row in kept) for j in range(LENGTH)]
        assert made["lives"][layer, head].tolist() == rows
        assert made["admitted"][layer, head] == sum(n > 0 for n in rows)
        assert made["alive"][layer, head] == len(kept[-1])


def test_overlap_and_what_is_contained(scripts):
    score, other = random_scores(), random_scores(seed=1)
    shared, own = scripts.picks.overlap(expiry_of(score, KEEP), KEEP)
    inside, less = scripts.picks.contained(expiry_of(score, 3), expiry_of(other, KEEP), KEEP)
    for layer in range(2):
        sets = [kept_sets(score[layer, head], KEEP) for head in range(3)]
        count = [
            sum(len(sets[a][i] & sets[b][i]) for i in range(KEEP, LENGTH))
            for a, b in ((0, 1), (0, 2), (1, 2))
        ]
        assert shared[layer] == pytest.approx(sum(count) / 3)
        assert own[layer] == KEEP * (LENGTH - KEEP)
        few = [kept_sets(score[layer, head], 3) for head in range(3)]
        many = [kept_sets(other[layer, head], KEEP) for head in range(3)]
        rows = range(KEEP, LENGTH)
        assert inside[layer] == sum(len(few[h][i] & many[h][i]) for h in range(3) for i in rows)
        assert less[layer] == 3 * 3 * len(rows)


def test_overlap_by_chance(scripts):
    """Two random sets of w of i + 1 keys share w / (i + 1) of their keys on average."""
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(1, 200, 40, generator=draw)
    shared, own = scripts.picks.overlap(expiry_of(score, 8), 8)
    assert float(shared / own) == pytest.approx(scripts.picks.by_chance(40, 8), abs=0.01)


def tiny(**changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "keep": 5,
    }
    return DmaForCausalLM(DmaConfig(**shape | changes)).eval()


def read_by_rows(model, ids):
    """The tokens that each row reads, by the gradient: through both heads of the one layer."""
    embeds = model.model.embed_tokens(torch.tensor([ids])).detach().requires_grad_()
    out = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    found = []
    for row in range(len(ids)):
        (grad,) = torch.autograd.grad(out[0, row].sum(), embeds, retain_graph=True)
        # The row's own token is also read beside attention.
        found.append(set((grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()) - {row})
    return found


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_read_what_is_counted(scripts, count):
    """Expiries are those of the rows' own attention, and `nearest` adds the nearest keys to it."""
    model = tiny()
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:21].tolist()
    expiry = scripts.picks.expiries(model, ids)
    assert expiry.shape == (1, 2, 21)
    with scripts.nearest.nearest(count):
        read = read_by_rows(model, ids)
    for i in range(21):
        near = set(range(max(0, i - count + 1), i + 1))
        before = i - count
        far = {j for j in range(before + 1) for head in expiry[0] if j <= before < head[j]}
        assert read[i] == (near | far) - {i}
    assert read_by_rows(model, ids) != read or count == 0


def test_nearest_keys_are_besides(scripts):
    score = random_scores(1, 2, 40)
    mask = scripts.nearest.widened(Lifetimes.top(score, keep=KEEP), 4)
    assert mask.most == KEEP + 4
    seen = mask.dense(40)[0]
    assert seen.sum(-1).tolist() == [[min(i + 1, KEEP + 4) for i in range(40)]] * 2
    for head in range(2):
        kept = kept_sets(score[0, head], KEEP)
        for i in range(40):
            row = set(seen[head, i].nonzero().flatten().tolist())
            assert row == set(range(max(0, i - 3), i + 1)) | (kept[i - 4] if i >= 4 else set())


def test_nearest_is_not_for_caches(scripts):
    with scripts.nearest.nearest(2), pytest.raises(ValueError, match="without cache"):
        tiny()(torch.arange(9)[None], use_cache=True)


def test_types_of_text(scripts):
    tokenizer = load_tokenizer()
    text = "The old house, in 1912.\nWe saw Unquestionably"
    ids = tokenizer(text)["input_ids"]
    kinds = scripts.kinds.kinds_of_text(tokenizer, ids)
    found = {}
    for token, kind in zip(ids, kinds.of.tolist(), strict=True):
        found.setdefault(kinds.names[kind], []).append(tokenizer.decode([token]).strip())
    assert "".join(found["digit"]) == "1912"
    assert found["punctuation, space"] == [",", "", "."]
    assert {"The", "in"} <= set(found["common word"])
    assert found["line start"][-1] == "We"
    assert "".join(found["capitalised"]) == "Unquestionably", "pieces within a word are its own"
    assert "saw" in found["other word"]


def test_types_of_recall(scripts):
    task = Mqar(vocab=64, pairs=4, filler=4)
    ids = Recall(task).at(Step(0, 0, 0, 1, 32, 7)).ids[0].tolist()
    kinds = scripts.kinds.kinds_of_recall(task, ids)
    names = [kinds.names[kind] for kind in kinds.of.tolist()]
    assert names[:8] == ["key, first", "value, first"] * 4
    asked = [place for place in range(8, 32) if ids[place] < 32]
    assert sorted(ids[place] for place in asked) == sorted(ids[0:8:2])
    for place in range(8, 32):
        expected = (
            "key, asked" if place in asked else "value, asked" if place - 1 in asked else "filler"
        )
        assert names[place] == expected


def test_keep_is_as_it_was_after_it_was_changed(scripts):
    model = tiny(num_hidden_layers=2)
    kinds = scripts.kinds.Kinds(("even", "odd"), torch.arange(30) % 2)
    draw = torch.Generator().manual_seed(1)
    windows = [(torch.randint(50, (30,), generator=draw).tolist(), kinds) for _ in range(3)]
    found = scripts.picks.when_keep_changes(model, windows, first=2, last=4)
    assert model.config.keep == 5
    assert [row["keep"] for row in found] == [2, 5, 10]
    for row in found:
        for part in ("places", "types"):
            kept = torch.tensor([at["kept"] for at in row[part].values()])
            torch.testing.assert_close(kept.sum(0), torch.ones(2, 2), atol=1e-3, rtol=0)
    # The first layer's scores read the tokens alone: fewer keys are among more.
    assert [row["kept_by_own"][0] for row in found] == [1.0, 1.0, 1.0]
    assert found[1]["kept_by_own"] == [1.0, 1.0]
    assert found[0]["lives"][0][0][4] <= 28


TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "keep": 8,
}
GRID = {
    "recipes": "tiny",
    "tasks": ["recall", "text"],
    "seeds": [0, 1],
    "rows": {
        "base": {},
        "linear score": {"set": ["model.score=linear"]},
        "own key forced in": {"nearest": {"recall": 1, "text": 2}, "set": ["model.keep=7"]},
        "all keys": {"recall": ["model.keep=null"], "text": ["model.keep=null"]},
        "fixed score": {"fixed": True},
    },
    "evaluation": {
        "text": {"length": 64, "windows": 3, "picked": 2, "first": 2, "last": 4},
        "recall": {
            "length": 64,
            "rows": 6,
            "tokens_per_call": 256,
            "pairs": [2, 4],
            "picked": 2,
            "first": 2,
            "last": 4,
        },
    },
}


@pytest.fixture(scope="module")
def tiny_grid(tmp_path_factory):
    """The committed recipes with tiny models and two steps."""
    folder = tmp_path_factory.mktemp("mechanism")
    (folder / "tiny").mkdir()
    for task in GRID["tasks"]:
        path = FOLDER / "mechanism" / f"{task}.yaml"
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        raw["model"] |= TINY
        if task == "text":
            raw["model"].pop("head_dim")
            raw["data"] |= {"path": "embedded", "train": "[ch]*", "valid": "perplexity*"}
        else:
            raw["model"] |= {"head_dim": 8}
            raw["data"] |= {"vocab": 64, "pairs": 8}
        raw |= {"phases": [{"length": 64, "steps": 2}], "tokens_per_step": 128}
        raw |= {"log_every": 1, "eval_every": 2, "eval_sequences": 2}
        raw["schedule"] = {"type": "cosine", "warmup_steps": 1, "floor": 0.02}
        (folder / "tiny" / f"{task}.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (folder / "rows.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False), encoding="utf-8")
    return folder / "rows.yaml"


def runner(scripts, grid, folder, **changes):
    made = arguments(folder, **changes)
    ablations = scripts.mechanism.Ablations.load(grid)
    return scripts.mechanism.Mechanism(ablations, made, [load_texts("perplexity")[0][:3000]])


@pytest.fixture(scope="module")
def cells(scripts, tiny_grid, tmp_path_factory):
    """All cells of the first seed, in two sittings, and where they lie."""
    folder = tmp_path_factory.mktemp("runs")
    runner(scripts, tiny_grid, folder, only=["seed=0", "part=recall"]).work()
    runner(scripts, tiny_grid, folder, only=["seed=0"]).work()
    return scripts.cells.read_rows(folder / "cells.jsonl"), folder


def test_every_row_is_trained_and_measured_once(scripts, tiny_grid, cells, monkeypatch):
    rows, folder = cells
    assert [(row["part"], row["method"]) for row in rows] == [
        (task, name) for task in GRID["tasks"] for name in GRID["rows"]
    ]
    for row in rows:
        assert "failed" not in row, row
        assert (row["seed"], row["steps"]) == (0, 2)
        assert row["environment"]["commit"]
        assert row["recipe"].get("nearest", 0) == (
            {"recall": 1, "text": 2}[row["part"]] if row["method"].startswith("own") else 0
        )
        if row["part"] == "recall":
            assert [(at["pairs"], at["rows"]) for at in row["recall"]] == [(2, 6), (4, 6)]
        else:
            assert row["perplexity"]["n"] == len(row["perplexity"]["rows"]) == 3
        assert row["recipe"].get("fixed", False) == (row["method"] == "fixed score")
        picks = {"base": 3, "linear score": 1, "fixed score": 1}.get(row["method"], 0)
        assert len(row.get("picks", ())) == picks
        assert ("keep_changed" in row) == (row["method"] != "all keys")
    assert len({row["key"] for row in rows}) == len({row["run"] for row in rows}) == len(rows)

    # What is there is not computed again; other questions are asked of the models that are there.
    monkeypatch.setattr(scripts.cells, "train", None)
    again = runner(scripts, tiny_grid, folder, only=["seed=0"])
    again.work()
    assert len(again.rows) == len(rows)
    other = runner(scripts, tiny_grid, folder, only=["method=linear score"], out=folder / "other")
    other.ablations.evaluation["recall"]["pairs"] = [1]
    monkeypatch.setattr(other, "cells", lambda: iter([next(type(other).cells(other))]))
    other.work()
    assert [at["pairs"] for at in other.rows[0]["recall"]] == [1]


def test_forced_keys_take_part_in_training_and_test(scripts, tiny_grid, cells, tmp_path):
    """The row's loss is not that of its own recipe without the nearest keys."""
    rows, _ = cells
    (forced,) = [r for r in rows if r["part"] == "recall" and r["method"].startswith("own")]
    plain = runner(scripts, tiny_grid, tmp_path, only=["seed=0", "part=recall"])
    cell = next(c for c in plain.cells() if c.method.startswith("own"))
    plain.ablations.rows["own key forced in"]["nearest"] = 0
    without = next(c for c in plain.cells() if c.method.startswith("own"))
    assert without.key != cell.key
    assert plain.trained(without)["loss"] != forced["loss"]


def test_a_fixed_score_stays_as_it_was_initialised(scripts, tiny_grid, cells):
    rows, folder = cells
    part, (base, fixed) = "recall", ("base", "fixed score")
    run = {row["method"]: row["run"] for row in rows if row["part"] == part}
    made = runner(scripts, tiny_grid, folder)
    recipe = made.ablations.cell(base, part, 0, free=[]).recipe
    start = build_model(recipe, vocab_size=recipe.data.vocab_size).state_dict()
    trained = {
        row: scripts.cells.loaded(folder / "runs" / run[row] / "model")[0] for row in (base, fixed)
    }
    for name, weight in start.items():
        stays = name.endswith(("score.A", "dt_proj.weight"))
        assert torch.equal(trained[fixed].state_dict()[name], weight.bfloat16().float()) == stays
        assert not torch.equal(trained[base].state_dict()[name], weight.bfloat16().float())
    assert all(weight.requires_grad for weight in trained[fixed].parameters())


def test_the_page(scripts, cells, tmp_path):
    rows, _ = cells
    pages = scripts.mechanism_page
    pages.write(rows, tmp_path / "made.md")
    text = (tmp_path / "made.md").read_text(encoding="utf-8")
    for name in GRID["rows"]:
        (recall, words) = ([r for r in rows if r["method"] == name][at] for at in (0, 1))
        lines = [line for line in text.splitlines() if line.startswith(f"| {name} | ")]
        assert len(lines) == (2 if name == "all keys" else 4)
        assert f"| {100 * recall['recall'][0]['accuracy']:.1f} ± " in lines[0]
        assert f"| {words['perplexity']['score']:.1f} |" in "".join(lines)
    assert "| own key forced in | 9 (2 nearest) |" in text
    for task in GRID["tasks"]:
        for picture in ("rows", "masks", "types", "lives"):
            name = f"made-{task}-{picture}.svg"
            assert f"]({name})" in text
            assert (tmp_path / name).read_text(encoding="utf-8").count("<svg") == 1
    with pytest.raises(ValueError, match="no finished cells"):
        pages.page([{"key": "a", "failed": "x"}], "made")


def test_density_is_that_of_a_mask(scripts):
    score = random_scores(1, 1, 40)
    for keep in (1, 7, 39, 40):
        expected = float(Lifetimes.top(score, keep=keep).density())
        assert scripts.mechanism_page.density(keep, 40) == pytest.approx(expected)
    assert scripts.mechanism_page.density(None, 40) == 1


def test_committed_rows_differ_from_the_base_in_what_they_name(scripts):
    ablations = scripts.mechanism.Ablations.load(FOLDER / "mechanism" / "rows.yaml")
    for task in ablations.tasks:
        base = ablations.cell("base", task, 0, free=[]).named
        for name in ablations.rows:
            near = ablations.near(name, task)
            row = ablations.cell(name, task, 0, free=[]).named
            besides = {"model": 0, "nearest": 0, "fixed": 0}
            assert {**row, **besides} == {**base, **besides}
            changed = {k for k in row["model"] if row["model"][k] != base["model"].get(k)}
            if near:
                assert changed == {"keep"}
                assert row["model"]["keep"] + near == base["model"]["keep"]
            else:
                assert len(changed) + ablations.fixed(name) == (name != "base")
        assert ablations.evaluation[task]["length"] == base["phases"][-1]["length"]
        assert 2 * base["model"]["keep"] < ablations.evaluation[task]["length"]


def test_text_waits_for_data(scripts, tmp_path):
    rows = FOLDER / "mechanism" / "rows.yaml"
    for data, parts in ((None, {"recall"}), (tmp_path, {"recall", "text"})):
        made = runner(scripts, rows, tmp_path, data=data)
        assert {cell.part for cell in made.cells()} == parts


def test_the_command_draws_a_model(scripts, cells, tmp_path, monkeypatch):
    rows, folder = cells
    (row,) = [r for r in rows if r["part"] == "text" and r["method"] == "base"]
    model = folder / "runs" / row["run"] / "model"
    given = ["picks.py", "--model", str(model), "--windows", "2", "--out", str(tmp_path / "picks")]
    monkeypatch.setattr(sys, "argv", given)
    scripts.picks.main()
    made = json.loads((tmp_path / "picks/picks.json").read_text(encoding="utf-8"))
    assert [at["keep"] for at in made["picks"]] == [4, 8, 16]
    assert {path.name for path in (tmp_path / "picks").glob("*.svg")} == {
        "masks.svg",
        "types.svg",
        "lives.svg",
    }


def test_a_window_over_half_of_the_keys_leaves_nothing_to_draw(
    scripts, cells, tmp_path, monkeypatch, capsys
):
    rows, folder = cells
    (row,) = [r for r in rows if r["part"] == "text" and r["method"] == "base"]
    model = tmp_path / "model"
    shutil.copytree(folder / "runs" / row["run"] / "model", model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    changed = json.dumps(config | {"window": config["keep"] // 2 + 1})
    (model / "config.json").write_text(changed, encoding="utf-8")
    given = ["picks.py", "--model", str(model), "--out", str(tmp_path / "picks")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        scripts.picks.main()
    assert "at half of keep" in capsys.readouterr().err


def test_the_kept_page_is_that_of_the_kept_cells(scripts, tmp_path):
    kept = FOLDER.parents[1] / "docs/results/mechanism.md"
    rows = scripts.cells.read_rows(scripts.cells.RESULTS / "trained_mechanism.jsonl")
    scripts.mechanism_page.write(rows, tmp_path / "mechanism.md")
    assert (tmp_path / "mechanism.md").read_text(encoding="utf-8") == kept.read_text(
        encoding="utf-8"
    )
    for path in tmp_path.glob("*.svg"):
        assert kept.with_name(path.name).exists()


def test_rows_are_told_from_base_by_the_tests_interval(scripts):
    def row(name, accuracy, seed=0):
        at = {"accuracy": accuracy, "error": 0.01, "pairs": 8}
        return {"method": name, "seed": seed, "recall": [at]}

    rows = [row("base", 0.5), row("a", 0.6), row("b", 0.4), row("c", 0.52), row("d", 0.9, seed=1)]
    assert "apart" not in scripts.mechanism_page.verdict(rows)
    both = scripts.mechanism_page.verdict([*rows, row("base", 0.53, seed=1)])
    assert "Base's own 2 seeds are 3.0 points apart" in both
    said = scripts.mechanism_page.verdict(rows)
    assert "base: better: a; worse: b; neither: c. Rows with one seed" in said, (
        "d has no base of its seed"
    )
    words = [
        {"method": name, "seed": 0, "perplexity": {"rows": [2.0 + more, 3.0 + more, 4.0 + more]}}
        for name, more in (("base", 0.0), ("a", -0.1), ("b", 0.1))
    ]
    assert "better: a; worse: b; neither: none." in scripts.mechanism_page.verdict(words)
    assert scripts.mechanism_page.difference([(rows[1]["recall"][0], rows[0]["recall"][0])]) == (
        f"+10.0 ± {196 * math.sqrt(2) * 0.01:.1f}"
    )


def test_how_many_of_its_last_keys_a_row_sees(scripts):
    """From the shares of the kept pairs, against a count of the sets themselves."""
    score = random_scores(1, 1)
    kept = kept_sets(score[0, 0], KEEP)
    rows = range(KEEP, LENGTH)
    near = sum(i - j < 4 for i in rows for j in kept[i]) / (4 * len(rows))
    made = scripts.picks.places(expiry_of(score, KEEP), KEEP, first=2, last=4)
    own = {"keep": KEEP, "last": 4, "types": {"a": {"kept": [[0.5, 0.25]], "causal": 0.25}}}
    total = KEEP * len(rows)
    own["places"] = {
        name: {"kept": [[int(counts[0, 0]) / total]], "causal": 0.25}
        for name, (counts, _) in made.items()
    }
    said = scripts.mechanism_page.ranges(own)
    assert f"sees {100 * near:.0f} % of its own last 4 keys" in said
    assert said.startswith("From 1.00 to 2.00 by type")
