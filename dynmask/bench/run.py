"""Run one benchmark cell by cell, so that an error costs one cell and an interruption none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dynmask.bench import backward, decode, op, selection, table2
from dynmask.bench.engine import Engine, engine_for
from dynmask.bench.environment import ceilings, clocks, environment
from dynmask.bench.inputs import Settings
from dynmask.bench.results import FORMAT, VERSION
from dynmask.bench.timing import Clock

Cells = Callable[[Settings, Engine, Clock, int], list[dict[str, Any]]]
_CELLS: dict[str, Cells] = {
    "op": op.cells,
    "select": selection.cells,
    "decode": decode.cells,
    "backward": backward.cells,
    "table2": table2.cells,
}


def run_benchmark(
    settings: Settings,
    *,
    engine: Engine | None = None,
    on_cells: Callable[[dict[str, Any], list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """Measure every length, shortest first.

    Args:
        settings: What to run.
        engine: What to measure; default the backend that the settings name.
        on_cells: Called after each length with the document so far and its new cells.

    Returns:
        The document; see `dynmask.bench.results`. A cell with a wrong result, or whose
        computation broke, has ``status`` ``"error"`` and no times.

    Raises:
        ValueError: If there is no such backend, or no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA device; use cpu")
    engine = engine or engine_for(settings)
    clock = Clock(torch.device(settings.device))
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "benchmark": settings.benchmark,
        "complete": False,
        **environment(settings.device),
        "impl": engine.impl,
        "settings": settings.to_dict(),
        "cells": [],
    }
    with torch.no_grad():
        document["ceilings"] = ceilings(clock)
        for length in sorted(settings.lengths):
            cells = _of_length(settings, engine, clock, length)
            document["cells"] += cells
            document["complete"] = length == max(settings.lengths)
            if on_cells:
                on_cells(document, cells)
    return document


def _of_length(
    settings: Settings, engine: Engine, clock: Clock, length: int
) -> list[dict[str, Any]]:
    try:
        cells = _CELLS[settings.benchmark](settings, engine, clock, length)
    except Exception as error:  # a kernel can fail to compile, to launch or to find memory
        cells = [
            {
                "length": length,
                "score": None,
                "status": "error",
                "error": f"{type(error).__name__}: {error}",
            }
        ]
    now = clocks(settings.device)
    clock.release()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    for cell in cells:
        cell["clocks"] = now
    return cells
