"""Key words of the evaluation, and the rule that keeps them out of training.

A word belongs to the evaluation iff ``sha1(word) % 5 == 0``, else to training. The rule needs no
list, so training code can apply it to any word, and one word in five is held out.
"""

from __future__ import annotations

import hashlib
import random
from functools import cache
from importlib import resources


def is_eval_word(word: str) -> bool:
    """Whether `word` may be a key in the evaluation; training uses only the others.

    The rule is ``int(sha1(word), 16) % 5 == 0`` over the word's UTF-8 bytes, with its case as
    given.
    """
    digest = hashlib.sha1(word.encode("utf-8"), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 5 == 0


@cache
def eval_words() -> tuple[str, ...]:
    """The evaluation's key words: 2,000 lower-case words of 3 to 10 letters, sorted."""
    text = resources.files("dynmask.eval").joinpath("words.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def sample_words(rng: random.Random, count: int) -> list[str]:
    """`count` distinct evaluation words.

    Raises:
        ValueError: `count` is more than the list holds.
    """
    words = eval_words()
    if count > len(words):
        raise ValueError(
            f"count={count} is more than the {len(words)} evaluation words; ask for fewer keys"
        )
    return rng.sample(words, count)


def sample_pairs(rng: random.Random, count: int) -> list[str]:
    """`count` distinct keys ``word-word``, each of two different evaluation words.

    Raises:
        ValueError: `count` is more than half the keys there are (about two million).
    """
    words = eval_words()
    if count > len(words) * (len(words) - 1) // 2:
        raise ValueError(f"count={count} keys cannot be made of {len(words)} words; ask for fewer")
    keys: dict[str, None] = {}  # a dict keeps the order of drawing, a set would not
    while len(keys) < count:
        keys["-".join(rng.sample(words, 2))] = None
    return list(keys)
