"""The pictures of docs/ show what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dynmask import Lifetimes

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["masks", "dynamic_tile"])
def test_pictures_are_what_their_script_draws(pictures, name):
    draw = {"masks": pictures.masks_svg, "dynamic_tile": pictures.tile_svg}[name]
    kept = (ROOT / "docs" / "img" / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == draw(), "run python docs/pictures.py"
    ElementTree.fromstring(kept)


def test_picture_of_masks_shows_what_they_show(pictures):
    """The cells of each panel, read back from its path, against a definition in words."""
    size, (columns, offsets) = pictures.TOKENS, ((0, 1, 7, 12), (0, 1, 2, 16))
    score = pictures.scores()[0, 0].tolist()
    best = [sorted(range(i + 1), key=lambda j: (-score[j], j))[:7] for i in range(size)]
    wanted = {
        "Full attention": lambda i, j: True,
        "DAM, static": lambda i, j: j in columns or i - j in offsets,
        "DMA, learned": lambda i, j: j in best[i],
    }
    root = ElementTree.parse(ROOT / "docs" / "img" / "masks.svg").getroot()
    panels = {e.attrib["data-mask"]: e for e in root.iter() if "data-mask" in e.attrib}
    assert panels.keys() == {*wanted, "DAM, dynamic"}
    for name, rule in wanted.items():
        cells = cells_of(panels[name], "dm-k")
        assert cells == {(i, j) for i in range(size) for j in range(i + 1) if rule(i, j)}, name
        assert int(panels[name].attrib["data-pairs"]) == len(cells)
    seen = cells_of(panels["DAM, dynamic"], "dm-k")
    summaries = cells_of(panels["DAM, dynamic"], "dm-m")
    assert seen | summaries == {(i, j) for i in range(size) for j in range(i + 1)}
    assert not seen & summaries
    assert {(i, i) for i in range(size)} <= seen


def cells_of(panel, name):
    """(row, column) of all cells that a path of rectangles covers; the panel's corner is (0, 0)."""
    paths = {e.attrib["class"]: e.attrib["d"] for e in panel.iter() if "d" in e.attrib}
    at = re.findall(r"M(\d+) (\d+)h(\d+)v5", paths["dm-e"])
    left, top = min(int(x) for x, _, _ in at), min(int(y) for _, y, _ in at)
    return {
        ((int(y) - top) // 5, (int(x) - left) // 5 + step)
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v5", paths[name])
        for step in range(int(width) // 5)
    }
