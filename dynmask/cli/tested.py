"""The versions that the tests have run with, and how an installed one compares with them."""

from __future__ import annotations

import re

TESTED = {
    "python": ("3.11", "3.12"),
    "torch": ("2.6", "2.15"),
    "triton": ("3.4", "3.9"),
    "transformers": ("5.16", "5.23"),
}
"""Oldest and newest; the table in docs/guide/install.md says what was run with which."""


def remark(name: str, version: str) -> str | None:
    """Say how a version lies outside what was tested.

    Args:
        name: Of the package, or ``"python"``.
        version: As it says itself: ``"2.13.0+cpu"``.

    Returns:
        For example ``"newer than 2.15, the newest tested"``; None if it lies within, or if the
        package is one of those whose version has not mattered.
    """
    if name not in TESTED:
        return None
    oldest, newest = TESTED[name]
    if _minor(version) < _minor(oldest):
        return f"older than {oldest}, the oldest tested"
    if _minor(version) > _minor(newest):
        return f"newer than {newest}, the newest tested"
    return None


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
