"""The cache of a run: against transformers' own cache under the same masks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from hf_models import make_model, make_plan, random_ids
from transformers import DynamicCache

from dynmask.dam.dynamic import Dynamic
from dynmask.hf import accelerate
from dynmask.hf.run_cache import RunLayer

DYNAMIC = Dynamic(
    coverage=0.9, tile=8, block=8, near=8, landmarks=4, queries=4, few=12, shortest=30
)
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def of_kv_heads(plan):
    """The plan, with kv heads gated whole: heads 0 and 1 on stripes, 2 and 3 dense."""
    layers = {
        index: dataclasses.replace(layer, gate=torch.arange(4) >= 2)
        for index, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def steps(model, ids, cache, sizes, **given):
    """Logits of the tokens, given in pieces."""
    out, at = [], 0
    with torch.no_grad():
        for size in sizes:
            mask = given.get("mask")
            more = {} if mask is None else {"attention_mask": mask[:, : at + size]}
            out.append(model(ids[:, at : at + size], past_key_values=cache, **more).logits)
            at += size
    return torch.cat(out, 1)


SIZES = {
    "prompt and tokens": [200, *[1] * 30],
    "chunks": [100, 40, 7, 1, 60, 1, 1],
    "tokens": [1] * 60,
}


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_with_full_coverage_it_is_an_ordinary_cache(kind, sizes):
    model = make_model(kind, max_position_embeddings=512)
    ids = random_ids(2, sum(sizes))
    with accelerate(model, dynamic=dataclasses.replace(DYNAMIC, coverage=1)) as run:
        expected = steps(model, ids, DynamicCache(config=model.config), sizes)
        found = steps(model, ids, run.cache(), sizes)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["static", "auto", "dense"])
@pytest.mark.parametrize("mixed", [False, True], ids=["kv heads", "mixed"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_under_a_plan_it_is_an_ordinary_cache(mode, mixed, sizes):
    if mode == "auto" and mixed:
        pytest.skip("static heads of a kv head that is dynamic see more here, see run.cache")
    model = make_model("llama", max_position_embeddings=512)
    plan = make_plan(model) if mixed else of_kv_heads(make_plan(model))
    ids = random_ids(2, sum(sizes))
    dynamic = dataclasses.replace(DYNAMIC, coverage=1)
    with accelerate(model, plan, mode=mode, dynamic=dynamic) as run:
        expected = steps(model, ids, DynamicCache(config=model.config), sizes)
        found = steps(model, ids, run.cache(), sizes)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["static", "auto"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mode, side):
    model = make_model("llama", max_position_embeddings=512)
    ids, lengths = random_ids(3, 200), (200, 160, 100)
    mask = torch.zeros(3, 200, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 200 - length if side == "left" else 0 :][:length] = 1
    ids, later = ids * mask, random_ids(3, 3)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    dynamic = dataclasses.replace(DYNAMIC, coverage=1)
    with accelerate(model, of_kv_heads(make_plan(model)), mode=mode, dynamic=dynamic) as run:
        together = run.cache()
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=place, past_key_values=together)
            found = []
            for i in range(3):
                mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
                at = torch.tensor(lengths)[:, None] + i
                logits = model(
                    later[:, i : i + 1],
                    attention_mask=mask,
                    position_ids=at,
                    past_key_values=together,
                ).logits
                found.append(logits)
            found = torch.cat(found, 1)
        for row, length in enumerate(lengths):
            real = mask[row, :200].bool()
            tokens = torch.cat([ids[row : row + 1, real], later[row : row + 1]], 1)
            alone = steps(model, tokens, run.cache(), [length, 1, 1, 1])[:, -3:]
            torch.testing.assert_close(found[row : row + 1], alone, **CLOSE)


def test_static_heads_forget_and_the_others_do_not():
    model = make_model("llama", max_position_embeddings=4096)
    ids = random_ids(1, 2100)
    with accelerate(model, of_kv_heads(make_plan(model)), mode="auto", dynamic=DYNAMIC) as run:
        cache = run.cache()
        steps(model, ids, cache, [2000])
        layer = cache.layers[0]
        assert isinstance(layer, RunLayer)
        forgetting, keeping = layer._static.nbytes, layer._paged.nbytes
        # Two floats for each of 8 channels of one kv head; the plan's corner is 12 tokens.
        assert keeping >= 2000 * 2 * 4 * 8
        assert forgetting <= 300 * 2 * 4 * 8
        ordinary = 2 * 2 * 4 * 8 * 2000 * 3
        assert cache.memory() < 0.72 * ordinary
        assert cache.get_seq_length() == 2000
        for at in range(2000, 2100):
            with torch.no_grad():
                model(ids[:, at : at + 1], past_key_values=cache)
        assert layer._static.nbytes <= 2 * forgetting


def test_steps_look_at_few_keys_and_say_so():
    model = make_model("llama", max_position_embeddings=1024)
    ids = random_ids(1, 640)
    with accelerate(model, coverage=0.99, dynamic=DYNAMIC) as run:
        expected = steps(model, ids, DynamicCache(config=model.config), [600])
        exact = steps(model, ids, DynamicCache(config=model.config), [600, *[1] * 40])
        before = run.stats()
        found = steps(model, ids, run.cache(), [600, *[1] * 40])
        stats = run.stats()
    torch.testing.assert_close(found[:, :600], expected)
    assert "decode" not in before["density"]
    assert 0 < stats["density"]["decode"] < 0.9
    assert stats["density"]["decode"] <= stats["computed_density"]["decode"] <= 1
    names = set(stats["impl"]["decode"]) - set(before["impl"]["decode"])
    assert all(name.startswith("paged") for name in names)
    assert names
    assert not torch.allclose(found[:, 600:], exact[:, 600:], atol=1e-5)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=-1)[0, 600:].mean() > 0.9


def test_every_key_counts_where_a_call_has_several_rows():
    model = make_model("llama", max_position_embeddings=1024)
    ids = random_ids(1, 310)
    with accelerate(model, dynamic=DYNAMIC) as run:
        steps(model, ids, run.cache(), [300, 10])
        assert run.stats()["density"]["chunk"] == 1


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["beams", "sampling", "several"],
)
def test_generate_in_other_ways(how):
    model = make_model("llama", max_position_embeddings=512)
    with accelerate(model, of_kv_heads(make_plan(model)), dynamic=DYNAMIC) as run:
        out = model.generate(
            random_ids(2, 150), past_key_values=run.cache(), max_new_tokens=20, **how
        )
    assert out.shape[1] > 150


@pytest.mark.parametrize("mode", ["static", "auto"])
def test_generated_tokens_are_those_of_an_ordinary_cache(mode):
    model = make_model("llama", max_position_embeddings=512)
    dynamic = dataclasses.replace(DYNAMIC, coverage=1)
    with accelerate(model, of_kv_heads(make_plan(model)), mode=mode, dynamic=dynamic) as run:
        ids = random_ids(1, 150)
        how = {"max_new_tokens": 40, "do_sample": False}
        expected = model.generate(ids, **how)
        assert model.generate(ids, past_key_values=run.cache(), **how).equal(expected)
        assistant = make_model("llama", seed=5, num_hidden_layers=1)
        assisted = model.generate(
            ids, past_key_values=run.cache(), assistant_model=assistant, **how
        )
        assert assisted.equal(expected)


def test_beams_move_what_is_held():
    model = make_model("llama", max_position_embeddings=512)
    ids = random_ids(3, 150)
    order = torch.tensor([2, 0, 0])
    with accelerate(model, of_kv_heads(make_plan(model)), dynamic=DYNAMIC) as run:
        one, two = run.cache(), run.cache()
        with torch.no_grad():
            model(ids, past_key_values=one)
            one.reorder_cache(order)
            model(ids[order], past_key_values=two)
            for _ in range(30):
                new = random_ids(3, 1)
                found = model(new, past_key_values=one).logits
                torch.testing.assert_close(found, model(new, past_key_values=two).logits)
            one.batch_repeat_interleave(2)
            new = random_ids(6, 1)
            torch.testing.assert_close(
                model(new, past_key_values=one).logits[::2],
                model(new[::2], past_key_values=two).logits,
                **CLOSE,
            )


def test_crop_goes_back():
    model = make_model("llama", max_position_embeddings=512)
    ids, question = random_ids(1, 300), random_ids(1, 9, seed=1)
    with accelerate(model, of_kv_heads(make_plan(model)), dynamic=DYNAMIC) as run, torch.no_grad():
        cache = run.cache()
        model(ids, past_key_values=cache)
        first = model(question, past_key_values=cache).logits
        cache.crop(-9)
        assert cache.get_seq_length() == 300
        torch.testing.assert_close(model(question, past_key_values=cache).logits, first)
        before = cache.memory()
        with pytest.raises(ValueError, match="last 200 tokens cannot be taken back"):
            cache.crop(-200)
        assert (cache.get_seq_length(), cache.memory()) == (309, before)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = [model(x, past_key_values=cache).logits for x in (ids, question)]
        torch.testing.assert_close(again[1], first)


def test_copies_share_the_run_and_not_their_tokens():
    model = make_model("llama", max_position_embeddings=512)
    with accelerate(model, of_kv_heads(make_plan(model)), dynamic=DYNAMIC) as run, torch.no_grad():
        cache = run.cache()
        model(random_ids(1, 150), past_key_values=cache)
        other = copy.deepcopy(cache)
        one = model(random_ids(1, 1), past_key_values=other).logits
        assert (cache.get_seq_length(), other.get_seq_length()) == (150, 151)
        assert model(random_ids(1, 1), past_key_values=cache).logits.equal(one)
    with pytest.raises(ValueError, match=r"run\.cache"):
        model(random_ids(1, 1), past_key_values=other)


def test_a_call_that_was_cut_off_is_noticed(monkeypatch):
    model = make_model("llama", max_position_embeddings=512)
    ids = random_ids(1, 100)
    with accelerate(model, dynamic=DYNAMIC) as run, torch.no_grad():
        cache = run.cache()
        model(ids, past_key_values=cache)

        def stop(*args):
            raise KeyboardInterrupt

        hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match=r"cut off .* new cache with run\.cache"):
            model(ids[:, :1], past_key_values=cache)
        model(ids, past_key_values=run.cache())


def test_refusals():
    model = make_model("llama")
    with accelerate(model) as run:
        mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
        with pytest.raises(ValueError, match="2-d attention_mask"), torch.no_grad():
            model(random_ids(1, 9), attention_mask=mask, past_key_values=run.cache())
        with pytest.raises(ValueError, match=r"torch\.no_grad"):
            model(random_ids(1, 9), past_key_values=run.cache())
    with pytest.raises(ValueError, match="closed"):
        run.cache()


def test_crop_takes_tokens_from_every_layer_or_from_none():
    model = make_model("llama", max_position_embeddings=512)
    plan = of_kv_heads(make_plan(model))
    dense = dataclasses.replace(plan.layers[0], gate=torch.ones(4, dtype=torch.bool))
    plan = dataclasses.replace(plan, layers={**plan.layers, 0: dense})
    with accelerate(model, plan, dynamic=DYNAMIC) as run, torch.no_grad():
        cache = run.cache()
        model(random_ids(1, 300), past_key_values=cache)
        with pytest.raises(ValueError, match="last 200 tokens cannot be taken back"):
            cache.crop(-200)
        assert [layer.get_seq_length() for layer in cache.layers] == [300] * 3
        model(random_ids(1, 1), past_key_values=cache)


def test_crop_removes_no_more_than_there_is():
    model = make_model("llama")
    with accelerate(model, dynamic=DYNAMIC) as run, torch.no_grad():
        cache = run.cache()
        model(random_ids(1, 15), past_key_values=cache)
        cache.crop(-20)
        assert cache.get_seq_length() == 0
        again = model(random_ids(1, 40), past_key_values=cache).logits
        assert again.equal(model(random_ids(1, 40), past_key_values=run.cache()).logits)


def test_copies_made_in_inference_mode_outlast_it():
    model = make_model("llama", max_position_embeddings=512)
    with accelerate(model, of_kv_heads(make_plan(model)), dynamic=DYNAMIC) as run:
        cache = run.cache()
        with torch.inference_mode():
            model(random_ids(1, 150), past_key_values=cache)
            other = copy.deepcopy(cache)
        with torch.no_grad():
            one, two = (model(random_ids(1, 1), past_key_values=x).logits for x in (cache, other))
    assert one.equal(two)


@pytest.mark.parametrize("mode", ["static", "auto", "dynamic"])
def test_autocast_leaves_keys_wider_than_values(mode):
    model = make_model("llama", max_position_embeddings=512)
    plan = None if mode == "dynamic" else of_kv_heads(make_plan(model))
    dynamic = dataclasses.replace(DYNAMIC, coverage=1)
    ids, sizes = random_ids(1, 180), [150, 1, 9, 20]
    with (
        accelerate(model, plan, mode=mode, dynamic=dynamic) as run,
        torch.autocast("cpu", torch.bfloat16),
    ):
        expected = steps(model, ids, DynamicCache(config=model.config), sizes)
        found = steps(model, ids, run.cache(), sizes)
        steps(model, ids, run.cache(136), sizes)
        with torch.no_grad():
            alone = model(ids[:, :150], use_cache=False).logits
    torch.testing.assert_close(alone, expected[:, :150], rtol=0.05, atol=0.3)
    # Both round to bfloat16 everywhere; the maps are sharp, so a few rows differ by much.
    same = torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1)
    assert same.median() > 0.999


def test_values_that_learn_are_refused():
    model = make_model("llama", num_hidden_layers=1).requires_grad_(False)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    with (
        accelerate(model, dynamic=DYNAMIC) as run,
        pytest.raises(ValueError, match=r"torch\.no_grad"),
    ):
        model(random_ids(1, 9), past_key_values=run.cache())


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("cap", [None, 136])
@pytest.mark.parametrize("mode", ["dynamic", "dense"])
def test_a_backend_for_masks_leaves_calls_without_one_to_others(impl, cap, mode):
    model = make_model("llama", num_hidden_layers=1)
    plan, sizes = make_plan(model), [20, 1, 3] if cap is None else [20, 130, 1, 3]
    ids = random_ids(1, sum(sizes))
    settings = dataclasses.replace(DYNAMIC, coverage=1, shortest=1000)
    with accelerate(model, plan, mode=mode, dynamic=settings) as run:
        expected = steps(model, ids, run.cache(cap), sizes)
    with accelerate(model, plan, mode=mode, dynamic=settings, impl=impl) as run:
        found = steps(model, ids, run.cache(cap), sizes)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cap", [None, 136])
def test_batch_rows_are_kept_by_flags(cap):
    model = make_model("llama")
    ids = random_ids(3, 21)
    with accelerate(model, dynamic=DYNAMIC) as run:
        by_flag, by_number = run.cache(cap), run.cache(cap)
        for cache, rows in (
            (by_flag, torch.tensor([True, False, True])),
            (by_number, torch.tensor([0, 2])),
        ):
            steps(model, ids[:, :20], cache, [20])
            cache.batch_select_indices(rows)
            cache.batch_repeat_interleave(2)
        later = ids[:1, 20:].expand(4, -1)
        found, expected = (steps(model, later, cache, [1]) for cache in (by_flag, by_number))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cap", [None, 200])
def test_layers_that_share_keys_are_refused(cap):
    model = make_model("llama")
    model.config.num_kv_shared_layers = 1
    with accelerate(model) as run, pytest.raises(ValueError, match="share their keys"):
        run.cache(cap)


@pytest.mark.parametrize("kind", ["deepseek", "diffllama"])
@pytest.mark.parametrize("cap", [None, 200])
def test_models_that_attend_to_other_keys_than_their_caches_are_refused(cap, kind):
    model = make_model(kind)
    with accelerate(model) as run:
        with pytest.raises(ValueError, match="cannot serve it"):
            steps(model, random_ids(1, 9), run.cache(cap), [9])
        assert steps(model, random_ids(1, 9), None, [9]).isfinite().all()


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("cap", [None, 200])
def test_a_cache_refused_to_another_model_goes_on(cap, accelerated):
    model, other = make_model("llama"), make_model("llama", seed=1)
    ids = random_ids(1, 9)
    with (
        torch.no_grad(),
        accelerate(model, make_plan(model), mode="static") as run,
        accelerate(other) if accelerated else contextlib.nullcontext(),
    ):
        expected = run.cache(cap)
        model(ids[:, :8], past_key_values=expected)
        cache = copy.deepcopy(expected)
        for tokens in (ids, ids[:, 8:]):
            with pytest.raises(ValueError, match="the model inside accelerate"):
                other(tokens, past_key_values=cache)
        found, expected = (model(ids[:, 8:], past_key_values=x).logits for x in (cache, expected))
        assert torch.equal(found, expected)
    with torch.no_grad(), pytest.raises(ValueError, match="the model inside accelerate"):
        model(ids[:, 8:], past_key_values=cache)


def test_a_model_has_no_hooks_after_its_run():
    model = make_model("llama")
    with accelerate(model, make_plan(model), mode="static") as run:
        run.cache()
        run.cache()
        hooks = [len(m._forward_hooks) for m in model.modules()]
        assert sum(hooks) == len(model.model.layers)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_call_that_broke_does_not_open_the_cache_to_others():
    model, other = make_model("llama"), make_model("llama", seed=1)

    def stop(*args):
        raise RuntimeError

    with torch.no_grad(), accelerate(model, make_plan(model), mode="static") as run:
        cache = run.cache()
        hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(stop)
        with pytest.raises(RuntimeError):
            model(random_ids(1, 9), past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="the model inside accelerate"):
            other(random_ids(1, 9), past_key_values=cache)
