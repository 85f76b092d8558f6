"""docs/guide/troubleshooting.md quotes messages that the package has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import dynmask

ROOT = Path(__file__).parents[2]


def messages():
    """Patterns of all longer texts in the package: an f-string's values may be anything."""
    for path in Path(dynmask.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    re.escape(str(v.value)) if isinstance(v, ast.Constant) else ".*?"
                    for v in node.values
                ]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.escape(node.value)


def test_troubleshooting_quotes_real_messages():
    text = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```text\n(.*?)\n```", text)
    patterns = [re.compile(p) for p in messages() if len(p.replace(".*?", "")) > 25]
    assert len(quoted) > 30
    unknown = [q for q in quoted if not any(p.search(q) for p in patterns)]
    assert unknown == []
