import json

import pytest

from dynmask.report import QualityRow, Results, merge
from dynmask.report.machine import machine, versions
from dynmask.report.tables import below_full, by_task


def row(mode, score, interval, metric="accuracy"):
    return QualityRow("t", mode, metric, score, interval, 10, 1.0, 1.0, 1.0, "cpu × 1")


def test_saved_results_come_back_equal(results, tmp_path):
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("{", "not JSON", id="cut"),
        pytest.param("[]", "not a dynmask results file", id="list"),
        pytest.param("{}", "not a dynmask results file", id="other-json"),
        pytest.param('{"format": "dynmask-results", "version": 9}', "version 9", id="version"),
        pytest.param('{"format": "dynmask-results", "version": 1}', "damaged", id="fields"),
        pytest.param(
            json.dumps(
                {
                    "format": "dynmask-results",
                    "version": 1,
                    "model": "m",
                    "date": "",
                    "machine": {},
                    "versions": {},
                    "quality": [{"task": "t"}],
                    "speed": [],
                }
            ),
            "damaged",
            id="row",
        ),
    ],
)
def test_damaged_results_are_refused_by_name(content, words, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        Results.load(path)
    assert "bad.json" in str(caught.value)


def test_missing_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        Results.load(tmp_path / "absent.json")


def test_merge_joins_rows_and_refuses_two_models(results):
    both = merge([results, results])
    assert both.quality == results.quality * 2
    other = Results.from_dict({**results.to_dict(), "model": "other"})
    with pytest.raises(ValueError, match="two models"):
        merge([results, other])
    with pytest.raises(ValueError, match="at least one"):
        merge([])


@pytest.mark.parametrize(
    ("mode_row", "full", "expected"),
    [
        pytest.param(row("static", 0.5, (0.4, 0.6)), row("full", 0.9, (0.8, 1)), True, id="apart"),
        pytest.param(row("static", 0.7, (0.6, 0.85)), row("full", 0.9, (0.8, 1)), False, id="meet"),
        pytest.param(row("static", 0.89, None), row("full", 0.9, (0.8, 1)), True, id="no-interval"),
        pytest.param(row("static", 0.9, None), row("full", 0.9, None), False, id="equal"),
        pytest.param(row("static", 0.1, None), None, False, id="no-baseline"),
        pytest.param(
            row("static", 9, (8, 10), "perplexity"),
            row("full", 6, (5, 7), "perplexity"),
            True,
            id="perplexity-more-is-worse",
        ),
        pytest.param(
            row("static", 3, (2, 4), "perplexity"),
            row("full", 6, (5, 7), "perplexity"),
            False,
            id="perplexity-less-is-better",
        ),
    ],
)
def test_worse_means_beyond_the_intervals(mode_row, full, expected):
    assert below_full(mode_row, full) is expected


def test_tasks_keep_their_order_and_modes_get_theirs(results):
    groups = by_task(results.quality)
    assert [task for task, _ in groups] == [
        "LongEval, 200 lines",
        "Needles, 8192 tokens",
        "Perplexity, 8192 tokens",
    ]
    assert [r.mode for r in groups[0][1]] == ["full", "static", "auto"]


def test_machine_and_versions_are_plain_json():
    facts = machine()
    assert facts["cores"] >= 1
    assert facts["processor"]
    assert {"python", "torch", "dynmask"} <= set(versions())
    json.dumps([facts, versions()])
