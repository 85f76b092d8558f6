"""``dynmask train``."""

import json

import pytest
import yaml
from train_cases import MQAR, RECIPE, changed

from dynmask.cli import main
from dynmask.train import trainer
from dynmask.train.recipe import named_recipes
from dynmask.train.trainer import weighted_loss


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE.to_dict()), encoding="utf-8")
    return str(path)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_stop_and_go_on(recipe, text_folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["train", recipe, "--data", str(text_folder), "--out", out, "--workers", "1"]
    assert main([*command, "--minutes", "1e-9", "--json"]) == 3
    first = last_line(capsys)
    assert (first["complete"], first["steps"], first["of_steps"]) == (False, 1, 5)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "5 of 5" in shown
    assert "measured" in shown
    assert max(map(len, shown.splitlines())) <= 80 + len(out)
    assert (tmp_path / "out" / "model" / "tokenizer.json").exists()


def test_settings_and_json(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(MQAR, seed=3).to_dict()), encoding="utf-8")
    command = ["train", str(path), "--out", str(tmp_path / "out"), "--json"]
    settings = ["phases=[{length: 64, steps: 2}]", "schedule.decay_steps=0", "log_every=1"]
    assert main([*command, "--set", *settings, "schedule.warmup_steps=0"]) == 0
    document = last_line(capsys)
    assert document["steps"] == 2
    assert document["model"] == f"{tmp_path / 'out'}/model"
    assert document["peak_flops"] > 0
    assert 0 <= document["eval_answers"] <= 1
    assert document["eval_loss"] < 10


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ("no-such", "text", "give a YAML file or the name of a recipe: 1.7B"),
        ("embedded", "none", "matches 'train*'"),
        ("embedded", "nope", "nope does not exist"),
        ("embedded", "file", "train.txt is a file; give its folder"),
        ("80M", None, "no path is given; use --data PATH"),
    ],
)
def test_bad_input(recipe, data, message, text_folder, tmp_path, capsys):
    folders = {
        "text": text_folder,
        "none": tmp_path,
        "nope": tmp_path / "nope",
        "file": text_folder / "train.txt",
    }
    given = ["--data", str(folders[data])] if data else []
    assert main(["train", recipe, *given, "--out", str(tmp_path / "out"), "--json"]) == 2
    document = last_line(capsys)
    assert message in document["error"]
    assert not (tmp_path / "out").exists()


def test_broken_loss(recipe, text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        trainer, "weighted_loss", lambda *given: weighted_loss(*given) * float("nan")
    )
    command = ["train", recipe, "--data", str(text_folder), "--out", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 1
    assert "the loss of step 1 is nan" in last_line(capsys)["error"]


def test_help_names_exit_codes_and_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "3    stopped by --minutes" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_names_of_the_recipes():
    names = ["1.7B", "200M", "28M", "680M", "80M", "embedded", "mha", "mqar", "tiny"]
    assert named_recipes() == names
