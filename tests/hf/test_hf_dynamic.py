"""Models under dynamic masks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hf_models import make_model, make_plan, padded, random_ids, snapshot
from transformers import DynamicCache, StaticCache

from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.hf import accelerate
from dynmask.hf.dynamic import LayerPolicy, LongCall
from dynmask.hf.keys import KeySlots
from dynmask.hf.tally import Tally
from dynmask.masks import Stripes
from dynmask.ops import attention

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
SMALL = Dynamic(coverage=0.5, tile=8, block=4, near=4, landmarks=2, few=1, shortest=24)


def logits(model, ids, mask=None, **kwargs):
    if mask is not None:
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, **kwargs).logits


def with_gate(plan, gate):
    layers = {
        index: dataclasses.replace(layer, gate=torch.tensor(gate))
        for index, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


@pytest.mark.parametrize("mode", ["auto", "dynamic"])
@pytest.mark.parametrize("planned", [False, True], ids=["bare", "plan"])
def test_full_coverage_gives_the_models_own_logits(kind, mode, planned):
    model = make_model(kind)
    plan = with_gate(make_plan(model), [True] * 4) if planned else None
    ids = random_ids(2, 61)
    expected = logits(model, ids)
    settings = dataclasses.replace(SMALL, coverage=1.0)
    with accelerate(model, plan, mode=mode, dynamic=settings) as run:
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    stats = run.stats()
    own = 1 if kind == "gemma3" else 0
    assert stats["layers"] == {"attached": 3, "sparse": 3 - own, "dense": 0, "own window": own}
    assert stats["impl"]["prefill"]["dynamic cpu"] == 3 - own
    assert stats["density"]["prefill"] == 1
    assert stats["computed_density"]["prefill"] > 1
    assert stats["mask_seconds"] > 0


def test_low_coverage_hides_pairs_and_changes_logits(kind):
    model = make_model(kind)
    ids = random_ids(2, 61)
    expected = logits(model, ids)
    with accelerate(model, dynamic=SMALL) as run:
        found = logits(model, ids)
    assert found.isfinite().all()
    assert not torch.allclose(found, expected, atol=1e-2)
    stats = run.stats()
    assert 0.1 < stats["density"]["prefill"] < 0.95
    assert stats["computed_density"]["prefill"] >= stats["density"]["prefill"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("planned", [False, True], ids=["bare", "plan"])
def test_padding_changes_nothing(kind, side, planned):
    model = make_model(kind)
    # One key head static, one dynamic (all static or dynamic where every head has its own key).
    plan = with_gate(make_plan(model), [False, False, True, True]) if planned else None
    lengths = (50, 9, 61, 1, 0, 24)
    ids, mask = padded(side, lengths, 61)
    with accelerate(model, plan, dynamic=SMALL) as run:
        found = logits(model, ids, mask)
        assert found.isfinite().all()
        assert any("dynamic" in name for name in run.stats()["impl"]["prefill"])
        for row, length in enumerate(lengths):
            if length:
                alone = logits(model, ids[row][mask[row].bool()][None])
                torch.testing.assert_close(found[row][mask[row].bool()], alone[0], **CLOSE)


def test_a_batch_of_padding_alone():
    model = make_model("llama")
    ids, mask = padded("left", (0, 0), 40)
    with accelerate(model, dynamic=SMALL):
        assert logits(model, ids, mask).isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "steps", [[32, 1, 1, 1], [24, 8, 29], [40, 3, 8]], ids=["decode", "chunks", "short-chunk"]
)
def test_cached_calls(kind, cache, steps):
    """Chunks that end where tiles do, and short ones, which look at everything, as decode does."""
    model = make_model(kind)
    size = sum(steps)
    ids = random_ids(2, size)
    settings = dataclasses.replace(SMALL, few=4, coverage=1.0 if 3 in steps or 1 in steps else 0.5)
    if steps == [24, 8, 29]:
        settings = dataclasses.replace(settings, few=1)
    with accelerate(model, dynamic=settings) as run:
        whole = logits(model, ids)
        if cache == "static":
            past = StaticCache(config=model.config, max_cache_len=80)
        else:
            past = DynamicCache(config=model.config)
        parts, at = [], 0
        for step in steps:
            with torch.no_grad():
                out = model(
                    ids[:, at : at + step],
                    attention_mask=torch.ones(2, at + step, dtype=torch.long),
                    past_key_values=past,
                    use_cache=True,
                )
            parts.append(out.logits)
            at += step
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    impl = run.stats()["impl"]
    layers = 2 if kind == "gemma3" else 3
    if steps == [24, 8, 29]:
        assert impl["chunk"]["dynamic cpu"] == 2 * layers
    else:
        assert impl["chunk" if 3 in steps else "decode"]["transformers sdpa"] > 0


def test_static_heads_run_on_stripes_and_the_others_dynamic():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 50, 8) * 2, torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    streaming = Stripes.streaming(4, sinks=2, window=5)
    # Head 3 is dense by the gate, so its key head's other query head goes with it.
    stripes = dataclasses.replace(streaming, full_heads=torch.tensor([False, False, False, True]))
    tally = Tally()
    call = LongCall(LayerPolicy(SMALL, stripes), "prefill", scale=None, impl="auto", tally=tally)
    out, name = call.attend(q, k, v, KeySlots(torch.ones(2, 50, dtype=torch.bool)))
    assert name.startswith("dynamic cpu, static ")
    dynamic, ran = dynamic_attention(q[:, 2:], k[:, 1:], v[:, 1:], SMALL)
    static = attention(q, k, v, streaming, impl="reference")
    torch.testing.assert_close(out[:, 2:], dynamic)
    torch.testing.assert_close(out[:, :2], static[:, :2])
    shown = int(ran.shown) + 2 * int(streaming.visible_pairs(50)[0, :2].sum())
    assert tally.summary()["density"]["prefill"] == pytest.approx(shown / (8 * 50 * 51 // 2))


@pytest.mark.parametrize("impl", ["cpu", "sdpa", "reference"])
def test_explicit_impl_runs_and_is_reported(impl):
    model = make_model("llama")
    ids, mask = padded("left", (30, 61), 61)
    with accelerate(model, dynamic=SMALL):
        expected = logits(model, ids, mask)
    with accelerate(model, dynamic=SMALL, impl=impl) as run:
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    assert run.stats()["impl"]["prefill"] == {f"dynamic {impl}": 3}


def test_short_calls_are_the_models_own():
    model = make_model("llama")
    ids = random_ids(2, 23)
    expected = logits(model, ids)
    with accelerate(model, dynamic=SMALL) as run:
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    assert run.stats()["impl"]["prefill"] == {"transformers sdpa": 3}
    assert run.stats()["density"]["prefill"] == 1


def test_generation_left_padded_equals_one_by_one():
    model = make_model("llama")
    ids, mask = padded("left", (45, 12, 50), 50)

    def generate(ids, mask):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        return out[:, ids.shape[1] :]

    with accelerate(model, dynamic=SMALL):
        together = generate(ids, mask)
        for row, length in enumerate((45, 12, 50)):
            one = ids[row : row + 1, 50 - length :]
            assert torch.equal(generate(one, torch.ones_like(one))[0], together[row])


def test_coverage_is_the_quality_asked_for():
    model = make_model("llama")
    ids = random_ids(1, 120)
    expected = logits(model, ids)
    errors, densities = [], []
    for coverage in (0.3, 0.9, 0.999):
        with accelerate(model, coverage=coverage, dynamic=SMALL) as run:
            errors.append(float((logits(model, ids) - expected).norm()))
        densities.append(run.stats()["density"]["prefill"])
    assert errors == sorted(errors, reverse=True)
    assert densities == sorted(densities)
    plan = make_plan(model)
    with accelerate(model, plan) as run:  # The plan's own target is that of its gate.
        policy = run._attached[0].dynamic
        assert policy is not None
        assert policy.settings == Dynamic()
    # A new target moves the plan's gate too: 1 is above every head's coverage.
    with accelerate(model, plan, coverage=1.0) as run:
        policy = run._attached[0].dynamic
        assert policy is not None
        assert bool(policy.every.stripes.full_heads.all())


def test_refusals_and_the_model_given_back():
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="needs a plan"):
        accelerate(model, mode="static")
    with pytest.raises(ValueError, match="mode='fast'"):
        accelerate(model, mode="fast")
    with pytest.raises(ValueError, match=r"coverage=1\.5"):
        accelerate(model, coverage=1.5)
    with pytest.raises(ValueError, match="impl='fast'"):
        accelerate(model, impl="fast")
    with accelerate(model, dynamic=SMALL):
        packed = torch.arange(30).remainder(15)[None]
        with pytest.raises(ValueError, match="not plain causal"):
            model(random_ids(1, 30), position_ids=packed, use_cache=False)
    assert snapshot(model) == before
    dropping = make_model("llama", attention_dropout=0.5).train()
    with accelerate(dropping, dynamic=SMALL), pytest.raises(ValueError, match="dropout"):
        dropping(random_ids(1, 30))


def test_dense_mode_without_a_plan_is_the_model():
    model = make_model("llama")
    ids = random_ids(2, 40)
    expected = logits(model, ids)
    with accelerate(model, mode="dense") as run:
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    assert run.stats()["impl"]["prefill"] == {"transformers sdpa": 3}


def test_an_accelerated_model_is_not_copied():
    model = make_model("llama")
    with accelerate(model, dynamic=SMALL), pytest.raises(ValueError, match="before the with block"):
        copy.deepcopy(model)
    assert logits(copy.deepcopy(model), random_ids(1, 9)).isfinite().all()


def test_a_closed_run_is_not_entered_again():
    run = accelerate(make_model("llama"), dynamic=SMALL)
    run.close()
    with pytest.raises(ValueError, match="call accelerate again"), run:
        pass


def test_what_is_no_model_for_it_is_named():
    with pytest.raises(ValueError, match="loaded model, got str"):
        accelerate("gpt2")


def test_what_makes_calls_dense_is_said_once(caplog):
    model, ids = make_model("llama"), random_ids(2, 61)
    holes = torch.ones_like(ids)
    holes[1, 20:30] = 0
    with accelerate(model, dynamic=SMALL) as run:
        for _ in range(2):
            expected = logits(model, ids, holes)
        assert set(run.stats()["impl"]["prefill"]) == {"transformers sdpa"}
        assert [r.message.split(":")[0] for r in caplog.records] == [
            "attention_mask has holes between a row's tokens"
        ]
        model(ids)
        assert "gradients are on" in caplog.records[-1].message
        caplog.clear()
        logits(model, ids)
        model(ids)
        assert not caplog.records
    real = holes[..., None].bool().expand_as(expected)
    found = logits(model, ids, holes)
    torch.testing.assert_close(found[real], expected[real], **CLOSE)
