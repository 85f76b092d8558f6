"""The arguments of the drivers in benchmarks/trained, as their command line would give them."""

import argparse
import math


def arguments(folder, **changes):
    given = {
        "out": folder / "cells.jsonl",
        "runs": folder / "runs",
        "data": None,
        "budget_seconds": math.inf,
        "only": [],
        "set": [],
        "commit": None,
    }
    return argparse.Namespace(**given | changes)
