"""examples/finetune_dma.py trains a DMA model that transformers loads again."""

import re

import pytest
import torch

import dynmask

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")


def test_finetune_lowers_the_loss_and_saves(example, dense_folder, text_files, tmp_path, capsys):
    sizes = ["--keep", "16", "--length", "64", "--batch", "2", "--steps", "8", "--lr", "0.01"]
    out = tmp_path / "trained"
    example("finetune_dma").main([dense_folder, "--texts", *text_files, "--out", str(out), *sizes])
    printed = capsys.readouterr().out
    ((before, after),) = re.findall(r"loss ([\d.]+) before, ([\d.]+) after 8 steps", printed)
    assert float(after) < float(before) - 0.2
    assert "DmaForCausalLM" in printed
    assert "keeps 16 keys" in printed

    start = dynmask.from_pretrained_dense(dense_folder, keep=16)
    trained = dynmask.DmaForCausalLM.from_pretrained(out)
    assert trained.config.use_cache
    assert trained.config.keep == 16
    moved = [
        name
        for name, weight in trained.named_parameters()
        if "score" in name and not torch.equal(weight, start.get_parameter(name))
    ]
    assert len(moved) == 4  # A and dt_proj of both layers
