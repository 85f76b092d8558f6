"""benchmarks/compare.py: settings at a density, cells that are kept, pairs, and the page."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dynmask.assets import load_texts, load_tokenizer
from dynmask.eval import recall

FOLDER = Path(__file__).parents[2] / "benchmarks"
CONFIG = yaml.safe_load(
    """
seed: 5
densities: [0.3]
least: 0.0
calibration: {seed: 6, prompts: 1, tolerance: 0.05, steps: 6}
moa: {lengths: [48], windows: 1}
tasks:
  lines: {run: recall, kind: lines, length: 480, n: 8, questions: 4, filler: 32}
  text: {run: perplexity, length: 200, n: 2}
  decoded: {run: longeval, length: 480, n: 2, questions: 2}
methods:
  dynamic: {paths: [prefill], knobs: {coverage: 1}, share: true, values: [0.9]}
  streaming: {paths: [prefill, decode], knobs: {window: 1}}
  snapkv: {paths: [decode], knobs: {cap: 1}, range: [48, null], whole: true}
  h2o: {paths: [prefill], knobs: {heavy: 0.5, recent: 0.5}, n: 4}
"""
)


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("compare", "compare_methods", "compare_moa", "compare_page", "compare_tasks")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def comparison(scripts, model, tokenizer, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    texts = scripts["compare_tasks"].Texts(load_texts("haystack")[:2], load_texts("perplexity")[:2])

    def make(**changes):
        given = {"name": "tiny", "model": model, "tokenizer": tokenizer, "texts": texts}
        settings = scripts["compare"].Settings.load(path)
        out = tmp_path / "cells.jsonl"
        return scripts["compare"].Comparison(
            settings, out, **given, **{"deadline": math.inf, **changes}
        )

    return make


def rows(comparison):
    return [json.loads(line) for line in comparison.out.read_text().splitlines()]


def test_cells_are_kept_and_not_run_again(scripts, comparison, tmp_path):
    first = comparison()
    first.run(list(first.settings.tasks), set())
    kept = rows(first)
    assert not [row for row in kept if "failed" in row]
    by = {(row["task"]["name"], row["method"]): row for row in kept}
    assert list(by) == [
        *[("lines", m) for m in ("full", "dynamic", "streaming", "h2o")],
        *[("text", m) for m in ("full", "dynamic", "streaming", "h2o")],
        *[("decoded", m) for m in ("full", "streaming", "snapkv")],
    ]
    assert len(by["lines", "full"]["marks"]) == 8
    assert len(by["lines", "h2o"]["marks"]) == by["lines", "h2o"]["n"] == 4
    assert len(by["text", "full"]["losses"]) == 2
    for task, method in (("lines", "streaming"), ("text", "streaming"), ("lines", "h2o")):
        assert by[task, method]["density"]["prefill"] == pytest.approx(0.3, abs=0.03)
    for method in ("streaming", "snapkv"):
        assert by["decoded", method]["density"]["decode"] == pytest.approx(0.3, abs=0.03)
    assert by["decoded", "snapkv"]["density"]["prefill"] == 1

    # A line that was cut off is written again; no other is.
    text = first.out.read_text()
    first.out.write_text(text[:-40])
    second = comparison()
    second.run(list(second.settings.tasks), set())
    assert first.out.read_text().startswith(f"{text[:-40]}\n")
    again = scripts["compare"].read_rows(first.out)
    assert [row["key"] for row in again] == [row["key"] for row in kept]
    assert again[-1]["marks"] == kept[-1]["marks"]

    page = tmp_path / "page" / "compare.md"
    scripts["compare_page"].write_page(scripts["compare"].read_rows(first.out), page)
    written = page.read_text()
    assert "| `streaming` | 0.3 |" in written
    assert "| `dynamic` | coverage 0.9 |" in written
    assert "(n 4)" in written
    assert "compare-tiny.svg" in written
    assert (page.parent / "compare-tiny.svg").read_text().count("<svg") == 1


def test_without_time_nothing_is_written(scripts, comparison):
    late = comparison(deadline=0.0)
    with pytest.raises(scripts["compare"].OutOfTime):
        late.run(list(late.settings.tasks), set())
    assert not late.out.exists()


def test_a_task_that_the_model_cannot_do_is_not_compared(comparison, capsys):
    strict = comparison()
    object.__setattr__(strict.settings, "least", 0.5)
    strict.run(list(strict.settings.tasks)[:1], set())
    assert [row["method"] for row in rows(strict)] == ["full"], "a random model finds nothing"
    assert "not compared" in capsys.readouterr().out


def test_a_method_that_cannot_run_costs_no_other(scripts, comparison, monkeypatch):
    def broken(method, *args):
        if method.name == "streaming":
            raise ValueError("it does not go")
        return attached(method, *args)

    attached = scripts["compare"].attached
    monkeypatch.setattr(scripts["compare"], "attached", broken)
    first = comparison()
    first.run(list(first.settings.tasks)[:1], {"streaming", "h2o"})
    kept = rows(first)
    assert [("failed" in row, row["method"]) for row in kept] == [
        (False, "full"),
        (True, "streaming"),
        (False, "h2o"),
    ]
    monkeypatch.undo()
    again = comparison()
    again.run(list(again.settings.tasks)[:1], {"streaming"})
    assert len(rows(again)) == 4, "a failure is tried again"
    assert "score" in rows(again)[-1]


def test_recall_is_that_of_the_package(scripts, model, tokenizer):
    tasks = scripts["compare_tasks"]
    task = tasks.Task("needles", "recall", 400, 6, kind="minference", questions=3, filler=40)
    texts = load_texts("haystack")[:2]
    asker = tasks.Asker(task, model, tokenizer, tasks.Texts(texts, []), 9)
    outcome = asker.ask(lambda: None)
    result = recall(
        model,
        tokenizer,
        texts,
        kind="minference",
        length=400,
        n=6,
        questions=3,
        seed=9,
        filler=40,
    )
    assert [bool(mark) for mark in outcome.marks] == [row["correct"] for row in result.rows]
    assert outcome.depths == [row["depth"] for row in result.rows]
    assert len(asker.ask(lambda: None, n=3).marks) == 3


@pytest.mark.parametrize(
    ("kind", "form", "questions"), [("lines", "", 4), ("keyvalue", "words", 2)]
)
def test_prompts_fill_their_length(scripts, model, tokenizer, kind, form, questions):
    tasks = scripts["compare_tasks"]
    task = tasks.Task(
        "x", "recall", 1500, 2 * questions, kind=kind, form=form, questions=questions, filler=50
    )
    asker = tasks.Asker(task, model, tokenizer, tasks.Texts(load_texts("haystack"), []), 1)
    lengths = [len(quiz.ids) for quiz in asker._quizzes(task.n)]
    assert max(lengths) <= 1500
    assert min(lengths) > 1400


@pytest.mark.parametrize(
    ("share", "low", "high", "density"),
    [
        (False, 1, 1000, lambda x: x / 1000),
        (False, 16, 1000, lambda x: 1 - (1 - x / 1000) ** 2),
        (True, 0.0, 1.0, lambda x: x**3),
        (True, 0.02, 1.0, lambda x: max(0.05, x**6)),
    ],
    ids=["line", "window", "cube", "flat"],
)
def test_the_number_of_a_density_is_found(scripts, share, low, high, density):
    asked = []

    def measure(number):
        asked.append(number)
        return density(number)

    found = scripts["compare_methods"].calibrated(
        measure, 0.2, low=low, high=high, share=share, tolerance=0.03, steps=10
    )
    assert found.density == density(found.number) == pytest.approx(0.2, rel=0.03)
    assert found.tried == len(asked) <= 10
    assert share or all(number == int(number) for number in asked)


def test_numbers_that_are_refused_are_too_small(scripts):
    def measure(number):
        if number < 300:
            raise ValueError("too small")
        return number / 1000

    calibrated = scripts["compare_methods"].calibrated
    given = {"low": 1, "high": 1000, "share": False, "steps": 12}
    assert calibrated(measure, 0.31, guess=100, **given).density == pytest.approx(0.31, rel=0.03)
    # What cannot be reached comes as close as it can.
    assert 0.3 <= calibrated(measure, 0.1, guess=100, **given).density < 0.31


def test_signs_and_pairs(scripts):
    page = scripts["compare_page"]
    assert page.sign_test(0, 0) == 1
    assert page.sign_test(10, 0) == pytest.approx(2 / 1024)
    assert page.sign_test(3, 5) == page.sign_test(5, 3) == pytest.approx(2 * 93 / 256)
    low, middle, high = page.paired_bootstrap([1, 1, 0, 0], [1, 1, 1, 1], group=2)
    assert (low, middle, high) == (-1, -0.5, 0), "questions of a prompt are drawn together"
    assert page.paired_bootstrap([1, 0], [1, 0], group=1) == (0, 0, 0)
    low, middle, high = page.relative_change([1.0, 2.0], [0.9, 1.9])
    assert low == pytest.approx(middle) == pytest.approx(high) == pytest.approx(math.expm1(0.1))


def test_influence_of_what_a_rule_hides(scripts, model):
    """Every pair's |E| by its definition, added up over the pairs that a rule hides."""
    moa = scripts["compare_moa"]
    ids, sinks, candidates = list(range(100, 140)), 3, [(0.0, 1.0), (9.0, 0.0), (4.0, 0.25)]
    found = moa.influence(model, [[ids]], rules=candidates, sinks=sinks)
    assert found.shape == (2, 4, 3, 1)
    assert model.config._attn_implementation != "eager"
    model.set_attn_implementation("eager")
    tokens = torch.tensor([ids])
    output = model(input_ids=tokens, output_attentions=True, labels=tokens)
    gradients = torch.autograd.grad(output.loss, output.attentions)
    model.set_attn_implementation("sdpa")
    for layer, head in ((0, 1), (1, 3)):
        a, g = output.attentions[layer][0, head].detach(), gradients[layer][0, head]
        for rule, span in enumerate((40, 9, 14)):
            expected = 0.0
            for i in range(40):
                for j in range(sinks, i - (span - sinks) + 1):
                    if span < 40:
                        e = a[i, j] / (1 - a[i, j]) * (a[i] @ g[i] - g[i, j])
                        expected += abs(float(e))
            assert float(found[layer, head, rule, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_configuration_can_be_read(scripts):
    settings = scripts["compare"].Settings.load(FOLDER / "compare" / "all.yaml")
    tasks = {task.name: task for task in settings.tasks}
    assert tasks["needles 16K"].densities == (0.12,)
    for task in settings.tasks:
        assert len(list(scripts["compare"].cells(settings, task))) > 5
    for method in settings.methods:
        assert method.policy in ("dynamic", "capped", *scripts["compare_methods"].METHODS)


def test_the_kept_page_is_that_of_the_kept_cells(scripts, tmp_path):
    results = FOLDER / "results/compare.jsonl"
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    importlib.import_module("compare_page").write_page(rows, tmp_path / "compare.md")
    kept = FOLDER.parent / "docs/results/compare.md"
    assert (tmp_path / "compare.md").read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")
