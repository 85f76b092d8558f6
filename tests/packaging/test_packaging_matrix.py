"""The version matrix: noxfile.py, pyproject.toml and the guide name the same versions."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("nox", reason="what runs the matrix: pip install nox")
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide" / "install.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(session):
    (cells,) = re.findall(rf"^\| `{session}` \|(.*)\|$", GUIDE, re.MULTILINE)
    return [cell.strip() for cell in cells.split(" | ")]


def test_the_guide_has_every_session(matrix):
    for name, session in matrix.nox.registry.get().items():
        cells = row(name)
        if session.python is None:
            assert cells[0] == "that of nox"
        else:
            asked = [session.python] if isinstance(session.python, str) else session.python
            assert cells[0] == ", ".join(asked), name
    assert PROJECT["requires-python"] == f">={matrix.PYTHONS[0]}"


def test_the_oldest_is_what_pyproject_allows(matrix):
    oldest = matrix.oldest()
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + [line for extra in matrix.EXTRAS for line in extras[extra]]
    names = {re.match(r"[\w.-]+", line)[0] for line in asked} - {"dynmask"}
    assert oldest.keys() == names  # each has a lower bound
    written = dict(re.findall(r"([\w-]+) (\d[\d.]*)", row("oldest")[1]))
    assert {name.lower(): written[name] for name in written} == oldest | {"pyarrow": "17"}
    of_transformers = f"transformers {oldest['transformers']} "
    assert row("oldest_transformers")[1].startswith(of_transformers)


def test_ci_runs_the_oldest_transformers():
    assert "make matrix NOX='-s oldest_transformers'" in (ROOT / ".ci" / "run").read_text()


def test_every_path_is_there(matrix):
    assert [test for test in matrix.TESTS if not (ROOT / test).exists()] == []
