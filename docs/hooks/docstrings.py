"""What griffe does not know of our code: formulas, comments, and dataclasses by inheritance."""

from __future__ import annotations

import re
from typing import Any

import griffe

_BLOCK = re.compile(r"^\.\. math:: (.+)$", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
#: griffe would take what is indented under such a line for a box of that title.
_SOURCE = re.compile(r"^(Sources?: .+(?:\n    .+)+)", re.MULTILINE)


_TABLE = re.compile(r"^(=+(?: +=+)+)\n(.+)\n\1\n((?:.+\n)+?)\1$", re.MULTILINE)


def markdown_of(text: str) -> str:
    """Turn formulas, simple tables and indented sources into what Markdown has for them."""
    text = _INLINE.sub(r"$\1$", _BLOCK.sub(r"$$\n\1\n$$", text))
    text = _TABLE.sub(_table, text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _SOURCE.sub(lambda found: re.sub(r"\n +", " ", found[1]), text)


def _table(found: re.Match[str]) -> str:
    border, head, body = found.groups()
    starts = [column.start() for column in re.finditer("=+", border)]
    cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    rows = [[line[cut].strip() for cut in cuts] for line in [head, *body.splitlines()]]
    rows.insert(1, ["---"] * len(cuts))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Markdown(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)


class Comments(griffe.Extension):
    """Takes ``#:`` comments above a name of a module for its docstring."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Read the comment, if there is no docstring."""
        if attr.docstring or attr.lineno is None or not attr.parent.is_module:
            return
        above = attr.filepath.read_text(encoding="utf-8").splitlines()[: attr.lineno - 1]
        found = []
        while above and above[-1].startswith("#:"):
            found.insert(0, above.pop().removeprefix("#:").strip())
        if found:
            attr.docstring = griffe.Docstring(" ".join(found), parent=attr)


class Configurations(griffe.Extension):
    """Gives configurations their arguments: transformers makes dataclasses of its subclasses."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add ``__init__`` to a subclass of transformers' ``PreTrainedConfig``."""
        if not any(str(base).endswith("PreTrainedConfig") for base in cls.bases):
            return
        keyword = griffe.ParameterKind.keyword_only
        fields = [
            griffe.Parameter(name, annotation=m.annotation, kind=keyword, default=m.value)
            for name, m in cls.members.items()
            if isinstance(m, griffe.Attribute) and m.annotation is not None
        ]
        init = griffe.Function("__init__", parameters=griffe.Parameters(*fields))
        cls.set_member("__init__", init)
