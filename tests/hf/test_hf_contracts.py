"""DESIGN.md's contracts 7 and 9 of `accelerate`, as properties of drawn runs."""

import copy

import pytest
import torch
from hf_models import make_model, make_plan, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask import accelerate
from dynmask.dam.dynamic import Dynamic

SMALL = Dynamic(tile=8, block=8, near=8, landmarks=4, queries=4, few=2, shortest=16, coverage=0.7)


class Stop(Exception):
    """Of a hook inside the model."""


@torch.no_grad()
def logits(model, ids):
    return model(ids, attention_mask=torch.ones_like(ids)).logits


@given(
    kind=st.sampled_from(["llama", "qwen3"]),
    mode=st.sampled_from(["static", "dynamic", "auto", "dense"]),
    length=st.integers(1, 60),
    batch=st.integers(1, 2),
    end=st.sampled_from(["exit", "close", "raise outside", "raise inside"]),
)
@settings(max_examples=20)
def test_it_touches_the_model_given_and_restores_it(kind, mode, length, batch, end):
    """7: only the model given, only while the run is open, however it ends."""
    model = make_model(kind)
    other, plan, ids = copy.deepcopy(model), make_plan(model), random_ids(batch, length)
    before, names = logits(model, ids), sorted(model.state_dict())
    implementation = model.config._attn_implementation
    run = accelerate(model, plan, mode=mode, dynamic=SMALL)
    assert logits(model, ids).isfinite().all()
    density = run.stats()["density"]["prefill"]
    assert 0 < density <= 1
    assert mode != "dense" or density == 1
    assert torch.equal(logits(other, ids), before)
    if end == "close":
        run.close()
    elif end == "exit":
        with run:
            pass
    elif end == "raise outside":
        with pytest.raises(Stop), run:
            raise Stop
    else:

        def stop(*_):
            raise Stop

        hook = model.get_decoder().layers[-1].register_forward_pre_hook(stop)
        with pytest.raises(Stop), run:
            logits(model, ids)
        hook.remove()
    assert torch.equal(logits(model, ids), before)
    assert (sorted(model.state_dict()), model.config._attn_implementation) == (
        names,
        implementation,
    )


@given(
    mode=st.sampled_from(["static", "dynamic"]),
    length=st.integers(20, 60),
    cut=st.integers(1, 59),
)
@settings(max_examples=20)
def test_the_future_never_changes_the_past(mode, length, cut):
    """5, through a model: tokens from a tile's end on change nothing before it."""
    # Rows of a tile choose together; static masks choose nothing.
    cut = min(cut, length) // SMALL.tile * SMALL.tile if mode == "dynamic" else min(cut, length)
    model = make_model("llama")
    plan, ids = make_plan(model), random_ids(1, length)
    changed = ids.clone()
    changed[:, cut:] = 1 + (ids[:, cut:] + 7) % 50
    with accelerate(model, plan, mode=mode, dynamic=SMALL):
        one, two = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(one[:, :cut], two[:, :cut], rtol=1e-4, atol=1e-5)
