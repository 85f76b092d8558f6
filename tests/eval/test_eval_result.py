import dataclasses
import json

import pytest

from dynmask.eval.result import TABLE_HEAD, Result, accuracy_result, by_depth, wilson


# R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_ends():
    assert wilson(0, 50)[0] == 0
    assert wilson(50, 50)[1] == 1
    assert wilson(50, 50)[0] == pytest.approx(50 / (50 + 1.96**2), abs=1e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_errors(correct, n):
    with pytest.raises(ValueError):
        wilson(correct, n)


def test_depth_bins():
    parts = by_depth([0.0, 0.05, 0.1, 0.55, 1.0], [True, False, True, True, False])
    assert [part.n for part in parts] == [2, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [part.score for part in parts][:3] == [0.5, 1.0, None]
    assert parts[9].score == 0.0
    assert [parts[0].label, parts[9].label] == ["0-10 %", "90-100 %"]


def test_result_to_json_and_table():
    rows = [
        {"correct": True, "depth": 0.1, "prompt_tokens": 1000, "output": "7>"},
        {"correct": False, "depth": 0.9, "prompt_tokens": 1500, "output": ""},
    ]
    result = accuracy_result("longeval", rows, seconds=1.25, settings={"seed": 3})
    assert (result.score, result.n, result.prompt_tokens) == (0.5, 2, 1250)
    plain = json.loads(json.dumps(result.to_json()))
    assert set(plain) == {field.name for field in dataclasses.fields(Result)}
    assert plain["rows"] == rows
    assert plain["interval"] == list(wilson(1, 2))
    assert plain["parts"][1] == {"label": "10-20 %", "n": 1, "score": 1.0}
    row = result.table_row()
    assert len(row) == len(TABLE_HEAD)
    assert row == ("longeval", "2", "1,250", "50.0 %", "9.5 % to 90.5 %", "1.2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.score = 1.0


def test_table_of_a_single_window():
    result = Result("perplexity", "perplexity", 1, 12.3456, None, (), 8192.0, 2.0, {})
    assert result.table_row()[3:5] == ("12.346", "")
    assert result.to_json()["interval"] is None
