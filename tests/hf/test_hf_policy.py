"""Models under the masks of other methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hf_models import make_model, make_plan, random_ids
from transformers import DynamicCache

from dynmask.baselines import (
    H2O,
    InfLLM,
    Policy,
    Quest,
    Selector,
    SlidingWindow,
    SnapKV,
    StreamingLLM,
    TopK,
    TopP,
)
from dynmask.hf import accelerate
from dynmask.masks import Lifetimes
from dynmask.masks.lifetimes import NEVER

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
KINDS = ["llama", "llama-mha", "qwen3", "phi3"]


@dataclass(frozen=True)
class Marks(Policy):
    """Every call hides keys by a rule of head and call, so that mixed-up state shows."""

    per_head: bool = False
    batches: bool = True

    name: ClassVar[str] = "marks"
    paper: ClassVar[str] = ""
    selects: ClassVar[str] = "every third key, another third for each head"
    stages: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def selector(self, layer, layers):
        selector = _Marks()
        selector.per_head, selector.batched, selector.layer = self.per_head, self.batches, layer
        assert layers == 3
        return selector


class _Marks(Selector):
    def choose(self, q, k, state, *, scale):
        assert self.batched or len(q) == 1
        heads = q.shape[1] if self.per_head else k.shape[1]
        seen = (0 if state is None else state) + q.shape[2]
        assert seen == k.shape[2]
        slot, head = torch.arange(seen), torch.arange(heads)[:, None]
        hidden = ((slot + head + self.layer) % 3 == 0)[None]
        return Lifetimes(torch.where(hidden, slot + 2, NEVER).int().repeat(len(q), 1, 1)), seen


def own_logits(model, ids, mask=None):
    """The model's logits under a ``[B, 1, Q, K]`` bool mask, through transformers' sdpa."""
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def windowed(length, window, sinks):
    row, key = torch.arange(length)[:, None], torch.arange(length)
    return ((key <= row) & ((row - key < window) | (key < sinks)))[None, None]


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_backend_for_masks_leaves_calls_without_one_to_others(impl):
    model, ids = make_model("llama"), random_ids(1, 33)
    expected = own_logits(model, ids)
    with accelerate(model, policy=SnapKV(cap=20, window=4), impl=impl) as run:
        torch.testing.assert_close(own_logits(model, ids), expected, **CLOSE)
    assert run.stats()["impl"]["prefill"] == {"snapkv sdpa": 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [SlidingWindow(5), StreamingLLM(4, 3)], ids=lambda p: p.name)
def test_logits_are_those_of_the_dense_mask(kind, policy):
    model = make_model(kind)
    ids = random_ids(2, 33)
    mask = windowed(33, policy.window, getattr(policy, "sinks", 0))
    expected = own_logits(model, ids, mask.expand(2, -1, -1, -1))
    with accelerate(model, policy=policy) as run:
        torch.testing.assert_close(own_logits(model, ids), expected, **CLOSE)
    assert (own_logits(model, ids) - expected).abs().max() > 0.01
    stats = run.stats()
    assert stats["mode"] == policy.name
    assert stats["density"]["prefill"] == pytest.approx(mask.sum().item() / (33 * 34 / 2))
    assert all(name.startswith(policy.name) for name in stats["impl"]["prefill"])


@pytest.mark.parametrize("per_head", [False, True], ids=["kv heads", "query heads"])
@pytest.mark.parametrize("batches", [False, True], ids=["rows apart", "rows together"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(per_head, batches, side):
    model = make_model("llama")
    lengths, size = (33, 20, 1), 33
    ids, mask = random_ids(3, size), torch.zeros(3, size, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, size - length if side == "left" else 0 :][:length] = 1
    ids = ids * mask
    place = (mask.cumsum(1) - 1).clamp_min(0)
    policy = Marks(per_head, batches)
    with accelerate(model, policy=policy), torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=place).logits
        for row in range(3):
            real = mask[row].bool()
            alone = own_logits(model, ids[row : row + 1, real])
            torch.testing.assert_close(found[row : row + 1, real], alone, **CLOSE)


@pytest.mark.parametrize("per_head", [False, True], ids=["kv heads", "query heads"])
@pytest.mark.parametrize("batches", [False, True], ids=["rows apart", "rows together"])
def test_chunks_and_rows_go_on_and_a_cropped_cache_goes_back(per_head, batches):
    model = make_model("llama")
    ids = random_ids(2, 31)
    with accelerate(model, policy=Marks(per_head, batches)), torch.no_grad():
        expected = own_logits(model, ids)
        cache = DynamicCache(config=model.config)
        out = [model(ids[:, :20], past_key_values=cache).logits]
        for _ in range(2):  # The second time from where the prefill ended.
            later = [model(ids[:, 20:27], past_key_values=cache).logits]
            later += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(27, 31)]
            torch.testing.assert_close(torch.cat(out + later, 1), expected, **CLOSE)
            cache.crop(-11)
        cache.crop(-5)
        with pytest.raises(ValueError, match="begins at token 15"):
            model(ids[:, 15:16], past_key_values=cache)


REMEMBERS = [
    H2O(heavy=3, recent=4),
    Quest(budget=16, dense_layers=0),
    TopP(0.5, bits=4),
    InfLLM(init=0, local=6, block=4, top=1, chunk=4, representatives=1),
]


@pytest.mark.parametrize("policy", REMEMBERS, ids=lambda p: p.name)
def test_beams_are_refused_to_methods_that_remember(policy):
    model = make_model("llama")
    with (
        accelerate(model, policy=policy),
        pytest.raises(ValueError, match="rows of the batch are not those"),
    ):
        model.generate(random_ids(1, 20), max_new_tokens=20, num_beams=4, do_sample=False)


@pytest.mark.parametrize("policy", REMEMBERS, ids=lambda p: p.name)
def test_more_rows_than_in_the_call_before_are_refused(policy):
    model, ids = make_model("llama"), random_ids(1, 20)
    cache = DynamicCache(config=model.config)
    with accelerate(model, policy=policy), torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(3)
        with pytest.raises(ValueError, match="rows of the batch are not those"):
            model(ids[:, :1].expand(3, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "policy",
    [TopK(5), TopP(0.5, bits=None), SnapKV(cap=8, window=4, kernel=3)],
    ids=lambda p: p.name,
)
def test_beams_score_what_their_tokens_score_alone(policy):
    model, ids, new = make_model("llama"), random_ids(1, 20), 12
    with accelerate(model, policy=policy), torch.no_grad():
        found = model.generate(
            ids,
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens, cache, total = found.sequences[:, 20:], DynamicCache(config=model.config), 0.0
        out = model(ids, past_key_values=cache).logits[:, -1]
        for i in range(new):
            scores = out.log_softmax(-1)
            if i < new - 1:  # As generate does for min_new_tokens.
                scores[:, model.generation_config.eos_token_id] = -torch.inf
            total += scores[0, tokens[0, i]].item()
            out = model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1]
    assert found.sequences_scores[0].item() * new == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("policy", [SlidingWindow(5), TopK(5)], ids=lambda p: p.name)
def test_methods_without_memory_take_tokens_back(policy):
    model, ids = make_model("llama"), random_ids(1, 20).repeat(1, 2)
    with accelerate(model, policy=policy), torch.no_grad():
        greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
        guessed = model.generate(
            ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(guessed, greedy)


def test_rows_one_by_one_do_not_pile_up():
    model = make_model("llama")
    with accelerate(model, policy=Marks()) as run:
        model.generate(random_ids(1, 9), max_new_tokens=12, do_sample=False)
        selector = run._attached[0].policy._selectors[None]
        assert len(selector._ends) == 3
    assert set(run.stats()["density"]) >= {"prefill", "decode"}


def test_chunks_do_not_pile_up_and_the_last_ones_can_be_gone_back_to():
    model, ids = make_model("llama"), random_ids(1, 60)
    with accelerate(model, policy=Marks()) as run, torch.no_grad():
        expected = own_logits(model, ids)
        cache = DynamicCache(config=model.config)
        for part in ids.split(3, 1):
            model(part, past_key_values=cache)
        ends = run._attached[0].policy._selectors[None]._ends
        assert [end.at for end in ends] == [0, *range(39, 61, 3)]
        cache.crop(-6)
        later = model(ids[:, 54:], past_key_values=cache).logits
        torch.testing.assert_close(later, expected[:, 54:], **CLOSE)


def test_gradients_reach_the_model():
    model = make_model("llama")
    with accelerate(model, policy=SlidingWindow(5)):
        model(random_ids(1, 12)).logits.sum().backward()
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())


@pytest.mark.parametrize(
    "beside",
    [{"coverage": 0.9}, {"mode": "dense"}, {"plan": True}],
    ids=["coverage", "mode", "plan"],
)
def test_a_policy_runs_alone(beside):
    model = make_model("llama")
    if "plan" in beside:
        beside = {"plan": make_plan(model)}
    with pytest.raises(ValueError, match=f"'window' runs alone: leave out {next(iter(beside))}"):
        accelerate(model, policy=SlidingWindow(), **beside)


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: SlidingWindow(0), "window"), (lambda: StreamingLLM(3, -1), "sinks")],
    ids=["window", "sinks"],
)
def test_settings_out_of_range_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
