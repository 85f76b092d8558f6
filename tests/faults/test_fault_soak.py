"""10,000 tokens one by one: caches that do not grow, memory that stays, outputs that stay right."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch
from fault_models import make_model, plan_for, random_ids

from dynmask.dma import DmaConfig, DmaForCausalLM, LifetimeCache
from dynmask.hf import accelerate

STEPS, EVERY = 10_000, 2500
TINY = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2 * STEPS,
}
#: Of growth between the first reading and the last: 140 bytes and half an object a step.
MOST_BYTES, MOST_BLOCKS = 2**20, (STEPS - EVERY) // 2
#: What glibc's ``mallinfo2`` tells, in bytes where it is not a count.
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def allocated() -> tuple[int, int]:
    """Bytes that tensors and the like hold (0 without glibc 2.33), and Python's small blocks.

    The resident size would also tell what the system does with memory that earlier tests freed.
    """
    gc.collect()
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", Mallinfo)
    if mallinfo is not Mallinfo:
        mallinfo.restype = Mallinfo
    told = mallinfo()
    return told.uordblks + told.hblkhd, sys.getallocatedblocks()


def live_tensors() -> int:
    gc.collect()
    return sum(type(item) is torch.Tensor for item in gc.get_objects())


def soak(step, measure):
    """Run the steps; what was measured on the way."""
    seen = []
    for number in range(1, STEPS + 1):
        step()
        if number % EVERY == 0:
            seen.append(measure())
    return seen


def test_capped_cache_stays_under_its_cap():
    model, cap = make_model(**TINY), 256
    ids = random_ids(300)
    with accelerate(model, plan_for(model), mode="static") as run, torch.inference_mode():
        cache = run.cache(cap)
        logits = model(ids, past_key_values=cache).logits

        def step():
            nonlocal logits
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            assert cache.layers[0].keys.shape[2] <= cap

        def measure():
            assert logits.isfinite().all()
            return cache.layers[0].keys.nbytes, cache.memory(), live_tensors(), *allocated()

        seen = soak(step, measure)
        calls = run.stats()["calls"]
    assert cache.get_seq_length() == 300 + STEPS
    assert calls == {"prefill": 1, "decode": STEPS}
    assert max(keys for keys, *_ in seen) <= cap * 8 * 4
    # Beside the keys, one byte a token: which of all tokens are no padding.
    assert seen[-1][1] - seen[0][1] <= (STEPS - EVERY) + cap * 8 * 4 * 2
    assert seen[-1][2] <= seen[0][2] + 8
    assert seen[-1][3] - seen[0][3] < MOST_BYTES
    assert seen[-1][4] - seen[0][4] < MOST_BLOCKS


def test_lifetime_cache_keeps_what_the_definition_keeps():
    """The kept scores are the best of all so far, up to those of the 10,000th step."""
    keep = 24
    torch.manual_seed(0)
    config = DmaConfig(
        vocab_size=97, keep=keep, initializer_range=0.3, eos_token_id=None, pad_token_id=0, **TINY
    )
    model = DmaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("score.A"):
            torch.nn.init.normal_(weight)
    cache = LifetimeCache()
    scores, count, kept = torch.full((100 + STEPS,), -torch.inf), 0, None
    extend = cache.extend

    def noting(k, v, score, layer, **given):
        nonlocal count, kept
        new = score.flatten()
        scores[count : count + len(new)] = new
        count += len(new)
        attended = extend(k, v, score, layer, **given)
        kept = attended[2].flatten()
        return attended

    cache.extend = noting
    draw = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        logits = model(random_ids(100), past_key_values=cache).logits

        def step():
            nonlocal logits
            # Random tokens: greedy ones fall into a loop.
            token = torch.randint(3, 97, (1, 1), generator=draw)
            logits = model(token, past_key_values=cache).logits

        def measure():
            assert logits.isfinite().all()
            assert torch.equal(kept.sort(descending=True).values, scores.topk(keep).values)
            return cache.memory(), live_tensors(), *allocated()

        seen = soak(step, measure)
    assert cache.get_seq_length() == 100 + STEPS
    assert len({memory for memory, *_ in seen}) == 1
    assert seen[-1][1] <= seen[0][1] + 8
    assert seen[-1][2] - seen[0][2] < MOST_BYTES
    assert seen[-1][3] - seen[0][3] < MOST_BLOCKS
