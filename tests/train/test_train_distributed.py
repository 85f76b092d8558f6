"""Two processes of torchrun on the CPU take the steps that one takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from features import lacks_cpu_shards, needs
from safetensors.torch import load_file
from train_cases import SHAPE, changed, losses

from dynmask.train.run import train
from dynmask.train.sections import Text

COMMAND = "import sys; from dynmask.cli import main; sys.exit(main())"
SHARDED = Path(__file__).parent / "sharded_on_cpu.py"
RECIPE = changed(
    model={"type": "dma", "keep": 24, **SHAPE}, data=Text(valid="train.txt"), eval_every=3
)


@pytest.fixture(scope="module")
def one(text_folder, tmp_path_factory):
    """A run in one process, and its folder."""
    out = tmp_path_factory.mktemp("one")
    return train(RECIPE, out, data=str(text_folder), workers=0), out


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE.to_dict()), encoding="utf-8")
    return str(path)


def launch(*command):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = [*torchrun, "--nproc-per-node", "2", sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(out, one):
    log = json.loads((out / "log.json").read_text())
    both = [entry["loss"] for entry in log if "loss" in entry]
    assert len(both) == 5
    assert both == pytest.approx(losses(one[0]), rel=1e-5)
    weights, expected = (
        load_file(folder / "model" / "model.safetensors") for folder in (out, one[1])
    )
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=1e-3)


def test_replicated(recipe, text_folder, tmp_path, one):
    out = tmp_path / "two"
    command = ["-c", COMMAND, "train", recipe, "--json", "--workers", "0"]
    (line,) = launch(*command, "--data", text_folder, "--out", out).splitlines()
    document = json.loads(line)
    assert (document["complete"], document["devices"]) == (True, "2 CPU")
    assert document["eval_loss"] == pytest.approx(one[0].last("eval_loss"), rel=1e-5)
    check(out, one)


def test_sharded(recipe, text_folder, tmp_path, one):
    needs(lacks_cpu_shards)
    launch(SHARDED, recipe, text_folder, tmp_path / "two")
    check(tmp_path / "two", one)
    assert (tmp_path / "two" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()


def test_sharded_in_bfloat16(recipe, text_folder, tmp_path, one):
    """bfloat16 weights are gathered and float32 gradients summed, and the loss hardly differs."""
    out = tmp_path / "two"
    said = launch(SHARDED, recipe, text_folder, out, "bf16").splitlines()
    assert len(said) == 2, "both processes shard all by one policy"
    assert all("param_dtype=torch.bfloat16, reduce_dtype=torch.float32" in line for line in said)
    log = json.loads((out / "log.json").read_text())
    both = [entry["loss"] for entry in log if "loss" in entry]
    assert both == pytest.approx(losses(one[0]), rel=2e-3)
    assert both != losses(one[0])
