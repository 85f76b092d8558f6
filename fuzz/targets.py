"""What is fuzzed: each target takes bytes and raises only if dynmask breaks its promise.

The promise: a file or an argument that does not fit is a ``ValueError`` (from the command line,
argparse's exit with code 2), whatever its bytes are. Anything else that is raised is a finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dynmask.cli import COMMANDS, build_parser
from dynmask.cli.inputs import read_texts
from dynmask.dam import LayerPlan, MaskPlan, Settings, describe_data
from dynmask.train.recipe import Recipe

LENGTH = 8


@cache
def _home() -> Path:
    return Path(tempfile.mkdtemp(prefix="dynmask-fuzz-"))


@cache
def _plan() -> MaskPlan:
    """The smallest plan: one layer of two heads."""
    share = torch.tensor([0.5, 1.0])
    layer = LayerPlan(
        columns=(torch.tensor([0, 3]), torch.tensor([1])),
        offsets=(torch.tensor([0]), torch.tensor([0, 2])),
        corner=torch.eye(LENGTH, dtype=torch.bool).expand(2, -1, -1).clone(),
        coverage=share,
        tail_coverage=share,
        corner_coverage=share,
        gate=torch.tensor([True, False]),
        previews=torch.zeros(2, 2, LENGTH, LENGTH, dtype=torch.float16),
    )
    return MaskPlan(
        fingerprint={"architecture": "Fuzzed", "weights": {"w": [0.5]}},
        settings=Settings(capture_length=LENGTH),
        data=describe_data([[1, 2], [3]], holdout=1),
        layers={0: layer},
    )


@cache
def _saved() -> tuple[dict[str, Any], bytes]:
    """Return the json body and the tensors of a valid plan."""
    folder = _home() / "valid"
    _plan().save(folder)
    (tensors,) = folder.glob("tensors-*.safetensors")
    return json.loads((folder / "plan.json").read_text()), tensors.read_bytes()


def _load(text: bytes, tensors: bytes, name: str) -> None:
    folder = _home() / "plan"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "plan.json").write_bytes(text)
    (folder / name).write_bytes(tensors)
    with contextlib.suppress(ValueError):
        plan = MaskPlan.load(folder)
        plan.inspect()
        plan.density(LENGTH, "auto")
        plan.save(_home() / "again")
        assert MaskPlan.load(_home() / "again").fingerprint == plan.fingerprint


def _signed(body: dict[str, Any]) -> bytes:
    rest = {name: value for name, value in body.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def plan_json(data: bytes) -> None:
    """Read the bytes as a ``plan.json``."""
    body, tensors = _saved()
    _load(data, tensors, body["tensors"]["file"])


def plan_body(data: bytes) -> None:
    """Read the bytes as fields of a ``plan.json`` that is then signed, so that the hash fits."""
    body, tensors = _saved()
    try:
        fields = json.loads(data)
        text = _signed(body | fields)
    except (ValueError, TypeError, RecursionError):
        return
    _load(text, tensors, body["tensors"]["file"])


def plan_tensors(data: bytes) -> None:
    """Read the bytes as the tensors file of a plan whose hashes fit."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    record = {"file": name, "bytes": len(data), "sha256": digest}
    _load(_signed(_saved()[0] | {"tensors": record}), data, name)


def recipe(data: bytes) -> None:
    """Read the bytes as a recipe, and write it again."""
    path = _home() / "recipe.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        json.dumps(Recipe.load(path).identity())


def setting(data: bytes) -> None:
    """Read the bytes as ``--set KEY=VALUE`` of a recipe of the package."""
    with contextlib.suppress(ValueError):
        json.dumps(Recipe.load("tiny", settings=[data.decode("utf-8", "replace")]).identity())


def texts(data: bytes) -> None:
    """Read the bytes as calibration texts of each kind."""
    for name in ("a.txt", "a.jsonl", "a.txt.xz", "a.jsonl.xz"):
        path = _home() / name
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            assert all(text.encode() for text in read_texts([str(path)]))


def arguments(data: bytes) -> None:
    """Read the bytes as the words of a command line, without running the command."""
    words = data.decode("utf-8", "replace").split()
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        code = None
        try:
            parsed = build_parser(words).parse_args(words)
        except SystemExit as end:
            code = end.code
    assert parsed.command in COMMANDS if code is None else code in (0, 2)


def seeds() -> dict[str, list[bytes]]:
    """Return valid inputs of every target, to start from."""
    body, tensors = _saved()
    lines = b'{"text": "one"}\n{"text": "two"}'
    recipes = [Path(path).read_bytes() for path in sorted(_recipes().glob("*.yaml"))]
    return {
        "plan_json": [json.dumps(body).encode()],
        "plan_body": [json.dumps({name: body[name]}).encode() for name in body],
        "plan_tensors": [tensors, save({"0.corner": torch.zeros(2, 5, dtype=torch.uint8)})],
        "recipe": recipes,
        "setting": [b"lr=1e-3", b"phases.0.steps=7", b"model.rope={a: [1, .inf]}", b"data.type=x"],
        "texts": [lines, b"plain", lzma.compress(lines), lzma.compress(b"plain")],
        "arguments": [
            b"calibrate --out p --tau 0.1 --texts a.txt b.jsonl --json",
            b"eval longeval --plan p --mode static --lines 4 --n 2",
            b"train --recipe tiny --out o --set lr=1e-3",
            b"report --plan p --results a.json --out r.html --debug",
            *(" ".join(words).encode() for words in _every_option()),
        ],
    }


def _every_option() -> Iterator[list[str]]:
    """Yield a command line for each option of each subcommand."""
    for name in COMMANDS:
        commands = next(
            action for action in build_parser([name])._actions if isinstance(action.choices, dict)
        )
        assert commands.choices is not None
        for action in commands.choices[name]._actions:
            value = next(iter(action.choices or ["1"]))
            if action.option_strings and "--help" not in action.option_strings:
                yield [name, action.option_strings[-1], *([str(value)] * (action.nargs != 0))]


def _recipes() -> Path:
    import dynmask.train

    return Path(dynmask.train.__file__).parent / "recipes"


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (plan_json, plan_body, plan_tensors, recipe, setting, texts, arguments)
}
