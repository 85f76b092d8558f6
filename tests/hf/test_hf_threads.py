"""Threads that generate with one accelerated model, in step: after each token all of them wait."""

from __future__ import annotations

import threading

import pytest
import torch
from hf_models import make_model, make_plan, random_ids
from transformers import DynamicCache

from dynmask.baselines import H2O, Quest, SlidingWindow, SnapKV
from dynmask.dam import Dynamic
from dynmask.hf import accelerate, attach

SMALL = Dynamic(coverage=0.6, tile=16, block=16, near=16, landmarks=8, few=4, shortest=32)
RUNS = {
    "no plan": {"dynamic": SMALL},
    "plan": {"plan": True, "dynamic": SMALL},
    "static": {"plan": True, "mode": "static"},
    "window": {"policy": SlidingWindow(9)},
    "h2o": {"policy": H2O(heavy=6, recent=6)},
    "quest": {"policy": Quest(budget=32, dense_layers=1)},
    "snapkv": {"policy": SnapKV(cap=24, window=8)},
}
PROMPTS = {"equal lengths": (70, 70), "unequal lengths": (70, 41)}


def generate(model, length, seed, step=lambda: None):
    def after(ids, scores):
        step()
        return scores

    ids = random_ids(1, length, seed=seed)
    return model.generate(
        ids, min_new_tokens=12, max_new_tokens=12, do_sample=False, logits_processor=[after]
    )


def together(work, count=2):
    """Run ``work(number, step)`` in threads; what each returned, or raised."""
    barrier, found = threading.Barrier(count), {}

    def run(number):
        try:
            found[number] = work(number, lambda: barrier.wait(120))
        except Exception as error:
            barrier.abort()
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(count)]


@pytest.mark.parametrize("lengths", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_tokens_are_those_of_one_thread(options, lengths):
    model = make_model("llama")
    if "plan" in options:
        options = {**options, "plan": make_plan(model)}
    with accelerate(model, **options) as run:
        alone = [generate(model, length, seed) for seed, length in enumerate(lengths)]
        before = run.stats()
        found = together(lambda seed, step: generate(model, lengths[seed], seed, step))
        after = run.stats()
    assert not [each for each in found if isinstance(each, Exception)]
    assert all(map(torch.equal, found, alone))
    # Twice the calls, and of each the same pairs.
    assert after["calls"] == {kind: 2 * n for kind, n in before["calls"].items()}
    assert after["density"] == pytest.approx(before["density"], rel=1e-12)
    assert min(after["density"].values()) < 1


def test_a_policy_does_not_go_on_with_another_threads_sequence():
    model, ids = make_model("llama"), random_ids(1, 30)
    cache = DynamicCache(config=model.config)

    def work(_, step):
        model(ids[:, 20:], past_key_values=cache)

    with accelerate(model, policy=H2O(heavy=4, recent=4)), torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        (found,) = together(work, count=1)
    assert isinstance(found, ValueError)
    assert "begins at token 20" in str(found)


def test_of_two_threads_that_attach_at_once_one_is_refused(monkeypatch):
    model = make_model("llama")
    meet = threading.Barrier(2)
    register = attach.compat.register
    # Both have found the model free by then.
    monkeypatch.setattr(attach.compat, "register", lambda *a: (meet.wait(120), register(*a)))
    found = together(lambda number, step: accelerate(model))
    run, error = sorted(found, key=lambda each: isinstance(each, ValueError))
    assert "inside accelerate() already" in str(error)
    run.close()
    assert not any("_dynmask_attached" in vars(module) for module in model.modules())
