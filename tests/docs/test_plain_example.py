"""examples/dma_op_in_plain_pytorch.py learns its task."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone():
    """One thread, and random numbers that others do not notice."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(before)


def test_plain_pytorch_example_learns(capsys):
    path = ROOT / "examples" / "dma_op_in_plain_pytorch.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--steps", "80"])
    lines = re.findall(
        r"(\w+): loss ([\d.]+) before, ([\d.]+) after 80 steps", capsys.readouterr().out
    )
    assert [kind for kind, _, _ in lines] == ["op", "layer"]
    for kind, before, after in lines:
        assert float(before) > 1.3, kind
        assert float(after) < 0.5, f"{kind}: with no gradient for the score it is 0.66"
