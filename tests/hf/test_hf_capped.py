"""The cache with a hard cap: each layer against lists of tokens, and models that use it."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import make_model, random_ids
from transformers import DynamicCache

from dynmask.baselines import SlidingWindow
from dynmask.dam.evict import RECENT, importance
from dynmask.hf import accelerate
from dynmask.hf.capped import CappedLayer, Lease
from dynmask.hf.keys import KeySlots

CAP, ROOM = 160, 20
B, G, H, D = 2, 2, 4, 8


class Lists:
    """The same rule on one list of token numbers, one batch row at a time."""

    def __init__(self, q, k, v, real):
        self.q, self.k, self.v, self.real = q.double(), k.double(), v.double(), real
        self.held = [[] for _ in range(B)]
        self.slots = self.seen = 0

    def evict(self):
        for b in range(B):
            asked = [t for t in range(self.seen) if self.real[b, t]][-RECENT:]
            tokens = self.held[b]
            n, size = len(asked), len(tokens)
            true = torch.ones(1, max(n, size), dtype=torch.bool)
            of_heads = [
                importance(
                    self.q[b : b + 1, g * 2 : g * 2 + 2, asked],
                    self.k[b : b + 1, g : g + 1, tokens],
                    rows=true[:, :n],
                    slots=true[:, :size],
                    scale=D**-0.5,
                )[0].tolist()
                for g in range(G)
            ]
            score = [max(of_one) for of_one in zip(*of_heads, strict=True)]
            best = sorted(range(size), key=lambda i: -score[i])[: CAP - ROOM]
            self.held[b] = [tokens[i] for i in sorted(best)]
        self.slots = CAP - ROOM

    def call(self, count):
        if self.seen and count <= RECENT and self.slots + count > CAP:
            self.evict()
        out = torch.full((B, H, count, D), torch.nan, dtype=torch.float64)
        for i in range(count):
            t = self.seen + i
            for b in range(B):
                if not self.real[b, t]:
                    continue
                self.held[b].append(t)
                tokens = self.held[b]
                for g in range(G):
                    for h in (2 * g, 2 * g + 1):
                        p = (self.k[b, g, tokens] @ self.q[b, h, t] * D**-0.5).softmax(0)
                        out[b, h, i] = p @ self.v[b, g, tokens]
        self.seen += count
        self.slots += count
        if self.slots > CAP:
            self.evict()
        return out


def tensors(length, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, length, D), (B, G, length, D), (B, G, length, D))
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return q * 2, k, v


PREFILL = {
    "long prefill": [300, *[1] * 30, 10, 1, 200, 1],
    "short prefill": [100, *[1] * 90, 3, 1],
    "chunks": [50] * 9,
    "tokens": [1] * 190,
}


@pytest.fixture
def layer():
    """A layer as it is while its run's model calls it."""
    lease = Lease()
    lease._enter()
    yield CappedLayer(CAP, lease)
    lease._leave()


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("sizes", PREFILL.values(), ids=PREFILL)
def test_a_layer_is_its_lists(layer, sizes, padded):
    length = sum(sizes)
    q, k, v = tensors(length, len(sizes))
    real = torch.ones(B, length, dtype=torch.bool)
    if padded == "left":
        real[1, : sizes[0] // 3] = False
    elif padded == "right":
        real[1, sizes[0] // 2 : sizes[0]] = False
    if sizes[0] == 1 and padded != "none":
        pytest.skip("one token has no padding")
    lists = Lists(q, k, v, real)
    at = 0
    for size in sizes:
        span = slice(at, at + size)
        at += size
        expected = lists.call(size)
        layer.update(k[:, :, span], v[:, :, span])
        slots = KeySlots(real[:, :at])
        if layer.evicted:
            out, _ = layer.attend(q[:, :, span], slots, scale=None, impl="reference")
            of_real = real[:, None, span, None].expand_as(out)
            torch.testing.assert_close(
                out[of_real].double(), expected[of_real], rtol=2e-4, atol=2e-5
            )
        layer.settle(q[:, :, span], slots, scale=None)
        assert layer.get_seq_length() == at
        assert layer.keys.shape[2] == layer.values.shape[2] == lists.slots <= CAP
    assert layer.evicted


def ids_of(batch, length):
    return random_ids(batch, length)


def steps(model, ids, cache, sizes):
    """Logits of the tokens, given in pieces."""
    out, at = [], 0
    with torch.no_grad():
        for size in sizes:
            out.append(model(ids[:, at : at + size], past_key_values=cache).logits)
            at += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_under_the_cap_it_is_an_ordinary_cache(kind):
    model = make_model(kind)
    ids, sizes = ids_of(2, 60), [40, 15, 1, 1, 1, 1, 1]
    with accelerate(model) as run:
        expected = steps(model, ids, DynamicCache(config=model.config), sizes)
        found = steps(model, ids, run.cache(136), sizes)
    assert found.equal(expected)


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen3", "gemma3", "phi3"])
def test_memory_stops_growing_and_far_tokens_go(kind):
    model = make_model(kind)
    ids = ids_of(1, 250)
    with accelerate(model) as run:
        cache = run.cache(136)
        whole = DynamicCache(config=model.config)
        sizes = []
        for at in range(200, 250):
            start = 0 if at == 200 else at
            with torch.no_grad():
                found = model(ids[:, start : at + 1], past_key_values=cache).logits[:, -1]
                expected = model(ids[:, start : at + 1], past_key_values=whole).logits[:, -1]
            sizes.append(cache.memory())
        assert cache.get_seq_length() == 250
        assert not torch.allclose(found, expected, atol=1e-3)
        assert found.isfinite().all()
        capped = [x for x in cache.layers if isinstance(x, CappedLayer)]
        assert len(capped) == (2 if kind == "gemma3" else 3)
        assert all(x.keys.shape[2] <= 136 for x in capped)
        assert sizes[-1] <= sizes[0] * 136 / 119 + 4000
        decode = run.stats()["impl"]["decode"]
        assert any(name.startswith("capped") for name in decode)


def test_half_of_the_slots_hold_half_of_the_bytes():
    model = make_model("llama")
    ids, plain = random_ids(1, 2000), DynamicCache(config=model.config)
    with accelerate(model, mode="dense") as run, torch.no_grad():
        capped = run.cache(1000)
        for cache in (plain, capped):
            model(ids, past_key_values=cache)
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert 0.45 * whole < capped.memory() <= 0.58 * whole


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = make_model("llama")
    ids, lengths = ids_of(3, 240), (240, 200, 100)
    mask = torch.zeros(3, 240, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 240 - length if side == "left" else 0 :][:length] = 1
    ids, later = ids * mask, ids_of(3, 3)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    with accelerate(model) as run, torch.no_grad():
        together = run.cache(136)
        model(ids, attention_mask=mask, position_ids=place, past_key_values=together)
        found = model(
            later,
            attention_mask=torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1),
            position_ids=place[:, -1:] + 1 + torch.arange(3)
            if side == "left"
            else torch.tensor(lengths)[:, None] + torch.arange(3),
            past_key_values=together,
        ).logits
        for row, length in enumerate(lengths):
            real, alone = mask[row].bool(), run.cache(136)
            model(ids[row : row + 1, real], past_key_values=alone)
            expected = model(later[row : row + 1], past_key_values=alone).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=2e-4, atol=2e-4)
            assert alone.get_seq_length() == length + 3


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["beams", "sampling", "several"],
)
def test_generate_in_other_ways(how):
    model = make_model("llama")
    with accelerate(model) as run:
        out = model.generate(
            ids_of(2, 150), past_key_values=run.cache(136), max_new_tokens=20, **how
        )
    assert out.shape[1] > 150


def test_beams_move_what_is_held():
    model = make_model("llama")
    ids = ids_of(3, 150)
    order = torch.tensor([2, 0, 0])
    with accelerate(model) as run, torch.no_grad():
        one, two = run.cache(136), run.cache(136)
        model(ids, past_key_values=one)
        one.reorder_cache(order)
        model(ids[order], past_key_values=two)
        for _ in range(30):
            new = ids_of(3, 1)
            found = model(new, past_key_values=one).logits
            torch.testing.assert_close(found, model(new, past_key_values=two).logits)


def test_assisted_decoding_is_greedy_decoding():
    model, assistant = make_model("llama"), make_model("llama", seed=5, num_hidden_layers=1)
    ids = ids_of(1, 150)
    with accelerate(model) as run:
        greedy = model.generate(
            ids, past_key_values=run.cache(200), max_new_tokens=40, do_sample=False
        )
        assisted = model.generate(
            ids,
            past_key_values=run.cache(200),
            max_new_tokens=40,
            do_sample=False,
            assistant_model=assistant,
        )
    assert assisted.equal(greedy)


def test_crop_goes_back_to_where_nothing_was_given_up_since():
    model = make_model("llama")
    ids, question = ids_of(1, 200), ids_of(1, 9)
    with accelerate(model) as run, torch.no_grad():
        cache = run.cache(160)
        model(ids, past_key_values=cache)
        first = model(question, past_key_values=cache).logits
        cache.crop(-9)
        assert cache.get_seq_length() == 200
        assert model(question, past_key_values=cache).logits.equal(first)
        with pytest.raises(ValueError, match=r"last 10 tokens .* max_cache_tokens than 160"):
            cache.crop(-10)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = [model(x, past_key_values=cache).logits for x in (ids, question)]
        assert again[1].equal(first)


def test_copies_share_the_run_and_not_their_tokens():
    model = make_model("llama")
    with accelerate(model) as run, torch.no_grad():
        cache = run.cache(136)
        model(ids_of(1, 150), past_key_values=cache)
        other = copy.deepcopy(cache)
        model(ids_of(1, 1), past_key_values=other)
        assert (cache.get_seq_length(), other.get_seq_length()) == (150, 151)
    with pytest.raises(ValueError, match=r"run\.cache"):
        model(ids_of(1, 1), past_key_values=other)


def test_refusals():
    model = make_model("llama")
    with accelerate(model) as run:
        for wrong in (135, 0, -1, 200.0):
            with pytest.raises(ValueError, match=r"max_cache_tokens=.* at least 136"):
                run.cache(wrong)
        mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
        with pytest.raises(ValueError, match="2-d attention_mask"):
            model(ids_of(1, 9), attention_mask=mask, past_key_values=run.cache(136))
    with pytest.raises(ValueError, match="closed"):
        run.cache(136)
    with (
        accelerate(model, policy=SlidingWindow()) as run,
        pytest.raises(ValueError, match="'window' chooses"),
    ):
        run.cache(136)


def test_crop_before_anything_was_given_up(layer):
    q, k, v = tensors(50, 1)
    layer.update(k, v)
    layer.settle(q, KeySlots(torch.ones(B, 50, dtype=torch.bool)), scale=None)
    layer.crop(0)
    assert layer.get_seq_length() == 50
    layer.crop(-5)
    assert layer.get_seq_length() == layer.keys.shape[2] == 45
