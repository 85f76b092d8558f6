import hashlib
import random

import pytest

from dynmask.eval.words import eval_words, is_eval_word, sample_pairs, sample_words


@pytest.mark.parametrize("word", ["with", "river", "House", "naïve", ""])
def test_rule_is_sha1_modulo_five(word):
    digest = hashlib.sha1(word.encode()).hexdigest()
    assert is_eval_word(word) == (int(digest, 16) % 5 == 0)


def test_rule_on_known_words():
    assert is_eval_word("with")
    assert is_eval_word("letter")
    assert not is_eval_word("window")


def test_rule_holds_out_one_word_in_five():
    held = sum(is_eval_word(f"word{i}") for i in range(5000))
    assert 900 < held < 1100


def test_list_is_made_of_evaluation_words_only():
    words = eval_words()
    assert 1500 <= len(words) <= 2500
    assert list(words) == sorted(set(words))
    assert all(word.isascii() and word.islower() and word.isalpha() for word in words)
    assert all(3 <= len(word) <= 10 for word in words)
    assert all(is_eval_word(word) for word in words)


def test_sampling_is_distinct_and_follows_the_seed():
    pairs = sample_pairs(random.Random(7), 500)
    assert len(set(pairs)) == 500
    assert pairs == sample_pairs(random.Random(7), 500)
    assert pairs != sample_pairs(random.Random(8), 500)
    for pair in pairs:
        left, right = pair.split("-")
        assert left != right
        assert is_eval_word(left)
        assert is_eval_word(right)
    assert len(set(sample_words(random.Random(7), 2000))) == 2000


@pytest.mark.parametrize("sample", [sample_words, sample_pairs])
def test_too_many_keys(sample):
    with pytest.raises(ValueError, match="fewer"):
        sample(random.Random(0), 4_000_000)
