"""docs/guide/troubleshooting.md quotes messages that the package has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import dynmask

ROOT = Path(__file__).parents[2]


def messages():
    """All texts in the package, each as its fixed parts: an f-string's values may be anything."""
    for path in Path(dynmask.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield [str(v.value) for v in node.values if isinstance(v, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield [node.value]


def holds(text, parts):
    """Whether the parts stand in the text in their order."""
    at = 0
    for part in parts:
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def test_troubleshooting_quotes_real_messages():
    text = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```text\n(.*?)\n```", text)
    known = [parts for parts in messages() if sum(map(len, parts)) > 25]
    assert len(quoted) > 30
    unknown = [q for q in quoted if not any(holds(q, parts) for parts in known)]
    assert unknown == []
