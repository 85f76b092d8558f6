"""The tasks of ``dynmask eval`` that need no plan, through the command itself."""

import argparse
import json

import pytest

pytest.importorskip("rich")

from dynmask.baselines import METHODS
from dynmask.cli import BAD_INPUT, OK, evaluate, main, methods
from dynmask.eval import keyvalue, perplexity, recall, ruler
from dynmask.eval.keyvalue import FORMS
from dynmask.eval.quizzes import KINDS
from dynmask.eval.ruler import NEW_TOKENS
from dynmask.report.measure import title


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer, book):
    path = tmp_path_factory.mktemp("model")
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "book.txt").write_text(" ".join(book))
    return path


def call(capsys, folder, *words):
    code = main(["--json", "eval", *words, "--model", str(folder), "--device", "cpu"])
    return code, json.loads(capsys.readouterr().out)


def test_choices_are_those_of_the_tasks():
    assert tuple(NEW_TOKENS) == evaluate.RULER_KINDS
    assert tuple(KINDS) == evaluate.RECALL_KINDS
    assert evaluate.PAIR_FORMS == FORMS


@pytest.mark.parametrize("task", [ruler, keyvalue, recall, perplexity], ids=lambda t: t.__name__)
def test_defaults_are_those_of_the_tasks(task):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    given = vars(parser.parse_args([task.__name__]))
    defaults = {
        k: v for k, v in task.__kwdefaults__.items() if k not in ("progress", "bucket", "cache")
    }
    assert {name: given[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    "task", ["longeval", "needle", "ruler", "keyvalue", "recall", "perplexity"]
)
def test_help_fits_80_columns(capsys, monkeypatch, task):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["eval", task, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


TASKS = {
    "RULER vt, 1600 tokens": "ruler --kind vt --length 1600 --n 1",
    "RULER multikey, 900 tokens": "ruler --length 900 --n 2 --questions 2",
    "Key-value digits, 8 pairs": "keyvalue --pairs 8 --form digits --n 2 --questions 2",
    "Key-value uuid, 3 pairs": "keyvalue --pairs 3 --n 1 --questions 1",
    "Recall key-value digits, 8 pairs": "recall --kind keyvalue --pairs 8 --n 2 --questions 2",
    "Recall vt, 2000 tokens": "recall --kind vt --length 2000 --n 1 --questions 1 --filler 70",
    "Recall multikey_2, 2000 tokens": "recall --kind multikey_2 --length 2000 --n 2 --questions 2",
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(capsys, folder, name):
    words = TASKS[name].split()
    if words[0] != "keyvalue":
        words += ["--texts", str(folder / "book.txt")]
    code, document = call(capsys, folder, *words)
    assert code == OK
    (row,) = document["quality"]
    assert row["task"] == name
    assert row["n"] == int(words[words.index("--n") + 1])
    assert row["metric"] == "accuracy"
    assert len(document["parts"]) == 10


def test_perplexity_gives_its_metrics(capsys, folder):
    words = ["perplexity", "--length", "1111", "--windows", "2"]
    code, document = call(capsys, folder, *words, "--texts", str(folder / "book.txt"))
    assert code == OK
    assert {"nll", "nll_0-1K", "nll_0-1K_error", "tokens_1K-1111"} <= set(document["metrics"])


def test_methods_are_those_of_the_package():
    assert sorted(methods.NAMES) == sorted(set(METHODS) - {"moa"})  # Its tables fit no option.
    for name in methods.NAMES:
        assert METHODS[name]().settings()


@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_runs_and_is_filed_under_its_name(capsys, folder, name):
    words = ["keyvalue", "--pairs", "40", "--form", "digits", "--n", "2", "--questions", "1"]
    code, document = call(capsys, folder, *words, "--method", name)
    assert code == OK
    (row,) = document["quality"]
    assert row["mode"] == name
    assert set(METHODS[name]().settings()) <= set(row["settings"])
    assert 0 < row["density"] <= 1


def test_settings_of_a_method_are_used(capsys, folder):
    words = [
        "keyvalue",
        "--pairs",
        "40",
        "--form",
        "digits",
        "--n",
        "1",
        "--questions",
        "1",
        "--method",
        "window",
    ]
    densities = []
    for window in (8, 100):
        _, document = call(capsys, folder, *words, "--set", f"window={window}")
        assert document["quality"][0]["settings"]["window"] == window
        densities.append(document["quality"][0]["density"])
    assert densities[0] < densities[1] < 1


@pytest.mark.parametrize("task", ["longeval --lines 40", "keyvalue --pairs 60 --form digits"])
def test_whole_prompts_give_the_same_answers_and_a_cap_runs(capsys, folder, task):
    words = [*task.split(), "--n", "3", "--questions", "2", "--mode", "dynamic"]
    _, shared = call(capsys, folder, *words)
    _, whole = call(capsys, folder, *words, "--whole")
    _, capped = call(capsys, folder, *words, "--max-cache-tokens", "140")
    _, sparse = call(capsys, folder, *words, "--sparse-decode")
    assert whole["quality"][0]["score"] == shared["quality"][0]["score"]
    assert whole["quality"][0]["settings"]["whole"] is True
    assert capped["quality"][0]["settings"]["max_cache_tokens"] == 140
    assert capped["quality"][0]["settings"]["whole"] is True
    assert sparse["quality"][0]["settings"]["sparse_decode"] is True
    assert 0 < sparse["quality"][0]["decode"] < 1
    assert shared["quality"][0]["decode"] is capped["quality"][0]["decode"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ruler --n 0", "n=0"),
        ("longeval --method window --mode dynamic", "leave --mode out"),
        ("longeval --set window=3", "add one"),
        ("longeval --method window --set size=3", "window has window"),
        ("longeval --method window --set window=0", "window=0"),
        ("longeval --method snapkv --max-cache-tokens 200", "leave --max-cache-tokens out"),
        ("longeval --max-cache-tokens 200", "add --mode dynamic"),
        ("longeval --sparse-decode", "add --mode dynamic"),
        ("longeval --method snapkv --sparse-decode", "leave --sparse-decode out"),
        ("longeval --mode dynamic --max-cache-tokens 20", "max_cache_tokens=20"),
        ("longeval --mode dynamic --max-cache-tokens 200 --sparse-decode", "see all of it"),
        ("ruler --length 9000", "length=9000"),
        ("ruler --kind fwe --questions 3", "questions=3"),
        ("keyvalue --pairs 1", "pairs=1"),
        ("keyvalue --pairs 75 --questions 80", "questions=80"),
        ("keyvalue --pairs 900 --form digits", "pairs=900"),
        ("recall --kind keyvalue --pairs 5 --questions 6", "questions=6"),
    ],
)
def test_bad_input(capsys, folder, words, message):
    code, document = call(capsys, folder, *words.split())
    assert code == BAD_INPUT
    assert message in document["error"]


def test_older_titles(llama, tokenizer, book):
    result = recall(llama, tokenizer, book, lines=5, n=1, questions=1, filler=9)
    assert title(result) == "Recall, 5 lines"
