import json
import math
from itertools import pairwise

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dynmask.eval import perplexity
from dynmask.eval.nll import ROWS, token_nll
from dynmask.eval.perplexity import make_windows
from dynmask.eval.runner import encode, evaluating


class NoKeep(LlamaForCausalLM):
    """A model whose forward computes all logits, always."""

    def forward(self, input_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def direct(model, ids):
    """Loss of each token from all logits at once."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("length", [2, 63, 65, ROWS + 1, 1111])
@pytest.mark.parametrize(
    ("model_class", "config", "extra"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (NoKeep, LlamaConfig, {}),
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0, "sliding_window": 32}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    ],
    ids=["llama", "llama-all-logits", "gemma2-soft-cap", "cohere-scale"],
)
def test_token_nll_equals_the_direct_computation(
    make_model, tiny_settings, model_class, config, extra, length
):
    if model_class is CohereForCausalLM:  # derives it from the hidden size
        tiny_settings = {k: v for k, v in tiny_settings.items() if k != "head_dim"}
    model = make_model(model_class, config(**tiny_settings, **extra))
    ids = torch.randint(2, 400, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    with evaluating(model):
        got = token_nll(model, ids)
    assert got.shape == (length - 1,)
    torch.testing.assert_close(got.double(), direct(model, ids), rtol=1e-5, atol=1e-5)
    assert "forward" not in model.base_model.__dict__


def test_logits_come_in_chunks_and_the_trunk_runs_once(llama):
    heads, trunks = [], []
    hooks = [
        llama.lm_head.register_forward_hook(lambda m, a, out: heads.append(out.shape[1])),
        llama.model.layers[0].register_forward_hook(lambda m, a, out: trunks.append(1)),
    ]
    try:
        with evaluating(llama):
            token_nll(llama, [5] * (2 * ROWS + 10))
    finally:
        for hook in hooks:
            hook.remove()
    assert max(heads) == ROWS
    assert len(trunks) == 1


def test_the_trunk_is_put_back_after_an_error(llama, monkeypatch):
    def own(*args, **kwargs):
        return type(llama.model).forward(llama.model, *args, **kwargs)

    monkeypatch.setattr(llama.model, "forward", own)  # as another wrapper might have left it
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("head")

    hook = llama.lm_head.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="head"), evaluating(llama):
            token_nll(llama, [5, 6, 7])
    finally:
        hook.remove()
    assert llama.model.__dict__["forward"] is own


@pytest.fixture(scope="module")
def result(llama, tokenizer, book):
    return perplexity(llama, tokenizer, book, length=111, windows=5, bucket=50)


def test_windows_take_the_texts_in_turn(tokenizer, book):
    first, second = (encode(tokenizer, text) for text in book)
    cut = make_windows(tokenizer, book, length=111, windows=5)
    assert [(w.text, w.index) for w in cut] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert list(cut[2].ids) == first[111:222]
    assert list(cut[3].ids) == second[111:222]
    every = make_windows(tokenizer, book, length=111)
    assert len(every) == len(first) // 111 + len(second) // 111


def test_figures_against_a_direct_computation(llama, tokenizer, book, result):
    first, second = (encode(tokenizer, text) for text in book)
    runs = [first[: 3 * 111], second[: 2 * 111]]
    losses = [direct(llama, run[i : i + 111]) for run in runs for i in range(0, len(run), 111)]
    mean = torch.cat(losses).mean().item()
    assert result.score == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.metrics["nll"] == pytest.approx(mean, rel=1e-6)
    texts = [tokenizer.decode(run) for run in runs]
    total = mean * 5 * 111
    words, size = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
    assert (result.metrics["words"], result.metrics["bytes"]) == (words, size)
    assert result.metrics["word_perplexity"] == pytest.approx(math.exp(total / words))
    assert result.metrics["bits_per_byte"] == pytest.approx(total / size / math.log(2))
    assert result.metrics["tokens"] == 555
    low, high = result.interval
    assert low < result.score < high
    json.dumps(result.to_json())


def test_parts_by_position(llama, tokenizer, book, result):
    cut = make_windows(tokenizer, book, length=111, windows=5)
    losses = torch.stack([direct(llama, window.ids) for window in cut])
    assert [(p.label, p.n) for p in result.parts] == [
        ("0-50", 5 * 49), ("50-100", 5 * 50), ("100-111", 5 * 11),
    ]  # fmt: skip
    # losses[:, i] belongs to position i + 1
    for part, (start, stop) in zip(result.parts, [(0, 49), (49, 99), (99, 110)], strict=True):
        assert part.score == pytest.approx(losses[:, start:stop].mean().exp().item(), rel=1e-6)


def test_rows_interval_and_progress(llama, tokenizer, book):
    seen = []
    result = perplexity(
        llama, tokenizer, book, length=63, windows=1, progress=lambda *step: seen.append(step)
    )
    assert seen == [(1, 1, "perplexity of 63 tokens")]
    assert result.interval is None
    assert [row["perplexity"] for row in result.rows] == [pytest.approx(result.score)]


def test_labels_in_thousands(llama, tokenizer, book):
    result = perplexity(llama, tokenizer, book, length=2048, windows=1)
    assert [part.label for part in result.parts] == ["0-1K", "1K-2K"]


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (111, [0, 111]),
        (1024, [0, 1024]),
        (1025, [0, 1024, 1025]),
        (5001, [0, 1024, 2048, 4096, 5001]),
    ],
)
def test_losses_by_octave(llama, tokenizer, book, length, edges):
    """Against each window's losses from all logits at once."""
    result = perplexity(llama, tokenizer, book, length=length, windows=2)
    cut = make_windows(tokenizer, book, length=length, windows=2)
    losses = torch.stack([direct(llama, window.ids) for window in cut])
    names = {111: "111", 1024: "1K", 1025: "1025", 2048: "2K", 4096: "4K", 5001: "5001", 0: "0"}
    labels = [f"{names[a]}-{names[b]}" for a, b in pairwise(edges)]
    assert [name for name in result.metrics if name.startswith("tokens_")] == [
        f"tokens_{label}" for label in labels
    ]
    for label, (start, stop) in zip(labels, pairwise(edges), strict=True):
        part = losses[:, max(start - 1, 0) : stop - 1]  # losses[:, i] belongs to position i + 1
        first, second = part.mean(1).tolist()
        assert result.metrics[f"tokens_{label}"] == part.numel()
        assert result.metrics[f"nll_{label}"] == pytest.approx(part.mean().item(), rel=1e-5)
        # The standard error of a mean of two is half their distance.
        error = result.metrics[f"nll_{label}_error"]
        assert error == pytest.approx(abs(first - second) / 2, rel=1e-3, abs=1e-6)
        rows = [row[f"nll_{label}"] for row in result.rows]
        assert rows == pytest.approx([first, second], rel=1e-5)
    tokens = sum(result.metrics[f"tokens_{label}"] for label in labels)
    assert tokens == 2 * (length - 1)
    total = sum(result.metrics[f"tokens_{x}"] * result.metrics[f"nll_{x}"] for x in labels)
    assert total / tokens == pytest.approx(result.metrics["nll"], rel=1e-6)


def test_one_window_has_no_error(llama, tokenizer, book):
    result = perplexity(llama, tokenizer, book, length=63, windows=1)
    assert "nll_0-63" in result.metrics
    assert not any(name.endswith("_error") for name in result.metrics)


def test_windows_start_with_the_special_tokens(bos_tokenizer, book):
    ids = encode(bos_tokenizer, book[0])
    cut = make_windows(bos_tokenizer, book[:1], length=65, windows=2)
    assert [list(window.ids) for window in cut] == [[1, *ids[:64]], [1, *ids[64:128]]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length=1"),
        ({"length": 8193}, "length=8193 is over the model's context"),
        ({"length": 100, "windows": 0}, "windows=0"),
        ({"length": 100, "windows": 10_000}, "windows=10000, but the texts hold"),
        ({"length": 100, "bucket": 0}, "bucket=0"),
        ({"texts": ["It was a cold day."]}, "too short"),
        ({"texts": []}, "too short"),
        ({"texts": "It was a cold day. " * 3000, "length": 2}, "one string"),
        ({"length": 2, "texts": ["\n\n\n\n\n\n"]}, "no words"),
    ],
    ids=["one", "context", "no-window", "windows", "bucket", "short", "none", "one-text", "blank"],
)
def test_impossible_settings(llama, tokenizer, book, settings, message):
    texts = settings.pop("texts", book)
    with pytest.raises(ValueError, match=message):
        perplexity(llama, tokenizer, texts, **settings)
