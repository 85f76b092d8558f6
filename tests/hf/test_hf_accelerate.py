"""Accelerated forwards against eager forwards with the plan's masks written out."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from features import lacks_compile, needs
from hf_models import (
    make_model,
    make_plan,
    padded,
    planned_mask,
    random_ids,
    snapshot,
)
from transformers import DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from dynmask.dam.dynamic import Dynamic
from dynmask.hf import accelerate
from dynmask.hf.compat import attention_layers
from dynmask.hf.keys import key_mask

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def eager_logits(model, ids, attention_mask=None, *, plan=None, mode="dense"):
    """Logits of plain eager attention; with a plan, its masks put in layer by layer."""
    size = ids.shape[1]
    real = torch.ones_like(ids) if attention_mask is None else attention_mask
    rows = [(int(r.sum()), int(r.argmax())) for r in real]
    hooks = []
    for layer in attention_layers(model):
        if plan is None or layer.index not in plan.layers:
            continue
        seen = planned_mask(plan, layer.index, mode, rows, size)
        additive = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, -1e30)

        def put(module, args, kwargs, additive=additive):
            return args, {**kwargs, "attention_mask": additive}

        hooks.append(layer.module.register_forward_pre_hook(put, with_kwargs=True))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        positions = (real.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            return model(ids, attention_mask=real, position_ids=positions).logits
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def logits(model, ids, attention_mask=None, **kwargs):
    if attention_mask is not None:
        kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(ids, attention_mask=attention_mask, **kwargs).logits


@pytest.mark.parametrize("mode", ["static", "auto", "dense"])
@pytest.mark.parametrize("size", [1, 37])
def test_logits_equal_eager_with_the_masks(kind, mode, size):
    model = make_model(kind)
    plan = make_plan(model)
    ids = random_ids(2, size)
    expected = eager_logits(model, ids, plan=plan, mode=mode)
    with accelerate(model, plan, mode=mode) as run:
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    if size == 37:
        plain = eager_logits(model, ids)
        same = torch.allclose(expected, plain, **CLOSE)
        assert same == (mode == "dense")
    stats = run.stats()
    sparse = 0 if mode == "dense" else len(plan.layers)
    own = 3 - len(plan.layers)
    assert stats["layers"] == {
        "attached": 3,
        "sparse": sparse,
        "dense": 3 - own - sparse,
        "own window": own,
    }
    assert stats["calls"] == {"prefill": 3}
    assert stats["density"]["prefill"] == pytest.approx(float(plan.density(size, mode).mean()))


@pytest.mark.parametrize("impl", ["cpu", "sdpa", "reference"])
def test_explicit_impl_runs_and_is_reported(impl):
    model = make_model("llama")
    plan = make_plan(model)
    ids, mask = padded("left", (30, 11, 37), 37)
    expected = eager_logits(model, ids, mask, plan=plan, mode="static")
    with accelerate(model, plan, mode="static", impl=impl) as run:
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    stats = run.stats()
    assert stats["impl"]["prefill"] == {impl: 3}
    assert 0 < stats["density"]["prefill"] < 1
    assert stats["computed_density"]["prefill"] >= stats["density"]["prefill"]
    assert stats["mask_seconds"] > 0


@pytest.mark.parametrize("mode", ["static", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, mode, side):
    model = make_model(kind)
    plan = make_plan(model)
    lengths = (29, 8, 1, 33)
    ids, mask = padded(side, lengths, 33)
    with accelerate(model, plan, mode=mode):
        found = logits(model, ids, mask)
        for row, length in enumerate(lengths):
            alone = logits(model, ids[row][mask[row].bool()][None])
            assert alone.shape[1] == length
            torch.testing.assert_close(found[row][mask[row].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("static", [20, 1, 1, 1, 1, 1]),
        ("static", [7, 9, 2, 7]),
        ("auto", [1, 1, 1, 12, 10]),
        ("dense", [7, 9, 1, 8]),
    ],
    ids=["decode", "chunks", "auto", "dense"],
)
def test_cached_equals_whole(kind, mode, cache, steps):
    model = make_model(kind)
    plan = make_plan(model)
    ids = random_ids(2, 25)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with accelerate(model, plan, mode=mode) as run:
        whole = logits(model, ids, mask)
        if cache == "static":
            past = StaticCache(config=model.config, max_cache_len=40)
        else:
            past = DynamicCache(config=model.config)
        parts, at = [], 0
        for step in steps:
            ahead = at + step
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, at:ahead]
            with torch.no_grad():
                out = model(
                    ids[:, at:ahead],
                    attention_mask=mask[:, :ahead],
                    position_ids=positions,
                    past_key_values=past,
                    use_cache=True,
                )
            parts.append(out.logits)
            at = ahead
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], **CLOSE)
    own = 3 - len(plan.layers)
    calls = run.stats()["calls"]
    assert sum(calls.values()) == 3 * (1 + len(steps))
    if own == 0 and steps == [7, 9, 2, 7]:
        assert calls == {"prefill": 6, "chunk": 9}


def test_future_token_never_changes_the_past(kind):
    model = make_model(kind)
    ids = random_ids(1, 40)
    other = ids.clone()
    other[0, 25:] = 96 - other[0, 25:]
    with accelerate(model, make_plan(model), mode="static"):
        a, b = logits(model, ids), logits(model, other)
    assert torch.equal(a[:, :25], b[:, :25]) or torch.allclose(a[:, :25], b[:, :25], atol=1e-5)
    assert not torch.allclose(a[:, 25:], b[:, 25:], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(kind, dtype):
    model = make_model(kind)
    plan = make_plan(model)
    ids, mask = padded("left", (33, 12), 33)
    with accelerate(model, plan, mode="static"):
        expected = logits(model, ids, mask)
    with accelerate(model.to(dtype), plan, mode="static"):
        found = logits(model, ids, mask)
    assert found.isfinite().all()
    error = (found - expected)[mask.bool()].float().abs().mean()
    assert error < 0.1 * expected[mask.bool()].abs().mean()


def test_own_window_layers_stay_exact():
    model = make_model("mistral-window")
    reference = make_model("mistral")
    plan = make_plan(make_model("gemma3"))
    with pytest.raises(ValueError, match="another model"):
        accelerate(model, plan)
    assert not attention_layers(reference)[0].own_window
    # Gemma-3's first layer has a window of 8: the plan leaves it to transformers.
    gemma = make_model("gemma3")
    with accelerate(gemma, plan, mode="static") as run:
        logits(gemma, random_ids(1, 30))
    assert run.stats()["impl"]["prefill"]["own window"] == 1


def test_a_window_that_the_model_does_not_use():
    """As of Moshi: the configuration has one, and masks are plain causal."""
    model, ids = make_model("llama", sliding_window=8), random_ids(2, 30)
    assert [layer.own_window for layer in attention_layers(model)] == [8] * 3
    expected = logits(model, ids)
    with accelerate(model) as run:
        torch.testing.assert_close(logits(model, ids), expected)
    assert run.stats()["impl"]["prefill"] == {"transformers sdpa": 3}


@pytest.mark.parametrize("fail", [False, True])
def test_model_is_given_back(kind, fail):
    model = make_model(kind)
    before = snapshot(model)
    plan = make_plan(model)
    context = pytest.raises(RuntimeError, match="mine") if fail else contextlib.nullcontext()
    with context, accelerate(model, plan) as run:
        assert snapshot(model) != before
        logits(model, random_ids(1, 9))
        if fail:
            raise RuntimeError("mine")
    assert snapshot(model) == before
    run.close()
    assert snapshot(model) == before
    assert sum(run.stats()["calls"].values()) == 3


def test_handle_without_with_block_and_changes_to_the_configuration():
    model = make_model("llama")
    config = model.config
    run = accelerate(model, make_plan(model))
    assert model.config is not config
    model.config.use_cache = False
    run.close()
    assert model.config is config
    assert config.use_cache is False
    assert config._attn_implementation == "sdpa"


def test_refusals():
    model = make_model("llama")
    plan = make_plan(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="another model"):
        accelerate(make_model("llama", seed=1), plan)
    with pytest.raises(ValueError, match="mode='fast'"):
        accelerate(model, plan, mode="fast")
    with pytest.raises(ValueError, match="impl='fast'"):
        accelerate(model, plan, impl="fast")
    with pytest.raises(ValueError, match="no attention layer"):
        accelerate(torch.nn.Linear(2, 2), plan)
    for more, match in (
        ({"plan": "my-plan"}, r"got str: .*MaskPlan\.load"),
        ({"dynamic": {"coverage": 0.9}}, "got dict; .*coverage"),
        ({"policy": "streaming"}, "policy must be .* got 'streaming'"),
    ):
        with pytest.raises(ValueError, match=match):
            accelerate(model, **more)
    assert snapshot(model) == before
    with accelerate(model, plan):
        inside = snapshot(model)
        with pytest.raises(ValueError, match="already"):
            accelerate(model, plan)
        assert snapshot(model) == inside
    assert snapshot(model) == before


def test_other_model_with_the_same_configuration_is_untouched():
    model = make_model("llama")
    other = make_model("llama", seed=3, config=model.config)
    assert other.config is model.config
    ids = random_ids(2, 21)
    before, state = logits(other, ids), snapshot(other)
    with accelerate(model, make_plan(model), mode="static"):
        assert torch.equal(logits(other, ids), before)
        assert snapshot(other) == state


def test_two_models_in_two_threads():
    models = [make_model("llama", seed=s) for s in (0, 1)]
    models[1] = make_model("llama", seed=1, config=models[0].config)
    plans = [make_plan(model, seed=s) for s, model in enumerate(models)]
    expected = [
        eager_logits(m, random_ids(2, 31, seed=s), plan=p, mode="static")
        for s, (m, p) in enumerate(zip(models, plans, strict=True))
    ]
    found: list[list[torch.Tensor]] = [[], []]

    def work(s):
        for _ in range(5):
            found[s].append(logits(models[s], random_ids(2, 31, seed=s)))

    with (
        accelerate(models[0], plans[0], mode="static") as first,
        accelerate(models[1], plans[1], mode="static") as second,
    ):
        threads = [threading.Thread(target=work, args=(s,)) for s in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for s in (0, 1):
        assert len(found[s]) == 5
        for out in found[s]:
            torch.testing.assert_close(out, expected[s], **CLOSE)
    assert first.stats()["calls"] == second.stats()["calls"] == {"prefill": 15}


@pytest.mark.parametrize("mode", ["static", "dense"])
def test_packed_documents_and_4d_masks(mode):
    model = make_model("llama")
    plan = make_plan(model)
    ids = random_ids(1, 12)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])}
    custom = {"attention_mask": torch.ones(1, 1, 12, 12).tril().bool()}
    for inputs in (packed, custom):
        with torch.no_grad():
            expected = model(ids, use_cache=False, **inputs).logits
            with accelerate(model, plan, mode=mode):
                if mode == "dense":
                    found = model(ids, use_cache=False, **inputs).logits
                    torch.testing.assert_close(found, expected, **CLOSE)
                else:
                    with pytest.raises(ValueError, match="not plain causal"):
                        model(ids, use_cache=False, **inputs)


@pytest.mark.parametrize("mode", ["static", "dense"])
def test_bidirectional_model_is_refused(mode):
    model = make_model("llama")
    model.config.is_causal = False
    with (
        accelerate(model, make_plan(model), mode=mode),
        pytest.raises(ValueError, match="not causal"),
    ):
        logits(model, random_ids(1, 12), use_cache=False)


def test_without_padding_nobody_waits_for_the_device():
    """Nothing can be read from the meta device."""
    mask = key_mask(
        batch_size=2,
        q_length=3,
        kv_length=7,
        q_offset=4,
        mask_function=causal_mask_function,
        device="meta",
    )
    assert mask.visible.device.type == "meta"
    assert mask.whole
    assert mask.padding is None
    assert mask.sequences(3) == ((4, 7), (4, 7))
    assert mask.host.tolist() == [[True] * 7] * 2


def test_mask_that_is_not_causal_is_never_left_out():
    mask = key_mask(
        batch_size=1,
        q_length=4,
        kv_length=4,
        mask_function=bidirectional_mask_function,
        allow_is_bidirectional_skip=True,
    ).mask
    assert mask.shape == (1, 1, 4, 4)
    assert mask.all()


def test_masks_that_cannot_be_honoured():
    model = make_model("llama")
    ids = random_ids(1, 6)
    holes = torch.tensor([[1, 1, 0, 0, 1, 1]])
    with accelerate(model, make_plan(model), mode="static"):
        with pytest.raises(ValueError, match="several runs"):
            logits(model, ids, holes)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="covers 1 tokens of 7"):
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1))
    with accelerate(model, make_plan(model), mode="dense"):
        found = logits(model, ids, holes)
    expected = logits(model, ids, holes)
    torch.testing.assert_close(found[holes.bool()], expected[holes.bool()], **CLOSE)


def test_an_encoder_decoder_is_refused():
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        accelerate(model)


def test_softcap_and_dropout_are_refused():
    gemma = make_model("gemma2-softcap")
    with (
        accelerate(gemma, make_plan(gemma), mode="static"),
        pytest.raises(ValueError, match=r"Gemma2Attention.*softcap"),
    ):
        gemma(random_ids(1, 5))
    model = make_model("llama", attention_dropout=0.5).train()
    with (
        accelerate(model, make_plan(model), mode="static"),
        pytest.raises(ValueError, match="dropout"),
    ):
        model(random_ids(1, 5))


def test_compiled_model_needs_an_attention_mask():
    needs(lacks_compile)
    model = make_model("llama")
    ids = random_ids(1, 20)
    mask = torch.ones_like(ids)
    compiled = torch.compile(model, backend="eager")
    with accelerate(model, make_plan(model), mode="static"), torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        found = compiled(ids, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, **CLOSE)
        with pytest.raises(ValueError, match=r"torch\.compile no attention_mask"):
            compiled(ids, use_cache=False)
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["static", "auto", "dynamic"])
def test_autocast_is_as_for_torchs_own_attention(mode):
    model = make_model("llama", initializer_range=0.05)
    plan = None if mode == "dynamic" else make_plan(model)
    settings = Dynamic(
        coverage=1, tile=8, block=8, near=8, landmarks=4, queries=4, few=12, shortest=30
    )
    ids = random_ids(1, 60)
    gradients = []
    for precision in (torch.bfloat16, None):
        model.zero_grad()
        with (
            accelerate(model, plan, mode=mode, dynamic=settings),
            torch.autocast("cpu", precision, enabled=precision is not None),
        ):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.v_proj.weight.grad.clone())
    rounded, exact = gradients
    assert (rounded - exact).norm() < 0.05 * exact.norm()
