"""The page in headless Chromium, by keyboard, pointer and finger.

One browser serves all tests; each opens its page anew.
"""

import re

import pytest

from dynmask.report import build_page

pytestmark = pytest.mark.browser

HEADS = 4  # of each layer, as in conftest.py
CHOSEN = "document.getElementById('chosen').textContent"
# The smallest contrast of a visible text with what lies behind it, as WCAG counts it.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest("script")) continue;
    const style = getComputedStyle(element), behind = [];
    for (let e = element; e; e = e.parentElement) {
      behind.unshift(getComputedStyle(e).backgroundColor);
    }
    const text = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [luminance(paint(behind)), luminance(paint([...behind, text]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.data.trim()];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def plans(make_plan):
    return make_plan(), make_plan(seed=1)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, plans, results):
    folder = tmp_path_factory.mktemp("pages")
    plan, other = plans
    texts = {"one": build_page(plan, results), "two": build_page(plan, results, compare=other)}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture
def visit(browser, pages):
    """Opens a page; whatever the test does then, nothing is loaded and the console is silent."""

    def visit_page(name, *, hash="", **how):
        browser.open(pages[name] + hash, **how)
        return browser

    yield visit_page
    assert browser.console == []
    asked = {url.partition("#")[0] for url in browser.requests if not url.startswith("data:")}
    assert asked <= set(pages.values())


def cell(layer, head):
    return f".grid tbody tr:nth-child({layer + 1}) td:nth-child({head + 2}) button"


def drawn(browser, index, plan=0):
    """Wait until a head is drawn; its four canvases as lists of RGBA."""
    browser.until(f"document.querySelectorAll('.plan')[{plan}].dataset.drawn === '{index}'")
    return browser.run(
        f"[...document.querySelectorAll('.plan')[{plan}].querySelectorAll('canvas')].map((c) => {{"
        " const copy = new OffscreenCanvas(c.width, c.height).getContext('2d');"
        " copy.drawImage(c, 0, 0);"
        " return [...copy.getImageData(0, 0, c.width, c.height).data]; })"
    )


def column(browser, body, number):
    """Texts of a column in the rows of a table's body."""
    return browser.run(
        f"[...document.querySelectorAll('{body} tr')].map((r) => r.cells[{number}]?.textContent)"
    )


def test_the_check_sees_an_error_and_a_request(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>absent()</script><img src='other.png'>")
    browser.open(page.as_uri())
    assert any("absent" in str(line) for line in browser.console)
    assert any(url.endswith("other.png") for url in browser.requests)


def test_a_head_is_picked_by_keyboard(visit, plans):
    browser = visit("one")
    assert browser.run(CHOSEN) == "Layer 0, head 0"
    browser.run("document.querySelector('.controls button:last-of-type').focus()")
    browser.press("Tab", "Tab", "Tab")  # the list of colours, the grid's region, its one tab stop
    assert browser.run("document.activeElement.matches('.cell')")
    places = []
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowUp", "Home"):
        browser.press(key)
        places.append(browser.run(CHOSEN)[6:].replace(", head ", "."))
    assert places == ["1.0", "1.1", "1.2", "1.3", "1.3", "0.3", "0.0"]
    browser.press("End", ctrl=True)
    assert browser.run(CHOSEN) == "Layer 2, head 3"
    assert browser.run("location.hash") == "#layer-2-head-3"
    assert browser.run("document.querySelectorAll('.cell[tabindex=\"0\"]').length") == 1
    assert browser.run("document.activeElement.parentNode.getAttribute('aria-selected')") == "true"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    coverage = float(plans[0].layers[2].coverage[3])
    assert f"{coverage:.2%}".replace("%", " %") in browser.run(
        "document.querySelector('.why').textContent"
    )


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_a_head_is_picked_by_pointer(visit, touch):
    browser = visit("one")
    before = drawn(browser, 0)
    browser.click(cell(2, 1), touch=touch)
    browser.until(f"{CHOSEN} === 'Layer 2, head 1'")
    after = drawn(browser, 2 * HEADS + 1)
    assert all(any(picture) for picture in after)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_pictures_are_cut_where_the_sheet_has_them(visit, plans):
    """The true mask's full and empty cells, counted anew, are the canvas's blue and grey ones."""
    browser = visit("one", hash="#layer-1-head-2")
    _, mask, _, _ = drawn(browser, HEADS + 2)
    corner = plans[0].layers[1].corner[2]
    side, length = 128, corner.shape[0]
    edges = [i * length // side for i in range(side + 1)]
    alphas = mask[3::4]
    for i in range(0, side, 7):
        for j in range(0, i, 5):
            pairs = corner[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
            assert (alphas[i * side + j] == 255) == bool(pairs.all()), (i, j)
            assert (alphas[i * side + j] == 46) == (not pairs.any()), (i, j)
        assert not any(alphas[i * side + i + 1 : (i + 1) * side])


def test_lists_buttons_and_links_pick_too(visit):
    browser = visit("one")
    browser.click("#next")
    browser.click("#next")
    browser.click("#previous")
    assert browser.run(CHOSEN) == "Layer 0, head 1"
    browser.run("document.getElementById('choose-layer').focus()")
    browser.press("ArrowDown")
    assert browser.run(CHOSEN) == "Layer 1, head 1"
    browser.click("#row-2-3 a")
    assert browser.run(CHOSEN) == "Layer 2, head 3"
    assert browser.run("document.activeElement.id") == "chosen"


def test_the_grid_is_coloured_by_another_figure(visit, plans):
    browser = visit("one")
    browser.run("document.getElementById('choose-figure').focus()")
    browser.press("ArrowDown")
    tail = plans[0].layers[1].tail_coverage
    shown = browser.run("[...document.querySelectorAll('.cell')].map((c) => c.textContent)")
    assert shown[HEADS : 2 * HEADS] == [f"{100 * v:.0f}" for v in tail.tolist()]


def test_two_plans_stand_side_by_side(visit, plans):
    browser = visit("two", hash="#layer-2-head-1")
    first, second = plans[0].layers[2], plans[1].layers[2]
    a, b = (float(layer.coverage[1]) for layer in (first, second))
    row = [column(browser, ".numbers tbody", number)[0] for number in (1, 2, 3)]
    assert row == [f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (b - a):+.1f}".replace("-", "−")]
    assert drawn(browser, 2 * HEADS + 1, 0)[1] != drawn(browser, 2 * HEADS + 1, 1)[1]
    tops = browser.run(
        "[...document.querySelectorAll('.plan')].map((p) => p.getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]
    browser.run("document.getElementById('choose-figure').focus()")
    browser.press("End")
    browser.press(*["ArrowUp"] * 3)
    assert browser.run("document.getElementById('choose-figure').value") == "change:0"
    framed = browser.run("document.querySelectorAll('.cell.gated').length")
    changed = sum(
        int((x.gate != y.gate).sum())
        for x, y in zip(plans[0].layers.values(), plans[1].layers.values(), strict=True)
    )
    assert framed == changed > 0


def test_tables_sort_by_keyboard_and_mouse(visit):
    browser = visit("two")
    table = "#figures table"
    browser.run(f"document.querySelectorAll('{table} thead button')[3].focus()")
    for key, order in (("Enter", "ascending"), (" ", "descending")):
        browser.press(key)
        assert browser.run(
            f"[...document.querySelectorAll('{table} [aria-sort]')].map((h) =>"
            " [h.cellIndex, h.getAttribute('aria-sort')])"
        ) == [[3, order]]
        values = [float(v.replace("−", "-")) for v in column(browser, f"{table} tbody", 3)]
        assert len(set(values)) > 5
        assert values == sorted(values, reverse=order == "descending")
    browser.click(f"{table} thead th:first-child button")
    assert column(browser, f"{table} tbody", 0) == [
        f"{x}, {y}" for x in range(3) for y in range(HEADS)
    ]
    browser.click(f"{table} thead th:last-child button")
    browser.click(f"{table} thead th:last-child button")
    assert "→" in column(browser, f"{table} tbody", 7)[0]


def test_sorting_keeps_groups_and_puts_missing_values_last(visit):
    browser = visit("one")
    browser.click("#quality thead th:nth-child(3) button")
    rows = browser.run(
        "[...document.querySelectorAll('#quality tbody')].map((b) =>"
        " [...b.rows].map((r) => r.cells[0].firstChild.textContent.trim()))"
    )
    assert [names[0] for names in rows] == [
        "LongEval, 200 lines",
        "Needles, 8192 tokens",
        "Perplexity, 8192 tokens",
    ]
    assert rows[0][1:] == ["DAM static", "DAM auto", "full attention"]
    assert rows[2][1:] == ["full attention", "DAM static"]
    browser.click("#quality thead th:nth-child(3) button")
    assert column(browser, "#quality tbody:last-of-type", 0)[-1].startswith("DAM static")


def test_colours_follow_the_system_until_the_button_says_otherwise(visit, pages):
    page_colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(253, 253, 252)", "rgb(20, 23, 26)"
    browser = visit("one", dark=True)
    browser.run("sessionStorage.clear()")
    assert browser.run(page_colour) == dark
    browser = visit("one")
    assert browser.run(page_colour) == light
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    assert browser.run(pressed) == "false"
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter")
    assert (browser.run(page_colour), browser.run(pressed)) == (dark, "true")
    # What one process of the browser stores may come too late for the next page's process.
    for _ in range(20):
        browser.reload(pages["two"])
        browser.reload(pages["one"])
        if browser.run(page_colour) == dark:
            break
    assert (browser.run(page_colour), browser.run(pressed)) == (dark, "true")
    browser.click("#theme")
    assert (browser.run(page_colour), browser.run(pressed)) == (light, "false")
    browser.run("sessionStorage.clear()")


def test_the_button_works_where_storage_is_forbidden(visit, browser):
    forbid = "throw new DOMException('denied', 'SecurityError')"
    source = f"Object.defineProperty(window, 'sessionStorage', {{ get() {{ {forbid} }} }})"
    added = browser.send("Page.addScriptToEvaluateOnNewDocument", source=source)
    visit("one")
    browser.click("#theme")
    assert browser.run("getComputedStyle(document.body).colorScheme") == "dark"
    assert browser.run(CHOSEN) == "Layer 0, head 0"
    browser.send("Page.removeScriptToEvaluateOnNewDocument", **added)


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("width", [1280, 400, 320])
def test_page_fits_the_width(visit, name, width):
    browser = visit(name, width=width)
    browser.run("document.getElementById('sheets').open = true")
    assert browser.run("document.documentElement.scrollWidth") <= width
    # What is wider scrolls by itself, and can be reached by keyboard.
    assert browser.run(
        "[...document.querySelectorAll('table')].every((t) => t.closest('.scroll').tabIndex === 0)"
    )


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(visit, name, dark):
    browser = visit(name, dark=dark)
    ratio, text = browser.run(CONTRAST)
    assert ratio >= 4.5, text


def test_controls_have_names_and_room(visit):
    browser = visit("two", width=400)
    small = browser.run(
        "[...document.querySelectorAll('button, select, summary')].filter((e) => {"
        " const box = e.getBoundingClientRect();"
        " return e.checkVisibility() && (box.width < 24 || box.height < 24);"
        "}).map((e) => e.outerHTML)"
    )
    assert small == []
    nameless = browser.run(
        "[...document.querySelectorAll('button, select, canvas, img')].filter((e) =>"
        " !(e.ariaLabel || e.alt || e.labels?.length || e.textContent.trim()))"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []


def test_without_scripts_tables_and_pictures_are_there(visit, browser):
    browser = visit("two", scripts=False)
    hidden = browser.run(
        "['.controls', '#panel', '#theme', '.scripted'].filter((s) =>"
        " document.querySelector(s).checkVisibility())"
    )
    assert hidden == []
    assert browser.run(
        "[...document.images].every((i) => i.checkVisibility() && i.naturalWidth > 99)"
    )
    assert browser.run("document.images.length") == 2 * 3
    assert browser.run(
        "[...document.querySelectorAll('a[href^=\"#\"]')].every((a) =>"
        " document.getElementById(a.hash.slice(1)))"
    )
    assert re.search(r"\d", browser.run("document.querySelector('#figures td').textContent"))
