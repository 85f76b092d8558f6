"""The targets of ``fuzz/`` on mutated valid inputs; atheris runs the same ones for longer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).parents[2] / "fuzz"))

from targets import TARGETS, seeds

# What parsers stumble over.
PIECES = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\x1b[2J"),
    *(b"NaN", b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"0x", b"1:30", b"null", b"~"),
    *(b"[" * 40, b"{" * 40, b'{"a":' * 40, b"[" * 20_000, b"]", b"}", b'""', b"''"),
    *(b"&a ", b"*a", b"<<: ", b"!!binary ", b"!!python/name:os.system ", b"---\n", b"? "),
    *(b"../", b"/dev/zero", b"--", b"=", b"\n", b"\t", b"\r\n"),
]


@st.composite
def mutated(draw, valid):
    """A valid input with a few cuts, copies, flipped bytes and pieces put in."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 4))):
        first, last = sorted(draw(st.integers(0, len(data))) for _ in range(2))
        kind = draw(st.sampled_from(["cut", "copy", "piece", "flip", "end"]))
        if kind == "cut":
            data = data[:first] + data[last:]
        elif kind == "copy":
            data = data[:last] + data[first:]
        elif kind == "piece":
            data = data[:first] + draw(st.sampled_from(PIECES)) + data[first:]
        elif kind == "flip" and first < len(data):
            data = data[:first] + bytes([draw(st.integers(0, 255))]) + data[first + 1 :]
        elif kind == "end":
            data = data[:last]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_a_value_error(name):
    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(st.one_of(mutated(seeds()[name]), st.binary(max_size=60)))
    def run(data):
        TARGETS[name](data)

    for seed in seeds()[name]:
        TARGETS[name](seed)
    run()


def test_the_seeds_are_valid(monkeypatch):
    """Else all that follows would be refused at the first byte."""
    import targets

    told = []
    monkeypatch.setattr(targets.MaskPlan, "inspect", lambda plan: told.append(plan))
    for name in ("plan_json", "plan_body"):
        TARGETS[name](seeds()[name][0])
    TARGETS["plan_tensors"](seeds()["plan_tensors"][0])
    assert len(told) == 3
    for data in seeds()["recipe"]:
        (targets._home() / "recipe.yaml").write_bytes(data)
        assert targets.Recipe.load(targets._home() / "recipe.yaml")
