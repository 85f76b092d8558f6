"""Tokenised text, and the words that training keys are made of."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynmask.eval.words import is_eval_word
from dynmask.train.texts import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_WORD = re.compile(r"\b[a-z]{3,10}\b")
_LINE_END = re.compile(r"(?<=\S)(?=\n)")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents end to end.

    Attributes:
        tokens: ids ``[T]`` uint16 (uint32 for more than 65,536 of them), documents one after the
            other, each closed by the end token. With a cache it stays on the disk.
        words: lower-case words of training, in falling order of frequency (never a word that
            belongs to the evaluation, see ``dynmask.eval.words``).
        digest: of tokens and words; equal for equal training data.
    """

    tokens: np.ndarray
    words: list[str]
    digest: str = ""

    @classmethod
    def build(
        cls,
        texts: Texts,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache: Path | None = None,
        most: int | None = None,
    ) -> Corpus:
        """Tokenise ``texts``; with ``cache`` (a folder) do so once.

        The cache is keyed by the tokenizer, the texts' key and ``most``.

        Args:
            texts: the documents.
            tokenizer: a fast tokenizer with an end-of-sequence token.
            cache: where to keep the result: ``tokens.bin``, and ``corpus.json``, written last.
            most: stop after the document that makes it so many tokens.

        Raises:
            ValueError: the tokenizer does not fit, or a file cannot be read as text.
        """
        if tokenizer.eos_token_id is None or not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: a fast one with an end-of-sequence token is needed, got "
                f"eos_token_id={tokenizer.eos_token_id} and is_fast={tokenizer.is_fast}"
            )
        dtype = np.uint16 if len(tokenizer) <= 65536 else np.uint32
        counts: Counter[str] = Counter()
        pieces = _encoded(texts, tokenizer, counts, dtype, most)
        if cache is None:
            tokens = np.concatenate(list(pieces))
            words = _key_words(counts)
            return cls(tokens, words, _sha256(tokens, words))
        backend = tokenizer.backend_tokenizer.to_str()
        key = hashlib.sha256(f"{backend}{texts.key()}{most}".encode()).hexdigest()
        note = cache / "corpus.json"
        if not note.exists() or json.loads(note.read_text(encoding="utf-8"))["key"] != key:
            note.unlink(missing_ok=True)
            cache.mkdir(parents=True, exist_ok=True)
            with (cache / "tokens.bin").open("wb") as file:
                for piece in pieces:
                    piece.tofile(file)
            tokens = np.memmap(cache / "tokens.bin", dtype=dtype, mode="r")
            words = _key_words(counts)
            made = {"key": key, "dtype": np.dtype(dtype).name, "words": words}
            made["sha256"] = _sha256(tokens, words)
            partial = note.with_name("corpus.json.partial")
            partial.write_text(json.dumps(made), encoding="utf-8")
            os.replace(partial, note)
            log.info("%d tokens, %d key words", len(tokens), len(words))
        made = json.loads(note.read_text(encoding="utf-8"))
        tokens = np.memmap(cache / "tokens.bin", dtype=made["dtype"], mode="r")
        return cls(tokens, made["words"], made["sha256"])

    def require(self, tokens: int) -> None:
        """Raise unless a sequence of so many tokens can be cut from the text.

        Raises:
            ValueError: the text is shorter.
        """
        if len(self.tokens) < tokens:
            raise ValueError(
                f"data: the text has {len(self.tokens)} tokens, one sequence {tokens}; "
                f"give more text or take shorter sequences"
            )

    def sha256(self) -> str:
        """Digest of tokens and words: equal for equal training data."""
        return self.digest or _sha256(self.tokens, self.words)


def _encoded(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
    dtype: type,
    most: int | None,
) -> Iterator[np.ndarray]:
    """Yield the ids of each document with its end token; count words on the way."""
    whole = not _splits(tokenizer)
    made = 0
    for text in texts:
        counts.update(_WORD.findall(text))
        parts = [text] if whole else _LINE_END.split(text)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        ids = [i for part in encoded for i in part.ids]
        yield np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype)
        made += len(ids) + 1
        if most is not None and made >= most:
            return


def _splits(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether paragraphs may be tokenised apart, which is parallel.

    Byte-level tokenizers never join a word to the line end after it, others may.
    """
    text = "He said so.\n\n  The end,\nin 1893.\n"
    parts = tokenizer.backend_tokenizer.encode_batch_fast(
        [text, *_LINE_END.split(text)], add_special_tokens=False
    )
    return parts[0].ids == [i for part in parts[1:] for i in part.ids]


def _key_words(counts: Counter[str]) -> list[str]:
    return [w for w, n in counts.most_common() if n >= 5 and not is_eval_word(w)]


def _sha256(tokens: np.ndarray, words: list[str]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(tokens).data)
    digest.update(" ".join(words).encode())
    return digest.hexdigest()
