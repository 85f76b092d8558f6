"""The page in headless Chromium (Debian package ``chromium``)."""

import os
import re
import shutil
import subprocess

import pytest
from PIL import Image

from dynmask.report import build_page

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


@pytest.fixture(scope="module")
def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    message = "headless Chromium is missing: apt-get install -y chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def open_page(browser, tmp_path):
    def run(text, *flags):
        page = tmp_path / "page.html"
        page.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, re.findall(r":CONSOLE.*", done.stderr)

    return run


def test_pictures_load_and_the_console_is_silent(open_page, plan, results):
    dom, console = open_page(build_page(plan, results), "--dump-dom")
    assert console == []
    root = re.search(r"<html[^>]*>", dom).group()
    assert 'data-pictures="48"' in root
    assert 'data-broken-pictures="0"' in root
    assert len(re.findall(r'<section class="head current"', dom)) == 1
    assert 'id="choose-head"' in dom
    assert '<form class="controls">' in dom  # the script has shown the controls


def test_the_check_sees_a_broken_picture_and_an_error(open_page, plan):
    text = build_page(plan)
    broken = re.sub(r"base64,\w{40}", "base64,AAAA", text, count=1)
    broken = broken.replace("</main>", "</main><script>absent();</script>")
    dom, console = open_page(broken, "--dump-dom")
    assert 'data-broken-pictures="1"' in dom
    assert any("absent" in line for line in console)


@pytest.mark.parametrize("width", [1200, 400])
def test_page_fits_the_width_and_shows_colour(open_page, tmp_path, plan, results, width):
    # A headless window cannot be narrower than 500 pixels, so the page stands in a frame.
    page = tmp_path / "inner.html"
    page.write_text(build_page(plan, results), encoding="utf-8")
    frame = (
        f'<body style="margin:0"><iframe src="inner.html" width="{width}" height="3600" '
        'style="border:0" onload="document.title = [this.contentDocument.documentElement'
        '.scrollWidth, this.clientWidth]"></iframe></body>'
    )
    shot = tmp_path / "page.png"
    flags = ["--allow-file-access-from-files", "--window-size=1300,3600"]
    dom, console = open_page(frame, "--dump-dom", *flags)
    assert console == []
    needed, there = re.search(r"<title>(\d+),(\d+)</title>", dom).groups()
    assert int(needed) <= int(there) == width
    open_page(frame, f"--screenshot={shot}", *flags)
    colours = Image.open(shot).convert("RGB").crop((0, 0, width, 3600)).getcolors(2**24)
    assert (47, 111, 208) in {colour for _, colour in colours}  # a mask's visible pairs
