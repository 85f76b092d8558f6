"""The tables of docs/results/dma.md and the README say what the kept JSON says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/results/dma.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cells(name):
    path = ROOT / "benchmarks/results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("cell", cells("train_speed"), ids=lambda c: f"{c['size']}-{c['length']}")
def test_training_speed(cell):
    speed = [f"{cell['tokens_per_second'][name]:,.0f}" for name in ("dma", "cudnn", "flash")]
    low, middle, high = (f"{cell['ratio'][part]:.2f}" for part in ("low", "median", "high"))
    row = f"| {cell['size']} | {cell['length']:,} | {' | '.join(speed)} | {middle}x [{low}, {high}]"
    assert row in PAGE


@pytest.mark.parametrize("cell", cells("dma_prefill"), ids=lambda c: f"{c['model']}-{c['length']}")
def test_long_prompts(cell):
    length = "1M" if cell["length"] == 1 << 20 else f"{cell['length'] >> 10}K"
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {length} |")]
    values = [value.strip() for value in row.strip("|").split("|")]
    column = {"dma": 1, "dense cudnn": 2, "dense flash": 3}[cell["model"]]
    dense = int(column > 1)
    assert values[column] == f"{cell['prefill']['median']:.3f}"
    assert values[4 + dense] == f"{cell['peak_bytes'] / 2**30:.2f}"
    assert values[6 + dense] == f"{cell['cache_bytes'] / 2**20:,.0f}"


@pytest.mark.parametrize("cell", cells("stripes_gpu_backward"), ids=lambda c: f"{c['kind']}")
def test_backward_of_stripes_and_blocks(cell):
    rows = PAGE[PAGE.index("## Gradients under") :].splitlines()
    (row,) = [line for line in rows if line.startswith(f"| {cell['length']:,} |")]
    values = row.strip("|").split("|")
    kinds = ["dam", "columns", "streaming", "blocks"]
    assert values[1 + kinds.index(cell["kind"])].split()[0] == f"{cell['ratio']:.2f}x"


def test_recall_in_the_readme():
    found = {}
    for name in ("lines_200", "lines_360", "ruler", "minference"):
        path = ROOT / "benchmarks/results" / f"recall_{name}.json"
        (row,) = json.loads(path.read_text(encoding="utf-8"))["quality"]
        assert row["mode"] == "dynamic"
        found[name] = round(row["score"] * row["n"]), row["n"], row["density"]
    right, asked, density = found["lines_200"]
    assert f"{right} of {asked} lines at 4.9K tokens (density {density:.2f})" in README
    right, asked, density = found["lines_360"]
    assert f"{right} of {asked} at 8.1K ({density:.2f})" in README
    right, asked, _ = (sum(pair) for pair in zip(found["ruler"], found["minference"], strict=True))
    assert f"{right} of {asked} needles at 8K" in README
