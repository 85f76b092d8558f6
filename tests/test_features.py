"""Older torch may lack what tests/features.py probes for; the pinned one and newer do not."""

import re
from pathlib import Path

import pytest
import torch
from features import lacks_compile, lacks_cpu_shards, lacks_flex, lacks_kernels

CONSTRAINTS = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
PINNED = re.search(r"^torch==(\S+)$", CONSTRAINTS, re.MULTILINE)[1]


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


@pytest.mark.skipif(
    numbers(torch.__version__) < numbers(PINNED),
    reason=f"torch {torch.__version__} is older than the pinned one",
)
@pytest.mark.parametrize("lack", [lacks_compile, lacks_cpu_shards, lacks_flex, lacks_kernels])
def test_nothing_is_skipped_for_its_age(lack):
    assert lack() is None
