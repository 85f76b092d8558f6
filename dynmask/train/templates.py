"""Prompt templates turned into token ids with a loss weight for each part.

A template is a string with the slots ``{key}`` and ``{value}``, as ``dynmask.eval.prompts`` writes
them. Its parts are tokenised apart and joined; the pre-tokenizer splits at the same places, so the
ids are those of the whole string (a test holds this). At ``CUT`` the string ends for the tokenizer,
as a prompt does before its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

Piece = tuple[list[int], float]
"""Token ids, and the loss weight that they share."""

CUT = "{cut}"
"""Where a prompt ends and its answer starts: no token reaches across."""

Slot = Literal["text", "spaced key", "bare key", "value"]


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
        self._digits = [self.ids(str(digit))[0] for digit in range(10)]
        # Plain dicts, unlike functools' caches, travel to data workers that are spawned.
        self._templates: dict[str, list[tuple[list[int], Slot]]] = {}
        self._words: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands before more text.

        A run of newlines is one piece at the end of a string but not before a word, hence the
        letter that is added and dropped.
        """
        more = "x" if text.endswith("\n") else ""
        ids = self._tokenizer(text + more, add_special_tokens=False)["input_ids"]
        return list(ids[:-1] if more else ids)

    def key(self, *words: str, joiner: Literal["-", " "] = "-") -> Key:
        """The ids of ``words`` joined by a hyphen or a space."""
        rest: tuple[int, ...] = ()
        for word in words[1:]:
            rest += self._word("-") + self._word(word) if joiner == "-" else self._word(" " + word)
        return Key(self._word(" " + words[0]) + rest, self._word(words[0]) + rest)

    def number(self, value: int) -> list[int]:
        """The ids of a number, one a digit."""
        return [self._digits[int(digit)] for digit in str(value)]

    def pieces(
        self,
        template: str,
        key: Key | None = None,
        value: list[int] | None = None,
        *,
        key_weight: float = 1.0,
        value_weight: float = 1.0,
    ) -> list[Piece]:
        """Fill ``template``; its wording has weight 1, its slots the weights given."""
        if template not in self._templates:
            self._templates[template] = self._split(template)
        out: list[Piece] = []
        for ids, slot in self._templates[template]:
            if slot == "text":
                out.append((ids, 1.0))
            elif slot == "value":
                assert value is not None
                out.append((value, value_weight))
            else:
                assert key is not None
                out.append((list(key.spaced if slot == "spaced key" else key.bare), key_weight))
        return out

    def _split(self, template: str) -> list[tuple[list[int], Slot]]:
        """Parts as ``(ids, slot)``; the space before a key belongs to the key."""
        parts: list[tuple[list[int], Slot]] = []
        for part in re.split(r"( ?\{key\}|\{value\}|\{cut\})", template):
            if part.endswith("{key}"):
                parts.append(([], "spaced key" if part.startswith(" ") else "bare key"))
            elif part == "{value}":
                parts.append(([], "value"))
            elif part and part != CUT:
                parts.append((self.ids(part), "text"))
        return parts

    def _word(self, word: str) -> tuple[int, ...]:
        if word not in self._words:
            self._words[word] = tuple(self.ids(word))
        return self._words[word]


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
