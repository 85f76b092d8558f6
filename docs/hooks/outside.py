"""Files that live outside docs/ and belong to the site, and links that lead to them.

The changelog, the log and others become pages, raw results and examples plain files. A page's links
are written for the checkout; those that leave docs/ are led to the copy in the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: File of the checkout -> place in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "LOG.md": "project/log.md",
    "DESIGN.md": "project/design.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "results/repeat.md",
}
#: Copied as they are, to files/.
PLAIN = ("benchmarks/results/*.json", "examples/*.py")
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def place_of(source: str) -> str | None:
    """Return where a file of the checkout stands in the site, or None."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if source in PAGES:
        return PAGES[source]
    plain = any(Path(source).match(pattern) for pattern in PLAIN)
    return f"files/{source}" if plain and (ROOT / source).is_file() else None


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the plain files."""
    for source, place in PAGES.items():
        if place != "index.md":  # The site has a first page of its own.
            content = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, place, content=content))
    for pattern in PLAIN:
        for path in sorted(ROOT.glob(pattern)):
            place = f"files/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=os.fspath(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave docs/ to the copies in the site."""
    place = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == place and s != "README.md"), f"docs/{place}")

    def led(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        to = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if source.startswith("docs/") and to.startswith("docs/"):
            return found[0]
        there = place_of(to)
        if there is None:
            return found[0]  # mkdocs warns, and a strict build fails.
        return f"{before}{posixpath.relpath(there, posixpath.dirname(place) or '.')}{after}"

    return _LINK.sub(led, markdown)
