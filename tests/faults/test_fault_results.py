"""Results files that somebody else made up, up to the page that `dynmask report` writes."""

from __future__ import annotations

import dataclasses
import json
import os
from html.parser import HTMLParser

import pytest
from dying import child, out_of_space

from dynmask.cli import BAD_INPUT, OK, main
from dynmask.report import QualityRow, Results, SpeedRow

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"


@pytest.fixture
def document():
    quality = QualityRow(
        "task",
        "static",
        "accuracy",
        0.5,
        (0.4, 0.6),
        9,
        0.1,
        0.2,
        1.5,
        "cpu",
        {"a": 1},
        metrics={"all found": 0.5},
    )
    full = QualityRow("task", "full", "accuracy", 0.6, None, 9, 1.0, 1.0, 1.5, "sdpa")
    speed = SpeedRow(
        mode="static",
        length=100,
        seconds=1.0,
        spread=(0.9, 1.1),
        ratio=2.0,
        ratio_spread=(1.9, 2.1),
        density=0.1,
        computed=0.2,
        impl="cpu",
        repeats=3,
        baseline="sdpa",
    )
    made = Results(
        model="m",
        date="2030",
        machine={"processor": "p", "threads": 2, "gpus": []},
        versions={"torch": "2"},
        quality=(quality, full),
        speed=(speed,),
    )
    return json.loads(json.dumps(made.to_dict()))


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.scripts, self.handlers = 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def places(value, path=()):
    """Every place in the document that holds a plain value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, part in items for place in places(part, (*path, key))]
    return [path]


def put(document, path, value):
    changed = json.loads(json.dumps(document))
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def report(plan_folder, folder, document):
    (folder / "results.json").write_text(json.dumps(document))
    page = folder / "page.html"
    words = ["report", "--plan", str(plan_folder), "--out", str(page)]
    code = main([*words, "--results", str(folder / "results.json")])
    return code, page.read_text() if page.exists() else None


@pytest.fixture(scope="module")
def plan_folder(plan, tmp_path_factory):
    """Of one layer: the page is made anew a hundred times."""
    folder = tmp_path_factory.mktemp("plans") / "plan"
    first = min(plan.layers)
    dataclasses.replace(plan, layers={first: plan.layers[first]}).save(folder)
    return folder


def test_no_place_takes_html(plan_folder, tmp_path, document):
    """Markup in every single place: it is escaped, or the file refused."""
    code, page = report(plan_folder, tmp_path, document)
    assert code == OK
    scripts = Tags(page).scripts
    all_places = places(document)
    assert len(all_places) > 40
    for path in all_places:
        (tmp_path / "page.html").unlink(missing_ok=True)
        code, page = report(plan_folder, tmp_path, put(document, path, EVIL))
        assert code in (OK, BAD_INPUT), path
        assert (page is None) == (code == BAD_INPUT)
        if page is not None:
            tags = Tags(page)
            assert (tags.scripts, tags.handlers) == (scripts, []), path
            assert "alert(2)>" not in page, path


OTHERS = [None, [], 10**400, 1e999, {"a": {"b": 1}}]


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: repr(value)[:12])
def test_values_of_other_types(plan_folder, tmp_path, document, value):
    for path in places(document):
        code, _ = report(plan_folder, tmp_path, put(document, path, value))
        assert code in (OK, BAD_INPUT), path


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": "dynmask-results", "version": 1, "machine": ' + '{"a":' * 500 + "1" + "}" * 501,
        '{"a": ' + "9" * 5000 + "}",
        '{"format": "dynmask-results", "version": 1, "machine": []}',
        '{"format": "dynmask-results", "version": 1, "quality": 5}',
    ],
    ids=["deep", "deep machine", "digits", "machine is a list", "quality is a number"],
)
def test_hostile_json_is_refused_by_name(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        Results.load(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_saving_on_a_full_disk_keeps_the_old_file(tmp_path, document):
    path = tmp_path / "results.json"
    path.write_text("old")

    def work():
        out_of_space(10)
        with pytest.raises(OSError, match="File too large"):
            Results.from_dict(document).save(path)

    assert child(work) == 0
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
