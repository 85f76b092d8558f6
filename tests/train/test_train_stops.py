"""What ends a run before its time: another run's folder, data or devices that do not fit, NaN."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from train_cases import MQAR, RECIPE, SHAPE, changed
from transformers import TrainerCallback

from dynmask.train import run as run_module
from dynmask.train import trainer
from dynmask.train.callbacks import WholeCheckpoints, last_checkpoint
from dynmask.train.run import train
from dynmask.train.sections import Text
from dynmask.train.trainer import NonFiniteLossError, weighted_loss


def test_folder_of_another_run_is_refused(go, tmp_path, text_folder):
    go(tmp_path, minutes=1e-9)
    note = (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match=r"another recipe \(lr: 0.0001 was 0.0015\); give another"):
        go(tmp_path, changed(lr=1e-4))
    narrow = changed(model=RECIPE.model | {"hidden_size": 8})
    with pytest.raises(ValueError, match=r"\(model.hidden_size: 8 was 16\)"):
        go(tmp_path, narrow)
    other = tmp_path / "text"
    shutil.copytree(text_folder, other)
    with (other / "train.txt").open("a") as file:
        file.write("More.")
    with pytest.raises(ValueError, match="on other text; give another folder"):
        train(RECIPE, tmp_path, data=str(other), workers=0)
    assert (tmp_path / "run.json").read_text() == note
    # How it is computed and watched may change.
    assert go(tmp_path, changed(micro_tokens=128, save_every=1, log_every=2)).complete


def test_data_that_does_not_fit(go, tmp_path, text_folder):
    with pytest.raises(ValueError, match="no path is given; use --data"):
        train(RECIPE, tmp_path, workers=0)
    with pytest.raises(ValueError, match="type mqar is generated; leave --data out"):
        train(MQAR, tmp_path, data=str(text_folder), workers=0)
    with pytest.raises(ValueError, match="one sequence 128"):
        go(tmp_path, changed(data=Text(train="train.jsonl")))
    assert not (tmp_path / "run.json").exists()


def test_a_loss_that_is_no_number_stops_the_run(go, tmp_path, monkeypatch):
    def broken(logits, ids, weights, norm, scored):
        loss = weighted_loss(logits, ids, weights, norm, scored)
        seen.append(ids)
        return loss * torch.nan if len(seen) == 4 else loss

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "weighted_loss", broken)
        with pytest.raises(NonFiniteLossError, match=r"loss of step 4 is nan; its batch is in"):
            go(tmp_path)
    assert len(seen) == 4
    path = tmp_path / "nonfinite-step-4-process-0.safetensors"
    assert torch.equal(load_file(path)["input_ids"], seen[3])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "4", "loss": "nan"}
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_weights_that_are_no_numbers_are_not_kept(go, tmp_path, monkeypatch):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 4:
                model.model.norm.weight.data[0] = torch.inf

    class Poisoned(WholeCheckpoints, Poison):
        pass

    monkeypatch.setattr(run_module, "WholeCheckpoints", Poisoned)
    with pytest.raises(NonFiniteLossError, match="not finite after step 4"):
        go(tmp_path)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_sharding_needs_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="set fsdp: false"):
        train(changed(fsdp=True), tmp_path)
    with pytest.raises(ValueError, match="cannot be shared out over 2 processes"):
        train(changed(micro_tokens=256), tmp_path)


def test_checkpoint_of_a_sharded_run(go, tmp_path):
    go(tmp_path, minutes=1e-9)
    folder = tmp_path / "checkpoint-1"
    (folder / "pytorch_model_fsdp.bin").touch()
    mark = json.loads((folder / "whole.json").read_text())
    (folder / "whole.json").write_text(json.dumps(mark | {"pytorch_model_fsdp.bin": 0}))
    with pytest.raises(ValueError, match="a run that shards, and this one does not; set fsdp"):
        go(tmp_path)


def test_without_accelerate_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "try:\n    import dynmask.train\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "needs accelerate" in done.stdout
    assert "pip install 'dynmask[train]'" in done.stdout


@pytest.mark.parametrize(
    ("model", "message"),
    [({"kep": 3}, r"kep \(did you mean keep\?\)"), ({"vocab_size": 99}, "vocab_size=99 is less")],
    ids=["unknown", "known by the data only"],
)
def test_a_refused_model_does_not_take_the_folder(go, tmp_path, model, message):
    good = {"type": "dma", "keep": 24, **SHAPE}
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "out", changed(model=good | model))
    assert not (tmp_path / "out" / "run.json").exists()
    assert go(tmp_path / "out", changed(model=good)).complete


def test_out_and_minutes_that_cannot_be(go, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=r"out: .*file is a file; give a folder"):
            go(out)
    for minutes in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"minutes={minutes} must be over 0 and finite"):
            go(tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()
