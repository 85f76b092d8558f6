"""Logits of the scored positions alone: the same loss, gradients and answers as with all."""

import pytest
import torch
from train_cases import MQAR, SHAPE, changed, losses
from transformers import LlamaConfig, LlamaForCausalLM

from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.train import batches
from dynmask.train.scored import ScoredHead, scored_positions
from dynmask.train.sections import Text
from dynmask.train.trainer import answer_counts, weighted_loss

ROWS, LENGTH, VOCAB = 3, 17, 40


def batch(*, seed=0, share=0.2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    asked = torch.rand(ROWS, LENGTH, generator=generator) < share
    return ids, torch.where(asked, 4.0, 0.0)


def test_scored_are_the_positions_before_a_weight():
    weights = torch.zeros(2, 6)
    weights[0, 0] = weights[0, 3] = weights[1, 5] = 2.0  # nothing predicts a row's first token
    before = weights.clone()
    assert scored_positions(weights).tolist() == [2, 6 + 4]
    assert torch.equal(weights, before)
    assert scored_positions(torch.zeros(2, 6)).tolist() == []
    assert scored_positions(torch.ones(2, 6)) is None
    half = torch.zeros(2, 6)
    half[:, 1:4] = 1.0
    assert scored_positions(half) is None
    half[1, 1] = 0.0
    assert scored_positions(half).tolist() == [0, 1, 2, 7, 8]


@pytest.mark.parametrize("kind", ["llama", "dma"])
def test_same_loss_gradients_and_answers(kind):
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": VOCAB}
    model = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if kind == "llama"
        else DmaForCausalLM(DmaConfig(keep=8, **shape))
    ).double()
    head = ScoredHead(model)
    ids, weights = batch()
    scored = scored_positions(weights)
    assert 0 < len(scored) < ids.numel() / 2
    norm = weights[:, 1:].sum()
    seen = []
    for at in (None, scored):
        model.zero_grad()
        with head.only(at):
            logits = model(input_ids=ids).logits
        assert head.partial == (at is not None)
        assert logits.shape == ((ROWS, LENGTH) if at is None else (1, len(scored))) + (VOCAB,)
        loss = weighted_loss(logits, ids, weights, norm, at)
        loss.backward()
        counts = answer_counts(logits, ids, weights, at, answer=4.0)
        seen.append((loss.detach(), counts, [p.grad.clone() for p in model.parameters()]))
    (loss, counts, gradients), (again, same, others) = seen
    torch.testing.assert_close(again, loss)
    assert torch.equal(same, counts)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other)
    # Outside of the context the model is as it was.
    assert model(input_ids=ids).logits.shape == (ROWS, LENGTH, VOCAB)
    assert head.partial


def test_a_right_answer_is_counted_in_its_row():
    ids, weights = batch(seed=1)
    scored = scored_positions(weights)
    right = torch.nn.functional.one_hot(ids.roll(-1, dims=1).flatten()[scored], VOCAB).float()
    right[0] = -right[0]
    counts = answer_counts(right[None], ids, weights, scored, answer=4.0)
    asked = (weights[:, 1:] > 0).sum(1)
    wrong = torch.zeros_like(asked)
    wrong[scored[0] // LENGTH] = 1
    assert counts.tolist() == torch.stack([asked - wrong, asked], dim=1).tolist()


def test_a_part_without_answers_adds_nothing():
    ids, _ = batch()
    weights = torch.zeros(ROWS, LENGTH)
    logits = torch.zeros(1, 0, VOCAB, requires_grad=True)
    scored = scored_positions(weights)
    loss = weighted_loss(logits, ids, weights, torch.tensor(3.0), scored)
    loss.backward()
    assert loss == 0
    assert answer_counts(logits, ids, weights, scored, answer=4.0).tolist() == [[0, 0]] * ROWS


def test_a_run_is_the_same(go, tmp_path, monkeypatch):
    recipe = changed(MQAR, eval_every=2)
    run = go(tmp_path / "scored", recipe)
    assert run.last("mfu") is None
    monkeypatch.setattr(batches, "scored_positions", lambda weights: None)
    whole = go(tmp_path / "whole", recipe)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    for name in ("eval_loss", "eval_answers", "answers_mqar"):
        assert run.last(name) == pytest.approx(whole.last(name), rel=1e-5), name
    assert whole.last("mfu") is not None


def test_text_keeps_its_logits(go, tmp_path):
    assert go(tmp_path, changed(data=Text())).last("mfu") is not None
