"""A tiny byte-level tokenizer and tiny random models; nothing is downloaded."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynmask.eval import prompts

SENTENCES = [
    prompts.record([("morning-walk", 12345), ("quiet-river", 678)]),
    prompts.official_question("quiet-river") + prompts.completion_question("morning-walk"),
    prompts.city_needle("river", 9876543) + prompts.city_question("river"),
    prompts.ruler_needle("quiet-river", 1234567) + prompts.ruler_question("quiet-river"),
    "It was a cold day. The old man walked to the river, and he did not look back!",
]


def _tokenizer(bos):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", bos_token="<|start|>" if bos else None
    )


@pytest.fixture(scope="session")
def tokenizer():
    return _tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer():
    return _tokenizer(bos=True)


TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def random_model(model_class, config):
    """A model in fp64 whose logits differ enough that every earlier token counts."""
    torch.manual_seed(0)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.5 if "embed" in name else 0.25)
    return model


@pytest.fixture(scope="session")
def llama():
    return random_model(LlamaForCausalLM, LlamaConfig(**TINY))


@pytest.fixture(scope="session")
def book():
    """Two texts of numbered sentences, so that a place in them can be recognised."""
    first = " ".join(f"The old man of house {i} walked to the river." for i in range(400))
    second = " ".join(f"It was a cold day, number {i}, and he did not look!" for i in range(400))
    return [first, second]


class Reader:
    """Stands in for `ask`: finds each answer in the prompt itself, as a perfect model would."""

    def __init__(self, tokenizer, find):
        self.tokenizer, self.find, self.calls = tokenizer, find, []

    def __call__(self, model, tokenizer, prompts, **settings):
        self.calls.append((prompts, settings))
        return [
            [
                self.find(self.tokenizer.decode(p.prefix), self.tokenizer.decode(q))
                for q in p.questions
            ]
            for p in prompts
        ]


@pytest.fixture(scope="session")
def reader(tokenizer):
    return lambda find: Reader(tokenizer, find)


@pytest.fixture(scope="session")
def tiny_settings():
    return dict(TINY)


@pytest.fixture(scope="session")
def make_model():
    return random_model
