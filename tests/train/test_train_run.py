"""Runs of a few steps on the CPU: what they compute, how they end, and how they go on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from train_cases import MQAR, SHAPE, changed, losses
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dynmask.train import trainer
from dynmask.train.batches import Steps
from dynmask.train.callbacks import last_checkpoint
from dynmask.train.models import build_model
from dynmask.train.prepare import prepare
from dynmask.train.run import train
from dynmask.train.sections import Phase, Text
from dynmask.train.trainer import answer_counts, weighted_loss


def test_weighted_loss_is_the_naive_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, 11, generator=generator, dtype=torch.float64).float()
    ids = torch.randint(0, 11, (3, 17), generator=generator)
    weights = torch.rand(3, 17, generator=generator)
    before = weights.clone()
    total = 0.0
    for row in range(3):
        for t in range(16):
            p = logits[row, t].double().softmax(0)[ids[row, t + 1]]
            total -= weights[row, t + 1].item() * p.log().item()
    loss = weighted_loss(logits, ids, weights, torch.tensor(7.0))
    assert loss.item() == pytest.approx(total / 7, rel=1e-5)
    assert torch.equal(weights, before)


def test_answers_are_counted_alone():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    weights = torch.tensor([[4.0, 4.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    guesses = torch.tensor([[2, 0, 0, 0], [2, 3, 4, 0]])
    logits = torch.nn.functional.one_hot(guesses, 5).float()
    assert answer_counts(logits, ids, weights, answer=4.0).tolist() == [[1, 2], [0, 0]]


class Kill(TrainerCallback):
    """Dies at a step, as if the process were killed: nothing more is written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def kill_at(monkeypatch, step):
    """A Kill in place of the first of the callbacks that can spare it."""
    patched = trainer.WeightedTrainer.__init__

    def init(self, **settings):
        patched(self, **settings)
        self.add_callback(Kill(step))

    monkeypatch.setattr(trainer.WeightedTrainer, "__init__", init)


@pytest.mark.parametrize("kind", ["llama", "dma"])
def test_killed_and_resumed_equals_uninterrupted(go, tmp_path, monkeypatch, kind):
    recipe = changed(model={"type": kind, **SHAPE}, data=Text())
    whole = go(tmp_path / "whole", recipe)
    assert whole.complete
    assert len(set(losses(whole))) == 5
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            go(parts, recipe)
    assert not (parts / "model").exists()
    # What checkpoints look like if the process is killed while writing them.
    shutil.copytree(parts / "checkpoint-2", parts / "checkpoint-3")
    (parts / "checkpoint-3" / "whole.json").unlink()
    shutil.copytree(parts / "checkpoint-2", parts / "checkpoint-4")
    (parts / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    assert last_checkpoint(parts).name == "checkpoint-2"
    resumed = go(parts, recipe)
    assert losses(resumed) == losses(whole)
    weights = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    again = load_file(parts / "model" / "model.safetensors")
    assert weights.keys() == again.keys()
    for name, value in weights.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, again[name]), name
    assert not list(parts.glob("*.partial"))
    assert {path.name for path in parts.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_stop_by_time_then_nothing_left_to_do(go, tmp_path):
    stopped = go(tmp_path, minutes=1e-9)
    assert (stopped.complete, stopped.steps) == (False, 1)
    assert go(tmp_path).complete
    before = load_file(tmp_path / "model" / "model.safetensors")
    again = go(tmp_path)
    assert again.complete
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(value, before[name])
    assert json.loads((tmp_path / "log.json").read_text()) == again.log


@pytest.mark.parametrize("kind", ["llama", "dma"])
def test_accumulated_gradients_make_the_same_step(go, tmp_path, kind):
    recipe = changed(model={"type": kind, **SHAPE}, data=Text(), phases=(Phase(64, 4),))
    whole = go(tmp_path / "whole", recipe)
    parts = go(tmp_path / "parts", changed(recipe, micro_tokens=64))
    again = go(tmp_path / "again", changed(recipe, gradient_checkpointing=True))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "dma"])
def test_packed_loss_is_that_of_the_documents_one_by_one(tmp_path, tokenizer, kind):
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": f"Document {n} says " + n % 7 * "and so on, "}) for n in range(99)]
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {"type": kind, **SHAPE} | ({"keep": 9} if kind == "dma" else {})
    recipe = changed(model=model, data=Text())
    first = losses(train(recipe, tmp_path / "run", data=str(tmp_path / "text"), workers=0))[0]
    prepared = prepare(recipe, tmp_path / "run", path=str(tmp_path / "text"))
    batch = Steps(prepared.train, recipe)[0]
    fresh = build_model(recipe, vocab_size=4096, eos_token_id=0, pad_token_id=1)
    total, count, documents = 0.0, 0, 0
    for row in batch["input_ids"].tolist():
        ends = [slot + 1 for slot, token in enumerate(row) if token == tokenizer.eos_token_id]
        for start, stop in zip([0, *ends], [*ends, len(row)], strict=True):
            if stop - start < 2:
                continue
            ids = torch.tensor([row[start:stop]])
            with torch.no_grad():
                logits = fresh(input_ids=ids, use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count, documents = count + stop - start - 1, documents + 1
    assert documents > 8
    assert first == pytest.approx(total / count, rel=1e-5)


def test_evaluation(go, tmp_path, text_folder):
    result = go(tmp_path / "mqar", MQAR)
    scored = [entry for entry in result.log if "eval_loss" in entry]
    assert [entry["step"] for entry in scored][:2] == [0, 3]
    assert all(0 <= entry["eval_answers"] <= 1 for entry in scored)
    assert "answers_mqar" in next(entry for entry in result.log if "loss" in entry)
    text = changed(data=Text(valid="train.jsonl"), eval_every=5)
    with pytest.raises(ValueError, match="one sequence 128"):
        go(tmp_path / "text", text)
    held_out = go(tmp_path / "text", changed(text, data=Text(valid="*.txt")))
    assert held_out.last("eval_loss") == pytest.approx(held_out.last("loss"), rel=0.1)
    assert held_out.last("eval_answers") is None


def test_throughput_in_the_log(go, tmp_path):
    seen = []
    result = go(tmp_path, progress=lambda *given: seen.append(given))
    assert [given[:2] for given in seen] == [(step, 5) for step in range(1, 6)]
    assert "tokens/s" in seen[-1][2]
    assert "MFU" in seen[-1][2]
    assert result.last("tokens_per_second") > 0
    assert 0 < result.last("mfu") < 2
    assert result.peak > 0


def test_model_and_tokenizer_load(go, tmp_path):
    go(tmp_path, changed(model={"type": "dma", "keep": 24, **SHAPE}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("It was a bright", return_tensors="pt")["input_ids"]
    assert model.config.use_cache
    assert model.generate(ids, max_new_tokens=3).shape == (1, ids.shape[1] + 3)


def test_tokenizer_of_its_own(go, tmp_path):
    recipe = changed(tokenizer=None, vocab_size=400)
    go(tmp_path, recipe, minutes=1e-9)
    made = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    assert go(tmp_path, recipe).complete
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == made
