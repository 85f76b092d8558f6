"""SIGKILL in the middle of a training run: it goes on as if nothing had been.

`tests/train/test_train_run.py` ends a run by an exception; here the process is gone, in the middle
of what it writes. The runs are in a process of their own, since PyTorch trains in no fork of a
process that has trained.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

RECIPE = """
model: {type: dma, keep: 24, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
        num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128,
        tie_word_embeddings: true}
data: {type: mqar, vocab: 64, pairs: 8, filler: 4}
phases: [{length: 64, steps: 3}, {length: 128, steps: 2}]
tokens_per_step: 256
schedule: {type: wsd, warmup_steps: 2, decay_steps: 2}
log_every: 1
save_every: 2
"""
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from dying import child, killed_at
from dynmask.train.recipe import Recipe
from dynmask.train.run import train

home = Path(sys.argv[1])
recipe = Recipe.load(home / "recipe.yaml")

def run(out):
    assert train(recipe, out, workers=0).complete

assert child(lambda: run(home / "whole")) == 0
out, deaths = home / "parts", 0
for step in range(2, 10**6, 11):
    if not killed_at(step, out, lambda: run(out)):
        break
    deaths += 1
assert deaths >= 3, deaths
whole, parts = (load_file(home / n / "model" / "model.safetensors") for n in ("whole", "parts"))
assert whole.keys() == parts.keys()
assert all(torch.equal(whole[name], parts[name]) for name in whole)
assert not list(out.glob("*.partial"))
"""


def test_killed_training_ends_with_the_same_weights(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
