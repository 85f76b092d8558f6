"""The kept results and the texts that quote them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def text(path):
    """A page as one line."""
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def document(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cells(name):
    return document(name)["cells"]


def lines(name):
    """The rows of a JSON Lines file."""
    found = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in found]
