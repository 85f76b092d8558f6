import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dynmask.report import build_page
from dynmask.report.heads import LONG_LENGTH, head_views
from dynmask.report.pictures import map_picture, mask_picture, pool

HOSTILE = "<script>alert(1)</script>\"'&<img src=http://evil/x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(uri):
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_every_head_has_four_pictures_with_their_own_words(plan, results):
    page = Page(build_page(plan, results))
    images = page.all("img")
    assert len(images) == 4 * 3 * 4
    assert len({image["alt"] for image in images}) == len(images)
    assert all(pixels(image["src"]).shape == (128, 128, 4) for image in images)


def test_page_loads_nothing(plan, results):
    text = build_page(plan, results)
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text


def test_every_link_of_the_overview_has_its_panel(plan):
    page = Page(build_page(plan))
    panels = {a["id"] for a in page.all("section") if "head" in a.get("class", "").split()}
    cells = [a for a in page.all("a") if "cell" in a.get("class", "")]
    assert {cell["href"][1:] for cell in cells} == panels
    assert len(cells) == 12


def test_gate_marks_follow_the_plan(plan):
    page = Page(build_page(plan))
    dense = sum(int(layer.gate.sum()) for layer in plan.layers.values())
    assert 0 < dense < 12
    assert sum("dense" in a.get("class", "").split() for a in page.all("a")) == dense
    assert f"{dense} of 12" in page.text


def test_the_grid_shows_what_the_gate_compares(plan):
    page = Page(build_page(plan))
    cells = [a for a in page.all("a") if "cell" in a.get("class", "")]
    shares = [float(re.search(r"--share:([0-9.]+)%", cell["style"])[1]) for cell in cells]
    expected = torch.cat([layer.coverage for layer in plan.layers.values()])
    assert shares == pytest.approx((100 * expected).tolist(), abs=0.051)
    target = 100 * plan.settings.coverage
    assert ["dense" in cell["class"].split() for cell in cells] == [s < target for s in shares]


@pytest.mark.parametrize(
    ("length", "words"),
    [
        pytest.param(200, "the second half of texts of 200 tokens", id="L"),
        pytest.param(4000, "the rows past the first 200 tokens of texts of 4 000", id="longer"),
    ],
)
def test_page_says_where_coverage_was_measured(plan, length, words):
    plan = dataclasses.replace(plan, data={**plan.data, "holdout_length": length})
    assert words in " ".join(Page(build_page(plan)).text.split())


def test_hostile_names_stay_text(make_plan, results):
    plan = make_plan(architecture=HOSTILE)
    plan.fingerprint[HOSTILE] = [HOSTILE]
    rows = tuple(dataclasses.replace(row, task=HOSTILE, mode=HOSTILE) for row in results.quality)
    speed = tuple(dataclasses.replace(row, baseline=HOSTILE) for row in results.speed)
    bad = dataclasses.replace(
        results,
        model=HOSTILE,
        date=HOSTILE,
        machine={"processor": HOSTILE, "gpus": [HOSTILE], HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        quality=rows,
        speed=speed,
    )
    for page in (Page(build_page(plan, bad)), Page(build_page(plan))):
        assert len(page.all("script")) == 1
        assert not any("onerror" in attributes for _, attributes in page.tags)
        assert HOSTILE in page.text


def test_losing_modes_are_marked_and_others_are_not(plan, results):
    text = build_page(plan, results)
    marks = re.findall(r"<th scope=\"row\">([^<]*)<span class=\"loss\">([^<]*)<", text)
    assert [(mode.strip(), word) for mode, word in marks] == [
        ("DAM static", "worse"),
        ("DAM static", "worse"),
        ("DAM static", "worse"),
        ("DAM gated", "slower"),
    ]


def test_page_without_results_has_no_empty_tables(plan):
    page = Page(build_page(plan))
    assert not {"quality", "speed"} & {a.get("id") for a in page.all("section")}
    assert len(page.all("table")) == 1


def test_figures_of_a_head_are_those_of_the_plan(plan):
    view = head_views(plan)[5]
    layer = plan.layers[1]
    assert (view.layer, view.head) == (1, 1)
    assert view.columns == len(layer.columns[1])
    assert view.offsets == len(layer.offsets[1])
    assert view.dense == bool(layer.gate[1])
    assert view.density_long == pytest.approx(float(plan.density(LONG_LENGTH, "static")[1, 1]))


def test_stripes_picture_leaves_out_the_corner(plan):
    true_mask, stripes = (picture.uri for picture in head_views(plan)[0].pictures[2:])
    blue = [int((pixels(uri)[..., 3] == 255).sum()) for uri in (true_mask, stripes)]
    alone = dataclasses.replace(plan.stripes(0, "static"), corner=None)
    expected = pool(alone.dense(plan.settings.capture_length)[0, 0])
    assert blue[1] == int(expected.tril().sum())
    assert blue[0] != blue[1]


@pytest.mark.parametrize("length", [1, 63, 128, 129, 1000])
def test_pooling_keeps_a_line_of_one_pixel(length):
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:, length // 3] = True
    small = pool(mask)
    assert small.shape == (min(length, 128),) * 2
    assert bool(small.any(1).all())
    assert int(small.any(0).sum()) in (1, 2)  # a pixel's cells may overlap by one line


def test_future_is_transparent_and_nothing_else():
    for uri in (
        map_picture(torch.rand(65, 65), log=True),
        map_picture(torch.randn(65, 65), log=False),
        mask_picture(torch.ones(65, 65)),
    ):
        assert np.array_equal(pixels(uri)[..., 3] == 0, np.triu(np.ones((65, 65), bool), 1))


def test_map_colours_rise_with_the_value():
    values = torch.zeros(64, 64)
    values[:, 0] = torch.logspace(-4, 0, 64)
    column = pixels(map_picture(values, log=True))[:, 0, :3].astype(int)
    luma = column @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luma) >= -1).all()
    assert luma[-1] - luma[0] > 100


def test_flat_map_is_drawn():
    assert pixels(map_picture(torch.zeros(3, 3), log=True)).shape == (3, 3, 4)
    assert pixels(map_picture(torch.ones(3, 3), log=False)).shape == (3, 3, 4)
