"""The sweep of programs for rows with lists of their own, on a tiny case in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_every_program_agrees_and_is_timed(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks/row_lists.py"), "--tiny", "--rounds", "1"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert [(cell["pass"], cell.get("before", False)) for cell in cells] == [
        ("forward", True),
        ("forward", False),
        ("backward", True),
        ("backward", False),
    ]
    assert all(cell["milliseconds"] > 0 for cell in cells)
