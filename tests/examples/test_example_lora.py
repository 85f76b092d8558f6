"""examples/lora_dma.py trains an adapter that loads and merges."""

import json
import re

import pytest

pytest.importorskip("peft", reason="the example needs peft: pip install peft")


def test_lora_lowers_the_loss_and_merges(example, dma_folder, text_files, tmp_path, capsys):
    out = tmp_path / "adapter"
    sizes = ["--length", "64", "--steps", "12", "--lr", "0.02"]
    example("lora_dma").main([dma_folder, "--texts", *text_files, "--out", str(out), *sizes])
    printed = capsys.readouterr().out
    ((before, after),) = re.findall(r"loss ([\d.]+) before, ([\d.]+) after 12 steps", printed)
    assert float(after) < float(before) - 0.05
    assert "DmaForCausalLM, merged, writes the same: True" in printed
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
