"""Escaping and number formats shared by the page's parts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dynmask.report.results import MODES, QualityRow


def escape(value: object) -> str:
    """Return `value` as text that is safe in HTML, inside and outside of attributes."""
    return html.escape(str(value), quote=True)


def number(value: float, digits: int = 2) -> str:
    """Return a number with `digits` decimals, thousands set apart, or a dash."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def percent(value: float, digits: int = 1) -> str:
    """Return a share (0 to 1) in percent, without the sign."""
    return number(100 * value, digits)


def mode_name(mode: str) -> str:
    """Return the words for a mode; a mode that is not known is shown as it is."""
    return MODES.get(mode, mode)


def score_text(row: QualityRow) -> str:
    """Return the score with its unit."""
    return f"{percent(row.score)}\u00a0%" if row.metric == "accuracy" else number(row.score)


def interval_text(row: QualityRow) -> str:
    """Return the interval's two ends, or a dash if the task gives none."""
    if row.interval is None:
        return "–"
    form = percent if row.metric == "accuracy" else number
    return f"{form(row.interval[0])}–{form(row.interval[1])}"


def definitions(facts: Mapping[str, Any]) -> str:
    """Return a definition list; nested mappings are flattened with dots, lists joined."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in _flat(facts)
    )
    return f'<dl class="facts">{items}</dl>'


def scroll(label: str, content: str, *, tall: bool = False) -> str:
    """Wrap a wide table so that it scrolls by itself, by keyboard as well.

    Args:
        label: What the region holds, for those who hear the page.
        content: HTML.
        tall: Also limit its height.
    """
    return (
        f'<div class="scroll{" tall" if tall else ""}" role="region" tabindex="0" '
        f'aria-label="{escape(label)}">{content}</div>'
    )


def sort_key(value: float) -> str:
    """Return the attribute by which the script sorts a cell whose text is no plain number."""
    return f' data-value="{value:.6g}"' if math.isfinite(value) else ' data-value=""'


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        words = prefix + str(name).replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{words}: ")
        elif isinstance(value, list | tuple):
            yield words, ", ".join(str(item) for item in value if item is not None) or "none"
        elif value is not None:
            yield words, f"{value:g}" if isinstance(value, float) else str(value)
