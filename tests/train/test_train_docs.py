"""docs/train.md: its commands parse, its recipes load, its Python runs."""

import re
from pathlib import Path

import pytest

from dynmask.cli import build_parser, main
from dynmask.train.recipe import Recipe, named_recipes

TEXT = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
YAML = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"dynmask (train .*?)(?:`|\n)", TEXT)
SHORT = ["phases.0.steps=2", "schedule.warmup_steps=0", "schedule.decay_steps=0"]


@pytest.mark.parametrize("number", range(len(YAML)))
def test_recipe_loads(number, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML[number], encoding="utf-8")
    recipe = Recipe.load(path)
    if number == 0:
        shown = set(re.findall(r"^(\w+):", YAML[0], re.MULTILINE))
        assert shown == set(recipe.to_dict()), "every field is shown"
        assert recipe == Recipe.load("80M", settings=["model.keep=1024", "model.window=0"])


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    chosen = build_parser(command.split()).parse_args(command.split())
    assert chosen.recipe in named_recipes()


def test_all_recipes_are_named():
    for name in named_recipes():
        assert f"`{name}`" in TEXT


def test_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--set", *SHORT, "tokens_per_step=512", "eval_sequences=2"]
    assert main([*COMMANDS[0].split(), *settings]) == 0
    exec(compile(PYTHON[0], "docs/train.md", "exec"), {})
    assert "It was a" in capsys.readouterr().out
    less = '"phases.0.steps=3", "tokens_per_step=512", "eval_sequences=2"'
    code = PYTHON[1].replace('"phases.0.steps=3"', less)
    exec(compile(code, "docs/train.md", "exec"), {})
    assert capsys.readouterr().out.startswith("3 ")
