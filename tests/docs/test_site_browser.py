"""The built site in headless Chromium, as files: at two widths, in both colours, and its search."""

import pytest

pytestmark = pytest.mark.browser

PAGES = (
    "index",
    "guide/method",
    "guide/reliability",
    "results/index",
    "reference/attention",
    "reference/commands/eval",
)
# What is wider than the window and does not scroll in itself, as texts.
STICKING_OUT = """[...document.querySelectorAll("article *")].filter((e) =>
  e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest(".md-typeset__scrollwrap, pre, .formula")
).map((e) => e.tagName + " " + e.textContent.slice(0, 40))"""
SCHEME = "document.body.getAttribute('data-md-color-scheme')"


@pytest.fixture
def visit(browser, site):
    """Opens a page; whatever the test does then, nothing comes from elsewhere, without errors."""

    def visit_page(name, **how):
        browser.open((site / f"{name}.html").as_uri(), **how)
        return browser

    yield visit_page
    assert browser.console == []
    local = (site.as_uri(), "data:", "blob:", "about:")
    assert [url for url in browser.requests if not url.startswith(local)] == []


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_window(visit, name, width):
    page = visit(name, width=width)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(STICKING_OUT) == []


def test_code_of_the_first_page_is_whole(visit):
    page = visit("index", width=1280)
    cut = "[...document.querySelectorAll('pre code')].filter((e) => e.scrollWidth > e.clientWidth)"
    assert page.run("document.querySelectorAll('pre code').length") == 3
    assert page.run(f"{cut}.map((e) => e.textContent)") == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_follow_the_system(visit, dark):
    page = visit("guide/method", dark=not dark)
    assert page.run(SCHEME) == ("default" if dark else "slate")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.send("Emulation.setEmulatedMedia", features=[scheme])
    page.until(f"{SCHEME} === '{'slate' if dark else 'default'}'")


def test_search_finds_in_files(visit):
    page = visit("guide/op", width=1280)
    page.click("[data-md-component=search-query]")
    # What is typed before the index is there may be lost.
    page.until("document.querySelector('.md-search-result__meta').textContent.includes('Type')")
    page.send("Input.insertText", text="compute-sanitizer")
    page.press("End")  # The search listens to keys.
    page.until("!!document.querySelector('.md-search-result__link[href*=reliability]')")
