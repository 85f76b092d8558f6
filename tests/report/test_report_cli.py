"""``dynmask report`` on plans that are saved here."""

import dataclasses
import json

import pytest

from dynmask.cli import BAD_INPUT, OK, main
from dynmask.cli.report import plan_names


@pytest.fixture
def folders(tmp_path, make_plan):
    for name, seed in (("first", 0), ("second", 1)):
        make_plan(seed=seed).save(tmp_path / name)
    plan = make_plan()
    dataclasses.replace(plan, layers={0: plan.layers[0]}).save(tmp_path / "short")
    return tmp_path


def call(capsys, folders, *words):
    out = folders / "page.html"
    code = main(["report", "--json", "--plan", str(folders / "first"), "--out", str(out), *words])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1]), out


def test_two_plans_become_one_page(capsys, folders):
    code, said, out = call(capsys, folders, "--compare", str(folders / "second"))
    assert code == OK
    assert said["bytes"] == out.stat().st_size
    page = out.read_text(encoding="utf-8")
    assert "A: first" in page
    assert "B: second" in page


def test_one_plan_is_not_called_a(capsys, folders):
    code, _, out = call(capsys, folders)
    assert code == OK
    assert "A: " not in out.read_text(encoding="utf-8").partition("<body>")[2]


@pytest.mark.parametrize(("name", "words"), [("short", "one model"), ("absent", "absent")])
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(capsys, folders, name, words):
    code, said, out = call(capsys, folders, "--compare", str(folders / name))
    assert code == BAD_INPUT
    assert words in said["error"]
    assert not out.exists()


def test_folders_of_one_name_are_told_apart():
    assert plan_names("runs/a", "runs/b/") == ("a", "b")
    assert plan_names("a/plan", "b/plan") == ("a/plan", "b/plan")
