"""The README's Python examples run as they stand, on the embedded model and small tensors."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from dynmask.assets import load_texts, model_folder

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_first_commands_are_demo_and_test() -> None:
    first = re.search(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    q, k = torch.randn(2, 8, 33, 16), torch.randn(2, 4, 33, 16)
    padding_mask = torch.ones(2, 33, dtype=torch.int64)
    padding_mask[0, :5] = 0
    names = {
        "name": os.fspath(model_folder()),
        "texts": [text[:8000] for text in load_texts("calibration")[:3]],
        "prompt": "It was a bright cold day in April, and",
        "q": q,
        "k": k,
        "v": torch.randn(2, 4, 33, 16),
        "padding_mask": padding_mask,
    }
    if "calibrate(model" in BLOCKS[number]:
        exec(BLOCKS[0], names)  # It goes on from there.
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    printed = capsys.readouterr().out
    if "plan.save" in BLOCKS[number]:
        assert (tmp_path / "my-plan" / "plan.json").is_file()
    if "run.stats" in BLOCKS[number]:
        assert "prefill" in printed
    elif "memory()" in BLOCKS[number]:
        assert int(printed) > 0
    else:
        assert names["out"].shape == q.shape  # type: ignore[attr-defined]
        assert bool(names["out"].isfinite().all())  # type: ignore[attr-defined]
