"""Types of tokens, to tell what is kept: of running text, and of recall's keys, values, filler."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmask.train.mqar import Mqar

_WORDS = """
a all an and are as at be been but by could do for from had have he her him his i if in into is
it its me more my no not now of on one or out said she so some than that the their them then
there they this to up very was we were what when which who will with would you your
"""
COMMON = frozenset(_WORDS.split())
"""The words that English prose uses most."""

TEXT = ("line start", "punctuation, space", "digit", "capitalised", "common word", "other word")
RECALL = ("key, first", "value, first", "key, asked", "value, asked", "filler")


@dataclass(frozen=True, eq=False)
class Kinds:
    """The type of each token.

    Attributes:
        names: of the types.
        of: ``[N]`` int64, an index into the names.
    """

    names: tuple[str, ...]
    of: Tensor


def kinds_of_text(tokenizer: Any, ids: Sequence[int]) -> Kinds:
    """Types of the tokens of running text: the first of `TEXT` that fits.

    A line start is a token with a newline in it, or the first one behind; a digit token has a digit
    and one of punctuation or space neither letter nor digit. A piece of a word is of the
    word's type: that is common, or capitalised if its first letter is a capital.
    """
    pieces = [tokenizer.decode([token]) for token in ids]
    text, owner = "", []
    for index, piece in enumerate(pieces):
        text += piece
        owner += [index] * len(piece)
    words: list[str] = [""] * len(pieces)
    for match in re.finditer(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text):
        for index in dict.fromkeys(owner[match.start() : match.end()]):
            words[index] = words[index] or match[0]
    kinds = []
    for index, piece in enumerate(pieces):
        word = words[index]
        if "\n" in piece or (index and "\n" in pieces[index - 1]):
            kind = "line start"
        elif any(letter.isdigit() for letter in piece):
            kind = "digit"
        elif not word:
            kind = "punctuation, space"
        elif word.lower() in COMMON:
            kind = "common word"
        else:
            kind = "capitalised" if word[0].isupper() else "other word"
        kinds.append(TEXT.index(kind))
    return Kinds(TEXT, torch.tensor(kinds))


def kinds_of_recall(task: Mqar, ids: Sequence[int]) -> Kinds:
    """Types of the tokens of a row of pairs, filler and questions."""
    seen: set[int] = set()
    kinds = []
    for place, token in enumerate(ids):
        if token >= task.vocab:
            kinds.append("filler")
        elif token < task.vocab // 2:
            kinds.append("key, asked" if token in seen else "key, first")
            seen.add(token)
        else:  # A value stands behind its key.
            kinds.append(kinds[place - 1].replace("key", "value"))
    return Kinds(RECALL, torch.tensor([RECALL.index(kind) for kind in kinds]))
