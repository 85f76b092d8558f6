import base64
import dataclasses
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dynmask.dam import LayerPlan, MaskPlan, Settings, describe_data
from dynmask.report import build_page
from dynmask.report.explorer import json_text
from dynmask.report.heads import LONG_LENGTH, head_views
from dynmask.report.pictures import (
    MOST_PIXELS,
    map_levels,
    mask_levels,
    mask_share,
    picture_side,
    sheet,
    stripe_share,
)

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


def data_of(text):
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(block)


def test_every_layer_has_a_sheet_with_its_own_words(plan, results):
    page = Page(build_page(plan, results))
    images = page.all("img")
    assert [image["id"] for image in images] == ["sheet-0-0", "sheet-0-1", "sheet-0-2"]
    assert len({image["alt"] for image in images}) == 3
    size = (4 * 132 - 4, 4 * 132 - 4, 4)  # four kinds of four heads
    assert all(pixels(image["src"]).shape == size for image in images)


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


def test_every_link_leads_somewhere(make_plan):
    for page in (Page(build_page(make_plan())), Page(build_page(make_plan(), compare=make_plan()))):
        names = {a["id"] for _, a in page.tags if "id" in a}
        assert len(names) == sum("id" in a for _, a in page.tags)
        links = [a["href"][1:] for a in page.all("a")]
        assert set(links) <= names
        assert {f"row-{layer}-{head}" for layer in range(3) for head in range(4)} <= set(links)


def test_tables_have_captions_and_scopes(plan, results):
    page = Page(build_page(plan, results))
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in page.all("th"))


def test_gate_marks_follow_the_plan(plan):
    page = Page(build_page(plan))
    gated = sum(int(layer.gate.sum()) for layer in plan.layers.values())
    assert 0 < gated < 12
    assert sum("gated" in a.get("class", "").split() for a in page.all("a")) == gated
    assert f"{gated} of 12" in page.text


def test_the_grid_shows_what_the_gate_compares(plan):
    page = Page(build_page(plan))
    cells = [a for a in page.all("a") if "cell" in a.get("class", "")]
    shares = [float(re.search(r"--share:([0-9.]+)%", cell["style"])[1]) for cell in cells]
    coverage = torch.cat([layer.coverage for layer in plan.layers.values()])
    low, high = coverage.min(), coverage.max()
    assert shares == pytest.approx((100 * (coverage - low) / (high - low)).tolist(), abs=0.051)
    words = [f"coverage {100 * value:.1f} %" for value in coverage.tolist()]
    assert all(word in cell["aria-label"] for word, cell in zip(words, cells, strict=True))
    gated = (coverage < plan.settings.coverage).tolist()
    assert ["gated" in cell["class"].split() for cell in cells] == gated


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
    for text in (
        build_page(plan, bad),
        build_page(plan),
        build_page(plan, bad, compare=make_plan(seed=1), names=(HOSTILE, "{0}" + HOSTILE)),
    ):
        page = Page(text)
        assert len(page.all("script")) == 2
        assert not any("onerror" in attributes for _, attributes in page.tags)
        assert HOSTILE in page.text
        data_of(text)


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)//", "<!--<script>", "a&lt;b", "\u2028"]
)
def test_no_text_ends_the_data_block(text):
    block = json_text({"name": text})
    assert not set("<>&\u2028") & set(block)
    assert json.loads(block) == {"name": text}


def test_losing_modes_are_marked_and_others_are_not(plan, results):
    text = build_page(plan, results)
    marks = re.findall(r"<th scope=\"row\">([^<]*)<span class=\"loss\">([^<]*)<", text)
    assert [(mode.strip(), word) for mode, word in marks] == [
        ("DAM static", "worse"),
        ("DAM static", "worse"),
        ("DAM static", "worse"),
        ("DAM auto", "slower"),
    ]


def test_page_without_results_has_no_empty_tables(plan):
    page = Page(build_page(plan))
    assert not {"quality", "speed"} & {a.get("id") for a in page.all("section")}
    assert len(page.all("table")) == 3  # grid, chosen head, all heads


def test_figures_of_a_head_are_those_of_the_plan(plan):
    view = head_views(plan)[5]
    layer = plan.layers[1]
    assert (view.layer, view.head) == (1, 1)
    assert view.columns == len(layer.columns[1])
    assert view.offsets == len(layer.offsets[1])
    assert view.gated == bool(layer.gate[1])
    assert view.density == pytest.approx(float(plan.density(200, "static")[1, 1]))
    assert view.density_long == pytest.approx(float(plan.density(LONG_LENGTH, "static")[1, 1]))


def test_the_data_block_holds_the_figures_of_both_plans(plan, make_plan):
    other = make_plan(seed=1)
    data = data_of(build_page(plan, compare=other))
    assert (data["layers"], data["heads"]) == ([0, 1, 2], 4)
    for shown, each in zip(data["plans"], (plan, other), strict=True):
        views = head_views(each)
        assert shown["values"][0] == pytest.approx([v.coverage for v in views], abs=1e-5)
        assert shown["values"][6] == pytest.approx([v.density_long for v in views], abs=1e-5)
        assert shown["gated"] == [v.gated for v in views]


def test_compared_heads_stand_in_one_row(plan, make_plan):
    other = make_plan(seed=1)
    page = build_page(plan, compare=other, names=("mine", "yours"))
    row = re.search(r'<tr id="row-1-2">(.*?)</tr>', page).group(1)
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
    a, b = (float(each.layers[1].coverage[2]) for each in (plan, other))
    gates = ["gated" if bool(each.layers[1].gate[2]) else "static" for each in (plan, other)]
    assert cells[:2] == [f"{100 * a:.1f}", f"{100 * b:.1f}"]
    assert cells[2] == f"{100 * (b - a):+.1f}".replace("-", "−")
    assert cells[-1] == " → ".join(dict.fromkeys(gates))
    assert "A: mine" in page
    assert "B: yours" in page
    assert page.count("They were") == 0
    moved = dataclasses.replace(other, data={**other.data, "tokens": 99})
    assert "different windows of text" in build_page(plan, compare=moved)
    assert page.count("<img ") == 6


def test_plans_of_other_shapes_are_not_compared(plan):
    short = dataclasses.replace(plan, layers={0: plan.layers[0], 2: plan.layers[2]})
    with pytest.raises(ValueError, match="compare has 2 layers of 4 heads, the plan 3 layers"):
        build_page(plan, compare=short)
    moved = dataclasses.replace(plan, layers={i + 1: p for i, p in plan.layers.items()})
    with pytest.raises(ValueError, match=r"compare has the layers \[1, 2, 3\]"):
        build_page(plan, compare=moved)


def noise_plan(layers, heads, length):
    """A plan whose pictures compress as badly as any."""
    random = torch.Generator().manual_seed(0)

    def positions():
        seen = torch.rand(length, generator=random) < 0.4
        return seen.index_fill(0, torch.tensor([0]), True).nonzero().flatten()

    def layer():
        corner = torch.rand(heads, length, length, generator=random) < 0.5
        coverage = torch.rand(heads, generator=random)
        maps = 10 ** (-4 * torch.rand(2, heads, length, length, generator=random))
        return LayerPlan(
            columns=[positions() for _ in range(heads)],
            offsets=[positions() for _ in range(heads)],
            corner=(corner | torch.eye(length, dtype=torch.bool)).tril(),
            coverage=coverage,
            tail_coverage=coverage,
            corner_coverage=coverage,
            gate=coverage < 0.5,
            previews=maps.half(),
        )

    return MaskPlan(
        fingerprint={"architecture": "Noise"},
        settings=Settings(capture_length=length),
        data=describe_data([[1, 2, 3], [4, 5]], holdout=1),
        layers={index: layer() for index in range(layers)},
    )


def test_page_of_a_thousand_heads_keeps_to_its_budget():
    plan = noise_plan(32, 32, 64)
    assert picture_side(1024, 64) == 64  # as many pixels as any page may have
    for compare in (None, plan):
        size = len(build_page(plan, compare=compare).encode())
        assert 2 * 2**20 < size < 8 * 2**20


@pytest.mark.parametrize("heads", [1, 36, 255, 257, 1000, 1024, 2048, 16384, 10**6])
@pytest.mark.parametrize("length", [2, 100, 1024])
def test_pictures_shrink_with_the_number_of_heads(heads, length):
    side = picture_side(heads, length)
    assert 1 <= side <= min(128, length)
    assert heads * side**2 <= MOST_PIXELS or side <= 16
    assert side == min(128, length) or heads * (side + 1) ** 2 > MOST_PIXELS or side == 16


@pytest.mark.parametrize(("length", "side"), [(2, 1), (63, 63), (200, 128), (257, 45)])
def test_shares_are_those_of_the_dense_masks(length, side):
    """Against the mask's definition, pair by pair, and means over its cells."""
    random = torch.Generator().manual_seed(length)
    columns = (torch.rand(length, generator=random) < 0.2).nonzero().flatten().numpy()
    offsets = (torch.rand(length, generator=random) < 0.1).nonzero().flatten().numpy()
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    mask = (j <= i) & (np.isin(j, columns) | np.isin(i - j, offsets))
    expected = np.zeros((side, side))
    ends = [cell * length // side for cell in range(side + 1)]
    for row, column in itertools.product(range(side), repeat=2):
        cell = np.s_[ends[row] : ends[row + 1], ends[column] : ends[column + 1]]
        causal = (j <= i)[cell].sum()
        expected[row, column] = mask[cell].sum() / causal if causal else 0
    assert np.allclose(mask_share(mask[None], side)[0], expected)
    assert np.allclose(stripe_share(columns, offsets, length, side), expected)


def test_stripes_are_extended_beyond_the_capture_length():
    far = stripe_share(np.array([3]), np.array([0, 2]), 64, 64)
    i, j = np.arange(64)[:, None], np.arange(64)[None]
    assert np.array_equal(far > 0, (j <= i) & ((j == 3) | (i - j == 0) | (i - j == 2)))


@pytest.mark.parametrize("length", [1, 63, 128, 129, 1000])
def test_a_line_of_one_token_is_seen(length):
    mask = np.zeros((1, length, length), bool)
    mask[:, length // 3 :, length // 3] = True
    side = min(length, 128)
    levels = mask_levels(mask_share(mask, side))[0]
    hidden = mask_levels(np.zeros(1))[0]
    assert (levels > hidden).any(0).sum() == 1
    assert (levels > hidden).any(1).sum() >= side - side // 3 - 1


def test_future_is_transparent_and_nothing_else(plan):
    image = pixels(sheet(plan, 0, 65))
    for kind, head in itertools.product(range(4), range(4)):
        top, left = kind * 69, head * 69
        tile = image[top : top + 65, left : left + 65, 3]
        assert np.array_equal(tile == 0, np.triu(np.ones((65, 65), bool), 1))


def test_sheets_wrap_after_eight_heads():
    plan = noise_plan(1, 10, 20)
    image = pixels(sheet(plan, 0, 20))
    assert image.shape == (8 * 24 - 4, 8 * 24 - 4, 4)
    corner = plan.layers[0].corner[9].numpy()
    tile = image[5 * 24 : 5 * 24 + 20, 24:44, 3]  # the second kind of the second row's second head
    assert np.array_equal(tile == 255, corner)


def test_map_colours_rise_with_the_value():
    values = torch.zeros(1, 64, 64)
    values[0, :, 0] = torch.logspace(-4, 0, 64)
    levels = map_levels(values.numpy())[0, :, 0].astype(int)
    assert (np.diff(levels) >= 0).all()
    assert (levels[0], levels[-1]) == (1, 63)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_map_is_drawn(value):
    assert set(np.unique(map_levels(np.full((1, 3, 3), value)))) <= {1, 63}
