"""The built site: strict, a page for each public name and command, nothing from elsewhere."""

from __future__ import annotations

import html
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_public_api import PUBLIC

pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
pytest.importorskip("mkdocstrings", reason="the extra 'docs' is not installed")

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / "docs" / "hooks"


class Page(HTMLParser):
    """What a page asks a browser to load, where its links lead, and what can be led to."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href", ""))
        elif given.get("src"):
            self.loads.append(given["src"])


def test_make_builds_it_strictly():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^\t.*mkdocs build --strict$", text, re.MULTILINE)
    assert re.search(r"^check: .*\bdocs\b", text, re.MULTILINE)


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
        for path in site.rglob("*.html")
    }


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(HOOKS)


def test_each_public_name_has_a_page(pages):
    for module, names in PUBLIC.items():
        package = module.partition(".")[2]
        for name in names.split():
            top = name in PUBLIC["dynmask"].split()
            place = f"reference/{'' if top else package + '/'}{name}.html"
            assert place in pages
            assert re.search(rf'<h1 id="dynmask\.[\w.]*\.{name}"', pages[place]), place
            assert "doc-object doc-module" not in pages[place], "a module of the same name"
            assert f"from {module if not top else 'dynmask'} import {name}<" in pages[place]


def test_each_command_has_a_page_with_all_its_options(pages, hooks):
    from commands import COMMANDS, parsers_of

    for command in COMMANDS:
        text = html.unescape(re.sub("<[^>]*>", "", pages[f"reference/commands/{command}.html"]))
        for words, parser in parsers_of(command).items():
            assert words in text
            for action in parser._actions:
                for option in {*action.option_strings} - {"-h", "--help"}:
                    assert option in text, (words, option)


def test_nothing_comes_from_elsewhere(site, pages):
    for place, text in pages.items():
        for target in Page(text).loads:
            assert "//" not in target, (place, target)
    for path in site.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style), path


def test_links_lead_to_what_is_there(site, pages):
    parsed = {place: Page(text) for place, text in pages.items()}
    for place, page in parsed.items():
        if place == "404.html":  # Its links are those of the site's root.
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            there = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
            there = place if path == "" else there
            assert (site / there).exists(), (place, link)
            if anchor and there in parsed:
                assert anchor in parsed[there].ids, (place, link)


def test_formulas_are_mathml(pages):
    assert pages["guide/method.html"].count("<math") > 40
    assert "<munder" in pages["reference/dam/Dynamic.html"]
    for place, text in pages.items():
        assert "arithmatex" not in text, place
        assert ":math:" not in text, place


def test_pictures_stand_in_the_pages(pages):
    assert 'data-mask="DMA, learned"' in pages["index.html"]
    assert 'id="dm-tile-title"' in pages["guide/method.html"]


def test_pages_from_elsewhere_in_the_checkout(site, pages):
    assert "First version." in pages["project/changelog.html"]
    kept = ROOT / "benchmarks" / "results" / "demo.json"
    assert (site / "files/benchmarks/results/demo.json").read_bytes() == kept.read_bytes()


def test_arguments_of_a_configuration_are_shown(pages):
    shown = html.unescape(re.sub("<[^>]*>", "", pages["reference/DmaConfig.html"]))
    assert "num_key_value_heads: int | None = None" in re.sub(r"\s+", " ", shown)


def test_docstrings_as_markdown(hooks):
    import docstrings

    text = "Source: one,\n    and two.\n\nElse"
    assert docstrings.markdown_of(text) == "Source: one, and two.\n\nElse"
    text = "Cost\n\n.. math:: r_J = 1\n\nwhere :math:`A_{i}` is"
    assert docstrings.markdown_of(text) == "Cost\n\n$$\nr_J = 1\n$$\n\nwhere $A_{i}$ is"
    text = "==== ====\na    b\n==== ====\none  two three\n     four\n==== ===="
    wanted = "| a | b |\n| --- | --- |\n| one | two three |\n|  | four |"
    assert docstrings.markdown_of(text) == wanted
