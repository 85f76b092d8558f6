"""The page made from results: every cell is in it, the losing and the broken ones marked."""

import copy
import json
from xml.etree import ElementTree

import pytest

from dynmask.bench import BENCHMARKS, run_benchmark, settings_for
from dynmask.bench.results import VERSION, break_even, load

pytest.importorskip("matplotlib")

from dynmask.bench.page import build_page
from dynmask.bench.plots import time_lines


@pytest.fixture(scope="module")
def documents():
    chosen = {"lengths": (40, 65), "scores": ("normal", "dma"), "keep": 8, "impl": "reference"}
    return {
        name: run_benchmark(settings_for(name, device="cpu", rounds=1, warmups=1, **chosen))
        for name in BENCHMARKS
    }


def rows_of(page):
    """Table rows below the headings."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not line.startswith(("| ---", "| tokens"))
    ]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_cell_has_a_row(documents, benchmark):
    document = documents[benchmark]
    page = build_page([document])["README.md"]
    assert len(rows_of(page)) == len(document["cells"])
    headings = next(line for line in page.splitlines() if line.startswith("| tokens"))
    assert all(len(row) == headings.count("|") - 1 for row in rows_of(page))
    assert "On a CPU" in page
    assert document["date"] in page


def test_plots_are_whole_and_shown(documents):
    files = build_page(list(documents.values()))
    plots = [name for name in files if name.endswith(".svg")]
    assert len(plots) == 8  # selection and the paper's table have no rate
    for name in plots:
        assert ElementTree.fromstring(files[name]).tag.endswith("svg")
        assert f"({name})" in files["README.md"]
    assert files == build_page(list(documents.values()))  # same figures, same files


def test_losing_and_broken_cells_are_marked(documents):
    document = copy.deepcopy(documents["op"])
    good, losing, wrong, _ = document["cells"]
    good["ratio"] = {"median": 3.0, "low": 2.5, "high": 3.5}
    losing["ratio"] = {"median": 0.97, "low": 0.9, "high": 1.1}
    for key in ("times", "ratio", "useful_flops"):
        del wrong[key]
    wrong |= {"status": "error", "error": "attention: row 7 | bad\nmore"}
    page = build_page([document])["README.md"]
    rows = rows_of(page)
    assert "3.00x [2.50, 3.50]" in rows[0]
    assert "0.97x [0.90, 1.10] **loses**" in rows[1]
    assert rows[2][2] == "**error** attention: row 7 / bad"
    assert "65 tokens normal: not timed" in page


def test_incomplete_results_say_so(documents):
    assert "Incomplete" not in build_page([documents["op"]])["README.md"]
    assert "Incomplete" in build_page([documents["op"] | {"complete": False}])["README.md"]


def test_lines_hold_baseline_and_ours(documents):
    lines = time_lines(documents["op"])
    assert set(lines) == {
        "dense, flash",
        *(f"{name}, {kind}" for name in ("total", "attention") for kind in ("normal", "dma")),
    }
    assert [length for length, _ in lines["dense, flash"]] == [40, 65]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 2.0, 8.0], 200.0),
        ([2.0, 4.0, 8.0], 100.0),
        ([0.5, 0.6, 0.7], None),
        ([2.0, 0.5, 2.0], 800.0),
        ([2.0, 2.0, 0.5], None),
        ([], None),
    ],
    ids=["between", "always", "never", "again", "not-at-the-end", "empty"],
)
def test_break_even(ratios, expected):
    got = break_even([100, 400, 1600][: len(ratios)], ratios)
    assert got == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not written by"),
        ('{"format": "other"}', "not written by"),
        (json.dumps({"format": "dynmask-bench", "version": VERSION + 1}), "version"),
        (json.dumps({"format": "dynmask-bench", "version": VERSION}), "cells missing"),
        (None, "No such file"),
    ],
    ids=["damaged", "list", "other", "newer", "empty", "absent"],
)
def test_files_that_are_no_results(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
