"""A run that another thread opens or closes while a call is inside the model."""

from __future__ import annotations

import threading

import pytest
import torch
from hf_models import make_model, make_plan, random_ids, snapshot
from transformers import DynamicCache, StaticCache

from dynmask.hf import accelerate, attention
from dynmask.hf.keys import KeySlots, OwnMask

MODELS = ("llama", "gemma3", "mistral-window")
MODES = ("static", "dense")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def opened(model, mode="static"):
    """A run; a model whose every layer has a window of its own takes no plan."""
    plan = make_plan(model) if model.config.model_type != "mistral" else None
    return accelerate(model, plan, mode=mode if plan else "auto")


def interrupted(model, at, act, *arguments, **options):
    """Call the model and, when it has run layer ``at``, ``act()`` in another thread.

    Returns:
        The logits, or what the call raised.
    """
    done = []

    def hook(*_):
        thread = threading.Thread(target=lambda: done.append(act()))
        thread.start()
        thread.join()

    handle = model.model.layers[at].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(*arguments, **options).logits
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        return error
    finally:
        handle.remove()
        assert len(done) == 1


def plainly(model, *arguments, **options):
    with torch.no_grad():
        return model(*arguments, **options).logits


def same(found, expected, real):
    return torch.allclose(found[real], expected[real], **CLOSE)


def padded(batch, length):
    """Ids, and the mask of a batch whose last row is padded on the left."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, : batch - 1] = 0
    return random_ids(batch, length), mask


@pytest.mark.parametrize("batch", [1, 2, 13], ids="batch{}".format)
@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_call_whose_run_is_closed(kind, mode, own, batch):
    model = make_model(kind)
    model.set_attn_implementation(own)
    ids, mask = padded(batch, 13)
    real = mask.bool()
    plain, before = plainly(model, ids, attention_mask=mask), snapshot(model)
    with opened(model, mode):
        ours = plainly(model, ids, attention_mask=mask)
    for at, whole in ((0, False), (1, False), (2, True)):
        run = opened(model, mode)
        found = interrupted(model, at, run.close, ids, attention_mask=mask)
        if whole:  # all attention was done by then
            assert same(found, ours, real)
        else:
            assert isinstance(found, ValueError)
            assert "accelerate() was closed or opened while this call" in str(found)
        assert snapshot(model) == before
        assert same(plainly(model, ids, attention_mask=mask), plain, real)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_call_that_a_run_begins_under(kind, masked, mode, own):
    model = make_model(kind)
    model.set_attn_implementation(own)
    ids, mask = padded(1, 13)
    if masked:
        mask[:, :3] = 0
    options = {"attention_mask": mask, "past_key_values": DynamicCache(config=model.config)}
    plain = plainly(model, ids, attention_mask=mask)
    runs = []
    found = interrupted(model, 0, lambda: runs.append(opened(model, mode)), ids, **options)
    if isinstance(found, ValueError):
        assert "accelerate()" in str(found)
    else:  # a dense call under transformers' whole mask: the model's own numbers
        assert mode == "dense" or kind == "mistral-window"
        assert same(found, plain, mask.bool())
    runs[0].close()
    assert same(plainly(model, ids, attention_mask=mask), plain, mask.bool())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_call_between_two_runs(kind):
    model, ids = make_model(kind), random_ids(1, 13)
    run, later = opened(model), []

    def change():
        run.close()
        later.append(accelerate(model, make_plan(model, seed=1), mode="static"))

    found = interrupted(model, 1, change, ids)
    assert isinstance(found, ValueError)
    assert "was closed or opened" in str(found)
    with later[0]:
        expected = plainly(model, ids)
    with accelerate(model, make_plan(model, seed=1), mode="static"):
        assert torch.equal(plainly(model, ids), expected)


def test_a_run_that_is_closed_before_the_first_layer():
    model, ids = make_model("llama"), random_ids(1, 13)
    run = opened(model)
    hook = model.model.rotary_emb.register_forward_hook(lambda *_: run.close())
    with pytest.raises(ValueError, match="was closed or opened"):
        plainly(model, ids)
    hook.remove()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_is_closed_between_choosing_and_running(monkeypatch, at):
    """The layer has looked up our function, and then finds nothing of the run."""
    model, ids = make_model("llama"), random_ids(1, 13)
    run, calls = opened(model), []

    def first_step(module, *_, **__):
        calls.append(module.layer_idx)
        if module.layer_idx == at:
            run.close()

    monkeypatch.setattr(attention.compat, "refuse_unknown_arguments", first_step)
    with pytest.raises(ValueError, match="was closed or opened"):
        plainly(model, ids)
    assert calls == list(range(at + 1))


def test_generating_goes_on_as_the_model_alone_or_ends():
    """Each call of ``generate`` is one or the other."""
    model, ids = make_model("llama"), random_ids(1, 13)
    run, lengths = opened(model, "dense"), []

    def closing(ids, scores):
        lengths.append(ids.shape[1])
        if len(lengths) == 3:
            thread = threading.Thread(target=run.close)
            thread.start()
            thread.join()
        return scores

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = model.generate(ids, logits_processor=[closing], **options)
    assert torch.equal(found, model.generate(ids, **options))
    assert run.stats()["calls"] == {"prefill": 3, "decode": 6}


def test_closing_inside_a_call_of_the_same_thread_does_not_hang():
    model, ids = make_model("llama"), random_ids(1, 13)
    before = snapshot(model)
    run = opened(model)
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 // (run.close() or 0))
    with pytest.raises(ZeroDivisionError), run:
        plainly(model, ids)
    hook.remove()
    assert snapshot(model) == before


def test_a_layer_that_is_called_without_a_mask_is_refused():
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    hidden = torch.randn(1, 5, 32)
    places = model.model.rotary_emb(hidden, torch.arange(5)[None])
    for mask in (None, torch.ones(1, 5, dtype=torch.bool)):
        with opened(model), pytest.raises(ValueError, match="layer 1 got a mask that"):
            attention(hidden, position_embeddings=places, attention_mask=mask)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral-window"])
def test_masks_that_generate_makes_beforehand(kind):
    """With a static cache they come before the call, and go through transformers' hands twice."""
    model, (ids, mask) = make_model(kind), padded(2, 13)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with opened(model):
        expected = model.generate(ids, **options)
        cache = StaticCache(config=model.config, max_cache_len=40)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


MASKS = {
    "slots": lambda: KeySlots(torch.ones(1, 4, dtype=torch.bool)),
    "own": lambda: OwnMask(torch.ones(1, 1, 4, 4, dtype=torch.bool)),
    "own, not full": lambda: OwnMask(None),
}
SCORES = torch.zeros(1, 2, 4, 4)
USES = {
    "sdpa": lambda m: torch.nn.functional.scaled_dot_product_attention(SCORES, SCORES, SCORES, m),
    "added": lambda m: SCORES + m,
    "added to": lambda m: m + SCORES,
    "added in place": lambda m: SCORES.clone().add_(m),
    "where": lambda m: torch.where(m, SCORES, -1.0),
    "filled": lambda m: SCORES.masked_fill(m, 0.0),
    "cut": lambda m: m[:, :, :, :4],
    "summed": lambda m: m.sum(-1),
    "seen as a shape": lambda m: m.shape,
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nothing_but_dynmask_uses_its_masks(make, use):
    with pytest.raises((ValueError, AttributeError), match="was closed or opened"):
        use(make())


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_copy_of_a_mask_belongs_to_the_same_run(make):
    mask, one, other = make(), object(), object()
    mask.to("cpu").claim(one)  # `accelerate` moves masks so, layer by layer
    mask.to("cpu", non_blocking=True).claim(one)
    with pytest.raises(ValueError, match="was closed or opened"):
        mask.contiguous().claim(other)
