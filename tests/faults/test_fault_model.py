"""Errors inside an accelerated model, and several models and threads at once.

`tests/hf/test_hf_accelerate.py` has an exception in the with block and two models in two threads.
"""

from __future__ import annotations

import contextlib
import sys
import threading

import pytest
import torch
from fault_models import SIZES, make_model, plan_for, random_ids, state, tokens
from torch.nn import functional

from dynmask.dam import dynamic
from dynmask.dam.dynamic import Dynamic
from dynmask.dma import DmaConfig, DmaForCausalLM, LifetimeCache
from dynmask.hf import accelerate
from dynmask.ops import cpu, reference

# Small enough for prompts of some tens of tokens.
SMALL = Dynamic(coverage=0.6, tile=16, block=16, near=16, landmarks=8, few=4, shortest=32)
MODES = {
    "static": {"mode": "static"},
    "auto": {"mode": "auto", "dynamic": SMALL},
    "dynamic": {"mode": "dynamic", "dynamic": SMALL},
    "dense": {"mode": "dense"},
}
each_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


class Broken(Exception):
    """Nobody else's."""


@contextlib.contextmanager
def failing(monkeypatch, error, *, call):
    """Raise in the ``call``-th attention call, from 1: inside ours, or inside torch's own."""
    count = 0

    def fail(real):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                raise error
            return real(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for home, name in (
            (cpu, "attend"),
            (reference, "attend"),
            (dynamic, "attend_gathered"),
            (functional, "scaled_dot_product_attention"),
        ):
            patch.setattr(home, name, fail(getattr(home, name)))
        yield
    assert count >= call, "the error was never raised"


ERRORS = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "runtime": RuntimeError("device-side assert"),
    "interrupt": KeyboardInterrupt(),
}


@each_mode
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("call", [1, 2, 5], ids=["first call", "second call", "fifth call"])
def test_error_inside_generate_leaves_the_model_usable(plan, monkeypatch, options, error, call):
    """In the block the next call runs as if nothing had been; behind it the model is as before."""
    model = make_model()
    before, plain = state(model), tokens(model)
    with accelerate(model, plan, **options):
        expected = tokens(model)
    assert torch.equal(expected, plain) == (options["mode"] == "dense")
    with accelerate(model, plan, **options) as run:
        inside = state(model)
        with failing(monkeypatch, error, call=call), pytest.raises(type(error)):
            tokens(model)
        assert state(model) == inside
        assert torch.equal(tokens(model), expected)
        run.stats()
    assert state(model) == before
    assert torch.equal(tokens(model), plain)
    with accelerate(model, plan, **options):
        assert torch.equal(tokens(model), expected)


@each_mode
def test_error_that_leaves_the_block_restores_the_model(plan, monkeypatch, options):
    model = make_model()
    before, plain = state(model), tokens(model)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with (
        failing(monkeypatch, error, call=2),
        pytest.raises(torch.OutOfMemoryError),
        accelerate(model, plan, **options),
    ):
        tokens(model)
    assert state(model) == before
    assert torch.equal(tokens(model), plain)


def test_error_in_a_callback_of_generate(plan):
    """What the user hands to generate may raise at any token."""
    model = make_model()
    before = state(model)

    def stop(ids, scores, **kwargs):
        raise Broken

    with pytest.raises(Broken), accelerate(model, plan, mode="static"):
        tokens(model, stopping_criteria=[stop])
    assert state(model) == before


def test_error_while_calibrating_leaves_the_model(plan, monkeypatch):
    model = make_model()
    before = state(model)
    error = torch.OutOfMemoryError("CUDA out of memory")

    def fail(done, total, text):
        if done == total // 2:
            raise error

    with pytest.raises(torch.OutOfMemoryError):
        plan_for(model, progress=fail)
    assert state(model) == before
    again = plan_for(model)
    assert all(torch.equal(again.layers[i].corner, plan.layers[i].corner) for i in plan.layers)


def test_several_models_at_once_in_one_process(plan):
    """Three of two shapes, two of them sharing one configuration, opened and closed crosswise."""
    first = make_model()
    second = type(first)(first.config).eval()
    third = make_model(1, num_hidden_layers=2, hidden_size=48, num_key_value_heads=1)
    models = [first, second, third]
    plans = [plan, plan_for(second), plan_for(third)]
    options = [MODES["static"], MODES["dynamic"], MODES["auto"]]
    states = [state(m) for m in models]
    plain = [tokens(m) for m in models]
    alone = []
    for model, own, option in zip(models, plans, options, strict=True):
        with accelerate(model, own, **option):
            alone.append(tokens(model))

    def check(running):
        for model, plain_one, alone_one in zip(models, plain, alone, strict=True):
            expected = alone_one if any(model is m for m in running) else plain_one
            assert torch.equal(tokens(model), expected)

    runs = []
    for at, (model, own, option) in enumerate(zip(models, plans, options, strict=True)):
        runs.append(accelerate(model, own, **option))
        check(models[: at + 1])
    runs[0].close()
    check(models[1:])
    runs[2].close()
    check([second])
    runs[1].close()
    check([])
    assert [state(m) for m in models] == states


@each_mode
@pytest.mark.parametrize("count", [1, 2], ids=["one model", "two models"])
def test_threads_generate_what_they_would_alone(plan, options, count):
    """Four threads, switched as often as Python can."""
    models = [make_model(seed) for seed in range(count)]
    plans = [plan, *(plan_for(m) for m in models[1:])]
    found: dict[int, list[torch.Tensor]] = {seed: [] for seed in range(4)}
    errors = []

    def work(seed):
        try:
            for _ in range(3):
                found[seed].append(tokens(models[seed % count], length=80 + 7 * seed, seed=seed))
        except Exception as error:
            errors.append(error)

    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(accelerate(m, p, **options))
            for m, p in zip(models, plans, strict=True)
        ]
        alone = [tokens(models[s % count], length=80 + 7 * s, seed=s) for s in range(4)]
        before = [sum(run.stats()["calls"].values()) for run in runs]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        after = [sum(run.stats()["calls"].values()) for run in runs]
    assert not errors
    for seed in range(4):
        assert len(found[seed]) == 3
        assert all(torch.equal(each, alone[seed]) for each in found[seed])
    # Not one call was counted twice or not at all.
    assert after == [4 * n for n in before]


def test_threads_with_a_capped_cache_each(plan):
    model = make_model()
    found, errors = {}, []

    def work(seed):
        try:
            found[seed] = tokens(
                model, length=200, seed=seed, new=20, past_key_values=run.cache(136)
            )
        except Exception as error:
            errors.append(error)

    with accelerate(model, plan, mode="static") as run:
        alone = [
            tokens(model, length=200, seed=s, new=20, past_key_values=run.cache(136))
            for s in range(3)
        ]
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(torch.equal(found[s], alone[s]) for s in range(3))


def test_accelerating_one_model_from_two_threads_lets_one_in(plan):
    model = make_model()
    before = state(model)
    results = []

    def work():
        try:
            results.append(accelerate(model, plan))
        except ValueError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    run, error = sorted(results, key=lambda r: isinstance(r, ValueError))
    assert "already" in str(error)
    run.close()
    assert state(model) == before


def test_random_prompts_stay_the_same(plan):
    """A hundred errors in a row cost nothing that stays."""
    model = make_model()
    with accelerate(model, plan, mode="static"):
        expected = model(random_ids(40)).logits
        for _ in range(100):
            with pytest.raises(IndexError):
                model(torch.full((1, 40), 10**6))
        assert torch.equal(model(random_ids(40)).logits, expected)


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn.o_proj", "mlp"])
def test_lifetime_cache_is_not_gone_on_with_after_a_call_was_cut_off(part):
    torch.manual_seed(0)
    shape = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    model = DmaForCausalLM(DmaConfig(keep=7, **shape)).eval()
    cache = LifetimeCache()

    def fail(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with torch.no_grad():
        model(random_ids(20), past_key_values=cache)
        hook = model.get_submodule(f"model.layers.1.{part}").register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(random_ids(9), past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="a pass was cut off; make a new LifetimeCache"):
            model(random_ids(1), past_key_values=cache)
        cache.reset()
        found = model(random_ids(30), past_key_values=cache).logits
        torch.testing.assert_close(found, model(random_ids(30)).logits)
