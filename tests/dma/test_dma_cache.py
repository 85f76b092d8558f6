"""LifetimeCache: against everything at once, and through transformers' own generation."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_cases import naive_attention
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynmask.dma.cache import LifetimeCache
from dynmask.masks import Lifetimes
from dynmask.ops import attention
from dynmask.ops.bounded_rules import admitted, ending_with, select

G, D, KEEP = 2, 8, 6


def tokens(count, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, G, count, D, generator=g)
    return k, v, torch.randn(batch, G, count, generator=g)


def queries(count, batch=2):
    g = torch.Generator().manual_seed(9)
    return torch.randn(batch, 2 * G, count, D, generator=g)


def part(given, start, stop):
    return tuple(t[:, :, start:stop] for t in given)


def give(cache, given, start, stop, *, keep=KEEP, layers=1, q=None, **options):
    """Give tokens to all layers; the last one's output, if there are queries."""
    for layer in range(layers):
        k, v, bias, mask = cache.extend(*part(given, start, stop), layer, keep=keep, **options)
    return None if q is None else attention(q[:, :, start:stop], k, v, mask, bias=bias)


def whole(given, q, *, keep=KEEP, threshold=None, present=None):
    """Everything in one pass, in float64."""
    shown = admitted(given[2], present, threshold)
    mask = select(given[2], given[2].shape[2] if keep is None else keep, shown)
    mask = ending_with(present, mask, 0)
    return naive_attention(q, given[0], given[1], mask.dense(q.shape[2]), given[2])


SPLITS = {
    "prompt, then tokens": (13, 14, 15, 16, 20),
    "tokens": tuple(range(1, 21)),
    "short prompt": (3, 4, 5, 6, 7, 8, 20),
    "to the brim": (6, 7, 20),
    "chunks": (5, 12, 19, 20),
}


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("keep", [1, KEEP, 100, None])
@pytest.mark.parametrize("threshold", [None, 0.3], ids=["all", "threshold"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_outputs_are_those_of_one_pass(splits, keep, threshold, side):
    given, q = tokens(20), queries(20)
    present = None
    if side is not None:
        present = torch.ones(2, 20, dtype=torch.bool)
        # Right padding is in the prompt, before what is generated.
        present[1, slice(9) if side == "left" else slice(splits[0] - 3, splits[0])] = False
    truth = whole(given, q, keep=keep, threshold=threshold, present=present)
    cache, start = LifetimeCache(), 0
    for stop in splits:
        now = None if present is None else present[:, start:stop]
        out = give(cache, given, start, stop, q=q, keep=keep, threshold=threshold, present=now)
        real = torch.ones(2, stop - start, dtype=torch.bool) if now is None else now
        got, want = (t.transpose(1, 2)[real] for t in (out, truth[:, :, start:stop]))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        start = stop
        assert cache.get_seq_length() == stop
        assert cache.get_mask_sizes(3, 0) == (stop + 3, 0)


@pytest.mark.parametrize("keep", [KEEP, 100, None])
@pytest.mark.parametrize("run", [slice(4, 10), slice(0, 7), slice(0, 0)], ids=str)
def test_rows_of_padding_give_0(keep, run):
    given, q = tokens(10), queries(10)
    present = torch.zeros(2, 10, dtype=torch.bool)
    present[:, run] = True
    out = give(LifetimeCache(), given, 0, 10, q=q, keep=keep, present=present)
    assert torch.equal((out != 0).any(-1).any(1), present)


def test_memory_stops_growing():
    given = tokens(64)
    sizes = []
    cache = LifetimeCache()
    for stop in range(8, 65, 8):
        give(cache, given, stop - 8, stop, layers=2)
        sizes.append(cache.memory())
    assert len(set(sizes)) == 1
    assert sizes[0] == 2 * 2 * G * KEEP * (2 * 4 * D + 12)
    growing = LifetimeCache()
    give(growing, given, 0, 64, keep=None)
    assert growing.memory() == 2 * G * 64 * (2 * 4 * D + 4)


def test_short_texts_take_no_more_than_their_tokens():
    cache = LifetimeCache()
    give(cache, tokens(10), 0, 10, keep=1 << 40)
    assert cache.memory() == 2 * G * 10 * (2 * 4 * D + 4)


def test_fp32_bits_are_those_of_the_whole_cache():
    given, q = tokens(60), queries(60)
    cache, start = LifetimeCache(), 0
    for stop in (20, 21, 22, 40, 41, 60):
        k, v, bias, mask = cache.extend(*part(given, start, stop), 0, keep=KEEP)
        got = attention(q[:, :, start:stop], k, v, mask, bias=bias, impl="cpu")
        all_k, all_v, all_score = part(given, 0, stop)
        everything = Lifetimes.top(all_score, keep=KEEP)
        want = attention(q[:, :, start:stop], all_k, all_v, everything, bias=all_score, impl="cpu")
        assert torch.equal(got, want)
        start = stop


# What generation does to a cache.


def same(cache, other, given, q, start, stop, keep=KEEP):
    out = give(cache, given, start, stop, q=q, keep=keep)
    torch.testing.assert_close(out, give(other, given, start, stop, q=q, keep=keep))


@pytest.mark.parametrize("filled", [4, 15])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False])), [0]),
    ],
    ids=["reorder", "repeat", "select", "select by bool"],
)
@pytest.mark.parametrize("recording", [False, True])
def test_batch_rows_follow(filled, change, rows, recording):
    given, q = tokens(20), queries(20)
    cache, expected = LifetimeCache(), LifetimeCache()
    give(cache, given, 0, filled - 2, layers=2)
    if recording:
        cache.activate_past_recording()
    give(cache, given, filled - 2, filled, layers=2)
    change(cache)
    moved = tuple(t[rows] for t in given)
    give(expected, moved, 0, filled, layers=2)
    for layer in range(2):
        k, v, bias, mask = cache.extend(*part(moved, filled, 20), layer, keep=KEEP)
        out = attention(q[rows, :, filled:], k, v, mask, bias=bias)
        k, v, bias, mask = expected.extend(*part(moved, filled, 20), layer, keep=KEEP)
        torch.testing.assert_close(out, attention(q[rows, :, filled:], k, v, mask, bias=bias))


@pytest.mark.parametrize("keep", [KEEP, None])
@pytest.mark.parametrize("filled", [3, 5, 15])
@pytest.mark.parametrize("removed", [0, 1, 3])
def test_crop_after_recording_leaves_no_trace(filled, removed, keep):
    given, q = tokens(30), queries(30)
    cache, expected = LifetimeCache(), LifetimeCache()
    wrong = tokens(30, seed=5)
    cache.activate_past_recording()
    give(cache, given, 0, filled, keep=keep)
    cache.crop(0)
    for _ in range(2):  # Several passes, as an assistant makes them, then back.
        give(cache, given, filled, filled + 1, keep=keep)
        for _ in range(removed):
            give(cache, wrong, 7, 8, keep=keep)
        cache.crop(-removed)
        filled += 1
        assert cache.get_seq_length() == filled
    give(expected, given, 0, filled, keep=keep)
    same(cache, expected, given, q, filled, filled + 4, keep)
    cache.layers[0].record_past = False
    same(cache, expected, given, q, filled + 4, filled + 5, keep)
    same(cache, expected, given, q, filled + 5, 30, keep)
    assert cache.memory() == expected.memory()


def test_crop_ends_what_recording_holds():
    given = tokens(40)
    cache = LifetimeCache()
    cache.activate_past_recording()
    sizes = []
    for start in range(0, 40, 4):
        give(cache, given, start, start + 4)
        cache.crop(-1)
        sizes.append(cache.memory())
    assert len(set(sizes[2:])) == 1


def test_crop_without_recording():
    given, q = tokens(30), queries(30)
    cache, expected = LifetimeCache(), LifetimeCache()
    give(cache, given, 0, 5)
    cache.crop(-2)
    give(expected, given, 0, 3)
    same(cache, expected, given, q, 3, 6)
    same(cache, expected, given, q, 6, 9)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="get_seq_length"):
        cache.crop(4)
    with pytest.raises(ValueError, match="of 9"):
        cache.crop(-10)
    cache.crop(0)
    same(cache, before, given, q, 9, 12)
    LifetimeCache().crop(0)


def test_crop_of_one_layer_that_cannot_changes_none():
    given = tokens(8)
    cache = LifetimeCache()
    for layer, keep in enumerate((None, KEEP)):
        cache.extend(*given, layer, keep=keep)
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]


def test_crop_to_nothing():
    given, q = tokens(12), queries(12)
    cache = LifetimeCache()
    give(cache, given, 0, 4)
    cache.crop(-4)
    assert cache.get_seq_length() == 0
    same(cache, LifetimeCache(), given, q, 0, 12)


def test_reset_and_reuse_with_another_batch():
    cache = LifetimeCache()
    give(cache, tokens(20), 0, 20, layers=2)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory() == 0
    other, q = tokens(20, batch=3), queries(20, batch=3)
    same(cache, LifetimeCache(), other, q, 0, 20, keep=4)


def test_copies_are_independent():
    given, q = tokens(20), queries(20)
    cache = LifetimeCache()
    give(cache, given, 0, 12)
    prompt = copy.deepcopy(cache)
    give(cache, given, 12, 20)
    expected = LifetimeCache()
    give(expected, given, 0, 12)
    same(prompt, expected, given, q, 12, 20)


@pytest.mark.parametrize("filled", [4, 15])
def test_layers_move_to_the_cpu_and_back(filled):
    given, q = tokens(20), queries(20)
    cache, expected = LifetimeCache(), LifetimeCache()
    for each in (cache, expected):
        give(each, given, 0, filled)
    cache.offload(0)
    cache.layers[0].prefetch()
    same(cache, expected, given, q, filled, 20)


def test_inference_mode_can_be_left():
    given, q = tokens(20), queries(20)
    cache, expected = LifetimeCache(), LifetimeCache()
    with torch.inference_mode():
        give(cache, given, 0, 9)
        cache.reorder_cache(torch.tensor([0, 1]))
    give(expected, given, 0, 9)
    same(cache, expected, given, q, 9, 10)
    same(cache, expected, given, q, 10, 20)


def test_gradients_flow_while_all_tokens_are_held_and_raise_beyond():
    given = [t.requires_grad_() for t in tokens(20)]
    q = queries(20)
    cache = LifetimeCache()
    give(cache, given, 0, 4)
    out = give(cache, given, 4, 6, q=q)
    mine = torch.autograd.grad(out.sum(), given)
    expected = LifetimeCache()
    out = give(expected, given, 0, 6, q=q)[:, :, 4:]
    torch.testing.assert_close(mine, torch.autograd.grad(out.sum(), given))
    give(cache, given, 6, 8)
    for stop in (9, 20):
        out = give(cache, given, stop - 1, stop, q=q)
        with pytest.raises(ValueError, match="one call"):
            out.sum().backward()


# Wrong use.


def test_update_without_a_score_names_extend():
    k, v, _ = tokens(3)
    with pytest.raises(ValueError, match="extend"):
        LifetimeCache().update(k, v, 0)
    cache = LifetimeCache()
    give(cache, tokens(3), 0, 3)
    with pytest.raises(ValueError, match="extend"):
        cache.layers[0].update(k, v)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("filled", [3, 15])
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t[:1], {}, "batch size"),
        (lambda t: t[:, :1], {}, "another model"),
        (lambda t: t[..., :4] if t.dim() == 4 else t, {}, "another model"),
        (lambda t: t.half(), {}, "another model"),
        (lambda t: t, {"keep": 7}, "keep=7"),
        (lambda t: t, {"keep": None}, "keep=None"),
        (lambda t: t, {"threshold": 0.1}, "threshold=0.1"),
        (lambda t: t, {"present": torch.ones(2, 3, dtype=torch.bool)}, r"\[2, 1\]"),
        (lambda t: t, {"present": torch.ones(2, 1)}, "attention_mask"),
        (lambda t: t[:, :, :0], {}, "Q >= 1"),
    ],
    ids=["batch", "heads", "dim", "dtype", "keep", "all", "threshold", "wide", "float", "none"],
)
def test_what_does_not_fit_is_refused_and_nothing_lost(filled, change, options, message):
    given, q = tokens(20), queries(20)
    cache, expected = LifetimeCache(), LifetimeCache()
    for each in (cache, expected):
        give(each, given, 0, filled)
    with pytest.raises(ValueError, match=message):
        cache.extend(
            *(change(t[:, :, filled : filled + 1]) for t in given), 0, **{"keep": KEEP, **options}
        )
    same(cache, expected, given, q, filled, 20)


def test_a_cache_of_another_model_is_refused():
    given = tokens(20)
    cache = LifetimeCache(Config())
    with pytest.raises(ValueError, match="made for 2 layers"):
        cache.extend(*given, 2, keep=KEEP)
    cache = LifetimeCache()
    give(cache, given, 0, 5, layers=3)
    cache.extend(*part(given, 5, 6), 0, keep=KEEP)
    cache.extend(*part(given, 5, 6), 1, keep=KEEP)
    with pytest.raises(ValueError, match="another model"):  # It has two layers.
        cache.extend(*part(given, 6, 7), 0, keep=KEEP)
    cache = LifetimeCache()
    give(cache, given, 0, 5, layers=2)
    give(cache, given, 5, 6, layers=2)
    with pytest.raises(ValueError, match="another model"):  # It has three.
        cache.extend(*part(given, 5, 6), 2, keep=KEEP)


def test_batch_and_shape_can_be_fixed_ahead():
    given, q = tokens(20), queries(20)
    cache = LifetimeCache(Config())
    cache.early_initialization(2, G, D, torch.float32, "cpu")
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    other = tokens(20, batch=3)
    with pytest.raises(ValueError, match="batch size"):
        cache.extend(*other, 0, keep=KEEP)
    same(cache, LifetimeCache(), given, q, 0, 20)


def test_keep_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        LifetimeCache().extend(*tokens(3), 0, keep=0)


# Through transformers' generation.


class Config(PreTrainedConfig):
    model_type = "dynmask_cache_test"

    def __init__(self, **kwargs):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = 16, 2, 29
        super().__init__(**{"pad_token_id": 0, "eos_token_id": 28, **kwargs})


class Layer(nn.Module):
    def __init__(self, size, index):
        super().__init__()
        self.index = index
        self.q, self.k, self.v = (nn.Linear(size, n * 4) for n in (4, 2, 2))
        self.score, self.out = nn.Linear(size, 2), nn.Linear(16, size)

    def forward(self, x, real, cache):
        heads = [f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        q, k, v = heads
        score = self.score(x).transpose(1, 2) * 3
        present = None if real is None else real[:, -x.shape[1] :]
        if cache is None:
            mask = ending_with(present, select(score, KEEP, admitted(score, present, None)), 0)
        else:
            k, v, score, mask = cache.extend(k, v, score, self.index, keep=KEEP, present=present)
        out = attention(q, k, v, mask, bias=score)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(PreTrainedModel, GenerationMixin):
    """Two layers without positions, so that left padding moves nothing."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [Layer(config.hidden_size, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        if generation_config.is_assistant and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LifetimeCache()
            model_kwargs["past_key_values"].activate_past_recording()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        x = self.embed(input_ids)
        real = None if attention_mask is None else attention_mask.bool()
        for layer in self.layers:
            x = layer(x, real, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)


def model(seed=0):
    torch.manual_seed(seed)
    made = Model(Config()).eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


ids = torch.randint(1, 28, (2, 11), generator=torch.Generator().manual_seed(1))
mask = torch.ones(2, 11, dtype=torch.int64)
mask[0, :5] = 0
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 4},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


def generate(made, inputs, attention_mask, cache, **options):
    torch.manual_seed(3)
    given = {"attention_mask": attention_mask}
    if cache is None:
        options.pop("prefill_chunk_size", None)
        options["use_cache"] = False
    else:
        given["past_key_values"] = cache
    config = GenerationConfig(max_new_tokens=24, pad_token_id=0, eos_token_id=28, **options)
    return made.generate(inputs, generation_config=config, **given)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "config"])
def test_generation_gives_the_tokens_of_no_cache(options, lazy):
    made = model()
    cache = LifetimeCache(None if lazy else made.config)
    assert isinstance(cache, Cache)
    expected = generate(made, ids, mask, None, **options)
    assert torch.equal(generate(made, ids, mask, cache, **options), expected)
    assert cache.memory() <= 6 * 2 * 2 * 2 * KEEP * (2 * 4 * 4 + 12)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("lookup", [False, True], ids=["assistant", "prompt lookup"])
def test_assisted_decoding_gives_the_tokens_of_no_cache(lookup, do_sample):
    made, assistant = model(), model()
    for p in assistant.parameters():  # Often right, and often wrong.
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    row = ids[1:]
    expected = generate(made, row, None, None)
    help_ = {"prompt_lookup_num_tokens": 3} if lookup else {}
    extra = {} if lookup else {"assistant_model": assistant}
    config = GenerationConfig(
        max_new_tokens=24, pad_token_id=0, eos_token_id=28, do_sample=do_sample, top_k=1, **help_
    )
    cache = LifetimeCache()
    got = made.generate(row, generation_config=config, past_key_values=cache, **extra)
    assert torch.equal(got, expected)


def test_a_conversation_goes_on_from_its_cache():
    made = model()
    cache = LifetimeCache()
    first = generate(made, ids, mask, cache)
    grown = torch.ones(2, first.shape[1], dtype=torch.int64)
    grown[:, :11] = mask
    more = torch.cat([first, ids[:, :7]], 1)
    grown = torch.cat([grown, torch.ones(2, 7, dtype=torch.int64)], 1)
    expected = generate(made, more, grown, None)
    assert torch.equal(generate(made, more, grown, cache), expected)
