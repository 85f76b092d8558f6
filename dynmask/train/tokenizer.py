"""Train the byte-level BPE of a small model: single digits, no unknown token, reversible."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, context: int = 8192
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``.

    Digits stand alone, so that a number is copied digit by digit instead of as a rare token.

    Args:
        texts: documents.
        vocab_size: entries with the 256 bytes and the two special tokens; fewer than 65,536.
        context: the model's context, kept as ``model_max_length``.

    Raises:
        ValueError: ``vocab_size`` out of range.
    """
    if not 258 <= vocab_size < 65536:
        raise ValueError(f"vocab_size must be in [258, 65535], got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context,
        padding_side="left",
    )
