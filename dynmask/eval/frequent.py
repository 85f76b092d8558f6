"""RULER's frequent words: the three most frequent words of a coded text.

Source: NVIDIA/RULER (Apache-2.0), task `fwe`: random words of six letters, frequencies as
``rank ** -2``, the word of rank 1 replaced by dots, a vocabulary of length / 50.
"""

from __future__ import annotations

import math
import random
import string

from dynmask.eval.haystacks import Coded, Draft, Question
from dynmask.eval.words import is_eval_word

GOLD = 3
"""Words asked for: those of rank 2, 3 and 4."""

_ALPHA = 2.0
_ZETA = math.pi**2 / 6
_LETTERS = 6
_HEADER = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
)
_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text? Answer: According to the coded text "
    "above, the three most frequently appeared words are:"
)


def frequent_draft(*, length: int, rng: random.Random) -> Draft:
    """A coded text and its one question.

    Args:
        length: tokens of the whole prompt; the vocabulary grows with it.
        rng: of words and order.
    """
    words: dict[str, None] = {}  # a dict keeps the order of drawing, a set would not
    while len(words) < max(length // 50, GOLD + 2) - 1:
        word = "".join(rng.choices(string.ascii_lowercase, k=_LETTERS))
        if is_eval_word(word):
            words[word] = None
    ranked = ["...", *words]
    return Draft(
        header=_HEADER,
        hay=Coded(ranked, alpha=_ALPHA, zeta=_ZETA, seed=f"{rng.random()}"),
        hidden=(),
        depths=(),
        questions=(Question("words", _QUESTION, tuple(ranked[1 : 1 + GOLD])),),
    )
