"""Files of results: what is in them, and reading them back.

One JSON object a benchmark: ``format`` and ``version``; ``benchmark``; ``complete``, false while
lengths are missing; ``date``, ``device``, ``versions``, ``commit``; ``impl``, the backend;
``settings``; ``ceilings``, the device's own rates in the same run; ``cells``. A cell has
``length``, ``score``, ``status``, ``"ok"`` with ``times`` or ``"error"`` with ``error``, and the
``clocks`` right after it was timed. Times are in seconds: median, quartiles (``low``, ``high``) and
the number of rounds. A ratio is one of medians, with the widest range that the quartiles allow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = "dynmask-bench"
VERSION = 1

_KEYS = (
    "benchmark",
    "complete",
    "date",
    "device",
    "versions",
    "commit",
    "impl",
    "settings",
    "ceilings",
    "cells",
)


def load(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Raises:
        ValueError: If it is missing, damaged, or of another kind; the message names the file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: not written by 'dynmask bench --out'")
    if document.get("version") != VERSION:
        raise ValueError(f"{path}: version {document.get('version')}, this dynmask reads {VERSION}")
    missing = [key for key in _KEYS if key not in document]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    return document


def failures(document: Mapping[str, Any]) -> list[str]:
    """Return one line for each cell that has an error."""
    return [
        f"{name_of(cell)}: {cell['error']}" for cell in document["cells"] if cell["status"] != "ok"
    ]


def name_of(cell: Mapping[str, Any]) -> str:
    """Name a cell in words."""
    words = [f"{cell['length']:,} tokens"]
    words += [str(cell[key]) for key in ("call", "cache", "score") if cell.get(key)]
    return " ".join(words)


def good(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells that were timed."""
    return [cell for cell in document["cells"] if cell["status"] == "ok"]


def break_even(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Return the length at which a ratio, linear between cells in log-log, first stays above 1.

    Args:
        lengths: Ascending.
        ratios: Baseline's time over ours, one a length.

    Returns:
        The length; the first one if every cell wins, None if the last one loses.
    """
    if not ratios or ratios[-1] < 1:
        return None
    last_losing = max((i for i, ratio in enumerate(ratios) if ratio < 1), default=None)
    if last_losing is None:
        return float(lengths[0])
    low, high = lengths[last_losing], lengths[last_losing + 1]
    below, above = math.log(ratios[last_losing]), math.log(ratios[last_losing + 1])
    share = -below / (above - below)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
