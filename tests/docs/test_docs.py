"""The pages of docs/ run as they stand and print what they say; their links and picture are right.

A page's Python blocks run in order, in one namespace and an empty folder. A comment behind a
``print``, or a line of its own at the left margin, is a line of the output.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dynmask import Lifetimes

ROOT = Path(__file__).parents[2]
# What needs a training run is run beside the tests of training, in small.
ELSEWHERE = {"train.md": "tests/train/test_train_docs.py"}
PAGES = sorted((ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, one thread, and random numbers that others do not notice."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(before)


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def stated_output(block):
    return [a or b for a, b in re.findall(r"^ *print\(.*\)  # (.+)$|^# (.+)$", block, re.MULTILINE)]


@each_page
def test_python_blocks_run(page, capsys):
    if page.name in ELSEWHERE:
        assert page.name in (ROOT / ELSEWHERE[page.name]).read_text(encoding="utf-8")
        return
    names = {"__name__": page.stem}
    for number, block in enumerate(blocks_of(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        stated = stated_output(block)
        assert not stated or printed == stated, f"block {number}"


def test_stated_output_is_found():
    block = (
        "x = 1  # not this\nfor i in (1, 2):\n    # nor this\n    print(i)  # 1\n# 2\nprint(x)\n"
    )
    assert stated_output(block) == ["1", "2"]


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def test_picture_of_lifetimes_is_what_the_mask_says():
    picture = ElementTree.parse(ROOT / "docs" / "img" / "dma_lifetimes.svg")
    bars = [e.attrib for e in picture.iter() if "data-key" in e.attrib]
    assert [int(bar["data-key"]) for bar in bars] == list(range(12))
    score = torch.tensor([[[float(bar["data-score"]) for bar in bars]]])
    expiry = Lifetimes.top(score, keep=3).expiry[0, 0].tolist()
    shown = ["never" if e >= len(bars) else str(e) for e in expiry]
    assert [bar["data-expiry"] for bar in bars] == shown
    cell = 36
    for key, (bar, end) in enumerate(zip(bars, expiry, strict=True)):
        if bar["class"] == "life":
            rows = (float(bar["x"]) - 196) / cell, float(bar["width"]) / cell
            assert rows[0] == pytest.approx(key, abs=0.1)
            assert rows[1] == pytest.approx(min(end, 12.5) - key, abs=0.15)
        else:
            assert end == key


def test_plain_pytorch_example_learns(capsys):
    path = ROOT / "examples" / "dma_op_in_plain_pytorch.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--steps", "80"])
    lines = re.findall(
        r"(\w+): loss ([\d.]+) before, ([\d.]+) after 80 steps", capsys.readouterr().out
    )
    assert [kind for kind, _, _ in lines] == ["op", "layer"]
    for kind, before, after in lines:
        assert float(before) > 1.3, kind
        assert float(after) < 0.5, f"{kind}: with no gradient for the score it is 0.66"
