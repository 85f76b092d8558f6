import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from dynmask.dma import DmaConfig, DmaForCausalLM
from dynmask.eval.runner import Prefill, Prompt, ask, encode, encode_prefix, evaluating


class NoKeep(LlamaForCausalLM):
    """A model whose forward computes all logits, always."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None):
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache
        )


@pytest.fixture(
    scope="module",
    params=[
        (LlamaForCausalLM, LlamaConfig, {}),
        (NoKeep, LlamaConfig, {}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
        (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    ],
    ids=["llama", "llama-all-logits", "mistral-sliding", "gemma3-sliding"],
)
def any_model(request, tiny_settings, make_model):
    model_class, config, extra = request.param
    return make_model(model_class, config(**tiny_settings, **extra))


def by_itself(model, ids, steps):
    """Greedy tokens and logits of a prompt, each step a forward of all of it without a cache."""
    ids, tokens, logits = list(ids), [], []
    for _ in range(steps):
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        ids.append(tokens[-1])
    return tokens, logits[0]


@pytest.mark.parametrize("length", [1, 63, 111])
def test_shared_prefix_equals_separate_prompts(any_model, length):
    generator = torch.Generator().manual_seed(length)

    def ids(count):
        return torch.randint(2, 400, (count,), generator=generator).tolist()

    prefix, questions = ids(length), [ids(1), ids(20), ids(5)]
    with evaluating(any_model):
        prefill = Prefill(any_model, prefix)
        for question in [*questions, questions[0]]:
            tokens, logits = by_itself(any_model, prefix + question, 6)
            torch.testing.assert_close(prefill.logits(question), logits, rtol=1e-9, atol=1e-9)
            got = prefill.greedy(question, max_new_tokens=6, done=lambda tokens: False)
            assert got == tokens
            assert logits.std() > 0.1, "logits of a flat model prove nothing"


@pytest.mark.parametrize("keep", [8, 200], ids=["evicting", "roomy"])
def test_a_dma_model_answers_as_by_itself(keep):
    torch.manual_seed(0)
    config = DmaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep=keep,
        initializer_range=0.3,
    )
    model = DmaForCausalLM(config).double().eval()
    prefix, questions = list(range(2, 65)), [[7], [9, 30, 5], [7]]
    with evaluating(model):
        prefill = Prefill(model, prefix)
        for question in questions:
            tokens, logits = by_itself(model, prefix + question, 6)
            torch.testing.assert_close(prefill.logits(question), logits, rtol=1e-5, atol=1e-5)
            assert prefill.greedy(question, max_new_tokens=6, done=lambda t: False) == tokens


def test_a_cache_for_each_question_is_given_whole_prompts(llama, tokenizer):
    prompts = [Prompt([5, 6, 7], [[8, 9], [11]]), Prompt([12], [[13]])]
    made = []

    def cache():
        made.append(DynamicCache())
        return made[-1]

    shared = ask(llama, tokenizer, prompts, max_new_tokens=4)
    assert ask(llama, tokenizer, prompts, max_new_tokens=4, cache=cache, whole=True) == shared
    assert [c.get_seq_length() - 3 for c in made] == [5, 4, 2]
    made.clear()
    assert ask(llama, tokenizer, prompts, max_new_tokens=4, cache=cache) == shared
    assert [c.get_seq_length() for c in made] == [3, 1]


def test_greedy_stops(llama):
    with evaluating(llama):
        prefill = Prefill(llama, [5, 6, 7])
        full = prefill.greedy([8], max_new_tokens=5, done=lambda tokens: False)
        assert len(full) == 5
        assert prefill.greedy([8], max_new_tokens=5, done=lambda t: len(t) == 2) == full[:2]


def test_ask_cuts_at_stop_strings_and_end_tokens(llama, tokenizer):
    prompt = Prompt(encode(tokenizer, "The old man walked"), [encode(tokenizer, " to the")])
    [[whole]] = ask(llama, tokenizer, [prompt], max_new_tokens=8)
    tokens, _ = by_itself(llama, [*prompt.prefix, *prompt.questions[0]], 8)
    assert whole == tokenizer.decode(tokens, skip_special_tokens=True)
    first = tokenizer.decode(tokens[:1])
    [[cut]] = ask(llama, tokenizer, [prompt], max_new_tokens=8, stop=(first.strip(),))
    assert cut == first
    assert len(cut) < len(whole)


@pytest.mark.parametrize(
    ("spoken", "answer"),
    [
        ("\n\n 123\n and more", "\n\n 123\n"),
        ("123\n and more", "123\n"),
        (" \n123> and more", " \n123> and more"),
    ],
    ids=["blank lines first", "at once", "no stop"],
)
def test_stop_strings_are_looked_for_after_leading_blanks(
    llama, tokenizer, monkeypatch, spoken, answer
):
    script = encode(tokenizer, spoken)

    def greedy(self, question, *, max_new_tokens, done):
        stops = (i for i in range(1, len(script) + 1) if done(script[:i]))
        return script[: next(stops, len(script))]

    monkeypatch.setattr(Prefill, "greedy", greedy)
    prompt = Prompt([5, 6], [[7]])
    assert ask(llama, tokenizer, [prompt], max_new_tokens=20, stop=("\n",)) == [[answer]]


@pytest.mark.parametrize("as_list", [False, True], ids=["int", "list"])
def test_end_token_of_the_generation_config(llama, tokenizer, monkeypatch, as_list):
    prompt = Prompt([5, 6, 7], [[8]])
    tokens, _ = by_itself(llama, [5, 6, 7, 8], 6)
    stop = tokens[2]
    assert stop not in tokens[:2]
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [0, stop] if as_list else stop)
    [[text]] = ask(llama, tokenizer, [prompt], max_new_tokens=6)
    assert text == tokenizer.decode(tokens[:3], skip_special_tokens=True)


def test_ask_keeps_shape_order_and_mode(llama, tokenizer):
    prompts = [Prompt([5, 6], [[7], [8]]), Prompt([9], [[10]])]
    seen = []
    llama.train()
    try:
        answers = ask(
            llama,
            tokenizer,
            prompts,
            max_new_tokens=3,
            title="t",
            progress=lambda *step: seen.append(step),
        )
        assert llama.training
    finally:
        llama.eval()
    assert seen == [(1, 3, "t"), (2, 3, "t"), (3, 3, "t")]
    expected = [[by_itself(llama, [*p.prefix, *q], 3)[0] for q in p.questions] for p in prompts]
    assert answers == [
        [tokenizer.decode(t, skip_special_tokens=True) for t in group] for group in expected
    ]


def test_special_tokens_stand_in_front_only(tokenizer, bos_tokenizer):
    assert encode_prefix(tokenizer, "river") == encode(tokenizer, "river")
    assert encode_prefix(bos_tokenizer, "river") == [1, *encode(bos_tokenizer, "river")]
    assert encode_prefix(bos_tokenizer, "") == [1]


def test_errors(llama, tokenizer):
    with pytest.raises(ValueError, match="prefix is empty"):
        Prefill(llama, [])
    with evaluating(llama):
        prefill = Prefill(llama, [5])
        with pytest.raises(ValueError, match="question is empty"):
            prefill.greedy([], max_new_tokens=1, done=lambda tokens: False)
        with pytest.raises(ValueError, match="max_new_tokens=0"):
            prefill.greedy([5], max_new_tokens=0, done=lambda tokens: False)
    fits = Prompt([5] * 8180, [[5] * 2])
    with pytest.raises(ValueError, match=r"8182 tokens.*context holds 8192"):
        ask(llama, tokenizer, [Prompt([5], [[5]]), fits], max_new_tokens=11)
