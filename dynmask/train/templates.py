"""Prompt templates turned into token ids with a loss weight for each part.

A template is a string with the slots ``{key}`` and ``{value}``, as ``dynmask.eval.prompts`` writes them.
Its parts are tokenised apart and joined; the pre-tokenizer splits at the same places, so the ids are
those of the whole string (a test holds this). At ``CUT`` the string ends for the tokenizer, as a
prompt does before its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

Piece = tuple[list[int], float]

CUT = "{cut}"


@dataclass(frozen=True)
class Key:
    """The ids of a key after a space, and without one."""

    spaced: tuple[int, ...]
    bare: tuple[int, ...]


class TemplateWriter:
    """Writes filled templates as pieces ``(ids, weight)``.

    Args:
        tokenizer: a byte-level tokenizer with single digits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._digits = [self.ids(str(d))[0] for d in range(10)]
        self._parts = lru_cache(maxsize=None)(self._split)
        self._word = lru_cache(maxsize=200_000)(lambda word: tuple(self.ids(word)))

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands before more text.

        A run of newlines is one piece at the end of a string but not before a word, hence the
        letter that is added and dropped.
        """
        more = "x" if text.endswith("\n") else ""
        ids = self._tokenizer(text + more, add_special_tokens=False)["input_ids"]
        return list(ids[:-1] if more else ids)

    def key(self, *words: str, joiner: str = "-") -> Key:
        """The ids of ``words`` joined by a hyphen or a space."""
        rest: tuple[int, ...] = ()
        for word in words[1:]:
            rest += self._word("-") + self._word(word) if joiner == "-" else self._word(" " + word)
        return Key(self._word(" " + words[0]) + rest, self._word(words[0]) + rest)

    def number(self, value: int) -> list[int]:
        """One id a digit."""
        return [self._digits[int(d)] for d in str(value)]

    def pieces(
        self,
        template: str,
        key: Key | None = None,
        value: list[int] | None = None,
        *,
        text: float = 1.0,
        key_weight: float = 1.0,
        value_weight: float = 1.0,
    ) -> list[Piece]:
        """Fill ``template``; each part carries the weight of its kind."""
        out: list[Piece] = []
        for ids, slot in self._parts(template):
            if slot == "text":
                out.append((ids, text))
            elif slot == "value":
                assert value is not None
                out.append((value, value_weight))
            else:
                assert key is not None
                out.append((list(key.spaced if slot == "spaced" else key.bare), key_weight))
        return out

    def _split(self, template: str) -> list[tuple[list[int], str]]:
        """Parts as ``(ids, kind)``; the space before a key belongs to the key."""
        parts: list[tuple[list[int], str]] = []
        for part in re.split(r"( ?\{key\}|\{value\}|\{cut\})", template):
            if part.endswith("{key}"):
                parts.append(([], "spaced" if part.startswith(" ") else "bare"))
            elif part == "{value}":
                parts.append(([], "value"))
            elif part and part != CUT:
                parts.append((self.ids(part), "text"))
        return parts


def flatten(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Join pieces: ids ``[T]`` int64 and weights ``[T]`` fp32."""
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part, _ in pieces])
    weights = np.repeat(
        np.asarray([weight for _, weight in pieces], dtype=np.float32),
        [len(part) for part, _ in pieces],
    )
    return ids, weights


def length(pieces: list[Piece]) -> int:
    """Tokens in ``pieces``."""
    return sum(len(part) for part, _ in pieces)
