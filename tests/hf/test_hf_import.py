"""What importing loads."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_dynmask_does_not_load_transformers():
    assert run("import dynmask, sys; assert 'transformers' not in sys.modules").returncode == 0


def test_missing_transformers_says_what_to_install():
    found = run("import sys; sys.modules['transformers'] = None; import dynmask.hf")
    assert "ImportError: dynmask.hf needs transformers" in found.stderr
    assert "pip install 'dynmask[hf]'" in found.stderr
