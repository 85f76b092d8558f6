"""Recipes that somebody else made up. `tests/train/test_train_recipe.py` has ordinary mistakes."""

from __future__ import annotations

import os

import pytest
import yaml
from dying import child, out_of_memory_at

pytest.importorskip("accelerate")

from dynmask.train.loader import parse
from dynmask.train.recipe import Recipe

GOOD = {
    "model": {"type": "llama", "hidden_size": 16},
    "data": {"type": "mqar"},
    "phases": [{"length": 64, "steps": 300}],
    "tokens_per_step": 256,
}
TEXT = yaml.safe_dump(GOOD)


def refused(path, message, settings=()):
    """`Recipe.load` raises a ValueError that begins as all of its do, with 400 MiB of memory."""

    def load():
        out_of_memory_at(400 * 2**20)
        with pytest.raises(ValueError, match=message) as caught:
            Recipe.load(path, settings=list(settings))
        assert len(str(caught.value)) < 2000

    assert child(load) == 0


def bomb(name):
    """Nine lists of nine of the one before: 60 lines that unfold to 3 GB of text."""
    levels = [f"{name}0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 10):
        links = ", ".join([f"*a{level - 1}"] * 9)
        levels.append(f"{name}{level}: &a{level} [{links}]")
    return TEXT + "\n".join(levels) + "\nlr: *a9\n"


HOSTILE = {
    "alias bomb": (bomb("clip"), "aliases are not read"),
    "alias in a list": (TEXT + "betas: &a [*a, 1]\n", "aliases are not read"),
    "merge": (TEXT + "x: &a {lr: 1.0}\n<<: *a\n", "aliases are not read"),
    "itself": ("&a {model: *a}", "aliases are not read"),
    "deep list": ("[" * 50_000, "nested too deeply"),
    "deep mapping": ("{a: " * 50_000, "nested too deeply"),
    "deep block": (
        "\n".join(" " * depth + "a:" for depth in range(600)),
        "nested too deeply",
    ),
    "python object": ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
    "python name": ("model: !!python/name:os.system", "could not determine a constructor"),
    "own tag": ("!mine {a: 1}", "could not determine a constructor"),
    "binary": (TEXT + "seed: !!binary AAAA\n", "could not determine a constructor"),
    "set": (TEXT + "seed: !!set {1}\n", "could not determine a constructor"),
    "tag that lies": (TEXT + "seed: !!int x\n", "cannot be read"),
    "5,000 digits": (TEXT + f"seed: {'9' * 5000}\n", "cannot be read"),
    "400 digits": (TEXT + f"lr: {'9' * 400}\n", "beyond 64 bits"),
    "hexadecimal": (TEXT + f"seed: 0x{'f' * 5000}\n", "beyond 64 bits"),
    "sixties": (TEXT + f"seed: {':'.join(['59'] * 5000)}\n", "beyond 64 bits"),
    "negative": (TEXT + f"seed: -{'9' * 30}\n", "beyond 64 bits"),
    "digits in the model": (
        TEXT.replace("hidden_size: 16", f"hidden_size: {'9' * 99}"),
        "beyond 64 bits",
    ),
    "not a number": (TEXT + "lr: .nan\n", "lr=nan"),
    "infinite": (TEXT + "weight_decay: .inf\n", "weight_decay=inf"),
    "seed that numpy refuses": (TEXT + f"seed: {2**32}\n", "seed=4294967296 is out of its range"),
    "key twice": (TEXT + "lr: 0.1\nlr: 0.2\n", "'lr' comes twice"),
    "key twice inside": (TEXT.replace("type: mqar", "{type: mqar, type: text}"), "cannot be read"),
    "type is a list": (TEXT.replace("type: mqar", "type: [mqar]"), r"type=\['mqar'\] must be"),
    "type is a mapping": (TEXT.replace("type: mqar", "type: {a: 1}"), "must be one of"),
    "type is null": (TEXT.replace("type: mqar", "type:"), "type=None must be"),
    "schedule is a list": (TEXT + "schedule: [cosine]\n", "schedule: type=None must be one of"),
    "key that is a list": (TEXT + "? [a]\n: 1\n", "unhashable key"),
    "null as a key": (TEXT + "? \n: 1\n", "unknown field None"),
    "date": (TEXT + "seed: 2020-99-99\n", "seed='2020-99-99' must be an integer"),
    "two documents": (TEXT + "---\na: 1\n", "another document"),
    "NUL": (TEXT + "a: \0\n", "not allowed"),
    "huge string": (TEXT + f"tokenizer: [{'x' * 200_000}]\n", "must be a string"),
    "huge file": (TEXT + "#" * 2**18, "over 262144 bytes"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_recipe_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    refused(path, message)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"model: \xe9", b"\x80"], ids=repr)
def test_other_encodings_name_the_file(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe: .*recipe\.yaml cannot be read"):
        Recipe.load(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("path", ["/dev/zero", "/", "a\0b", "x" * 5000], ids=lambda p: repr(p)[:12])
def test_what_is_no_file_is_named(path):
    if path == "x" * 5000:
        with pytest.raises(ValueError, match=r"recipe: xxx.* cannot be read"):
            Recipe.load(path)
        return
    refused(path, "recipe: .* cannot be read")


SETTINGS = {
    "alias": ("seed=&a [*a]", "seed='&a"),
    "deep": ("seed=" + "[" * 50_000, "must be an integer"),
    "digits": ("seed=" + "9" * 5000, "must be an integer"),
    "tag": ("seed=!!python/object/apply:os.system [id]", "must be an integer"),
    "date": ("seed=2020-99-99", "must be an integer"),
    "type": ("data.type=[1]", r"data: type=\[1\] must be one of"),
    "NUL": ("seed=\0", "must be an integer"),
}


@pytest.mark.parametrize(("setting", "message"), SETTINGS.values(), ids=SETTINGS)
def test_hostile_settings(tmp_path, setting, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Recipe.load(path, settings=[setting])


def test_what_a_recipe_needs_is_read_as_yaml_reads_it():
    text = """
    a: null
    b: [true, no, 1, -7, 0x10, 1_000, 2.5e-3, .5, "x", 'y', z]
    c: {d: {e: [[1, 2], []]}}
    f: |
      two
      lines
    """
    assert parse(text) == yaml.safe_load(text)
    assert parse(f"[{2**63 - 1}, {-(2**63)}]") == [2**63 - 1, -(2**63)]
