"""Fork and spawn: an accelerated model in a child, and a plan that a child loads or makes."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest
import torch
from dying import child
from fault_models import make_model, plan_for, state, tokens

from dynmask.dam import MaskPlan
from dynmask.hf import accelerate

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OPTIONS = {"mode": "static"}


def by_itself(folder, answers):
    """What a spawned process does: everything from the start, by what is on the disk."""
    torch.set_num_threads(1)
    model, plan = make_model(), MaskPlan.load(folder)
    with accelerate(model, plan, **OPTIONS):
        found = tokens(model)
    plan_for(model).save(folder + "-of-the-child")
    answers.put(found.tolist())


def test_spawned_child_loads_the_plan_and_generates(plan, tmp_path):
    folder = str(tmp_path / "plan")
    plan.save(folder)
    model = make_model()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    # The parent is accelerated at the time: nothing of that may reach the child.
    with accelerate(model, plan, **OPTIONS):
        expected = tokens(model)
        process = context.Process(target=by_itself, args=(folder, answers))
        process.start()
        process.join(600)
    assert process.exitcode == 0
    assert answers.get() == expected.tolist()
    made = MaskPlan.load(folder + "-of-the-child")
    assert all(torch.equal(made.layers[i].corner, plan.layers[i].corner) for i in plan.layers)


def test_an_accelerated_model_is_not_sent_to_a_child(plan):
    model = make_model()
    with (
        accelerate(model, plan),
        pytest.raises(ValueError, match="copy or pickle it before the with block"),
    ):
        pickle.dumps(model)
    # Behind the block it is a model as any other.
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(tokens(copied), tokens(model))


def test_a_plan_can_be_sent_to_a_child(plan):
    model, sent = make_model(), pickle.loads(pickle.dumps(plan))
    with accelerate(model, plan, **OPTIONS):
        expected = tokens(model)
    with accelerate(model, sent, **OPTIONS):
        assert torch.equal(tokens(model), expected)


@needs_fork
@pytest.mark.parametrize("mode", ["static", "auto", "dynamic", "dense"])
def test_forked_child_goes_on_accelerated_and_the_parent_too(plan, mode):
    model = make_model()
    before, plain = state(model), tokens(model)
    with accelerate(model, plan, mode=mode) as run:
        expected = tokens(model)
        calls = run.stats()["calls"]

        def work():
            assert torch.equal(tokens(model), expected)
            run.close()
            assert torch.equal(tokens(model), plain)
            with accelerate(model, plan, mode=mode):
                assert torch.equal(tokens(model), expected)

        assert child(work) == 0
        # What the child counted and closed is its own.
        assert run.stats()["calls"] == calls
        assert torch.equal(tokens(model), expected)
    assert state(model) == before


@needs_fork
def test_forked_child_calibrates_and_goes_on_with_a_cache(plan, tmp_path):
    model = make_model()
    with accelerate(model, plan, **OPTIONS) as run:
        expected = tokens(model, length=200, past_key_values=run.cache(136))

        def work():
            found = tokens(model, length=200, past_key_values=run.cache(136))
            assert torch.equal(found, expected)

        assert child(work) == 0
    assert child(lambda: plan_for(model).save(tmp_path / "plan")) == 0
    made = MaskPlan.load(tmp_path / "plan")
    assert all(torch.equal(made.layers[i].corner, plan.layers[i].corner) for i in plan.layers)


@needs_fork
def test_child_that_dies_inside_leaves_the_parent_alone(plan):
    model = make_model()
    with accelerate(model, plan, **OPTIONS):
        expected = tokens(model)

        def work():
            tokens(model)
            os.kill(os.getpid(), 9)

        assert child(work) == -9
        assert torch.equal(tokens(model), expected)
