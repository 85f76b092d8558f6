"""Put our SVG pictures into the page itself, so that they follow its light and dark colours."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
_IMAGE = re.compile(r'<img [^>]*src="([^"]+\.svg)"[^>]*>')
#: Stands in the root element of the pictures that docs/pictures.py draws.
MARK = "data-inline"


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Replace images by the SVG where the file says so."""

    def inlined(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.url), found[1]))
        path = DOCS / place
        if not path.is_file():
            return found[0]
        svg = path.read_text(encoding="utf-8")
        return svg if MARK in svg.partition(">")[0] else found[0]

    return _IMAGE.sub(inlined, content)
