import pickle
import re

import numpy as np
import pytest

from dynmask.eval.words import is_eval_word
from dynmask.train.corpus import Corpus
from dynmask.train.mixture import KINDS, Mixture, Sequences

PLANTED = {
    "needles": re.compile(
        r"The special magic (?P<key>[^\n]+?) number is: (?P<value>\d+)\n"
        r"|magic numbers for (?P<key2>\S+) is: (?P<value2>\d+)\."
    ),
    "lines": re.compile(r"line (?P<key>\S+): REGISTER_CONTENT is <(?P<value>\d+)>\n"),
    "pairs": re.compile(r'"(?P<key>\S+)": "(?P<value>\d+)",\n'),
}
ASKED = {
    "needles": re.compile(
        r"The special magic (?P<key>[^\n]+?) number is: $"
        r"|magic number for (?P<key2>\S+) mentioned in the provided text is $"
    ),
    "lines": re.compile(
        r"in line (?P<key>[a-z-]+) is <$"
        r"|\nline (?P<key2>[a-z-]+): REGISTER_CONTENT is <$"
        r"|Line <(?P<key3>[a-z-]+)>: <REGISTER_CONTENT> is <$"
    ),
    "pairs": re.compile(r'\nKey: "(?P<key>\S+)"\nCorresponding value: "$'),
}


def first_group(match, name):
    return next(v for k, v in match.groupdict().items() if k.startswith(name) and v is not None)


def runs(flags):
    """Start and stop of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


def drawn(sequences, kind, size, count):
    return [getattr(sequences, kind)(np.random.default_rng((7, i)), size) for i in range(count)]


@pytest.mark.parametrize("size", [64, 111, 512, 1000])
def test_every_sequence_is_full_and_in_range(sequences, tokenizer, size):
    ids, weights, kinds = sequences.batch(np.random.default_rng(size), 48, size)
    assert ids.shape == weights.shape == (48, size)
    assert (ids.dtype, weights.dtype) == (np.int64, np.float32)
    assert ids.min() >= 0
    assert ids.max() < len(tokenizer)
    m = sequences.mixture
    allowed = np.array([1.0, m.answer, m.noise, m.key], dtype=np.float32)
    assert np.isin(weights, allowed).all()
    assert set(kinds) == set(range(len(KINDS)))


@pytest.mark.parametrize("kind", ["needles", "lines", "pairs"])
def test_the_answer_is_the_number_planted_for_the_key(sequences, tokenizer, kind):
    answers, m = 0, sequences.mixture
    for ids, weights in drawn(sequences, kind, 1500, 40):
        groups = runs(weights == np.float32(m.answer))
        assert groups, "a sequence of this length has room for a question"
        planted = {}
        for match in PLANTED[kind].finditer(tokenizer.decode(ids[: groups[0][0]])):
            planted.setdefault(first_group(match, "key"), set()).add(first_group(match, "value"))
        for key in planted:
            for word in re.split("[- ]", key):
                assert not is_eval_word(word.lower())
        for start, stop in groups:
            asked = ASKED[kind].search(tokenizer.decode(ids[:start]))
            assert asked, tokenizer.decode(ids[start - 30 : stop])
            assert tokenizer.decode(ids[start:stop]) in planted[first_group(asked, "key")]
            assert tokenizer.decode(ids[stop])[0] in '>\n".', "the answer goes on to its end"
            answers += 1
    assert answers >= 40


@pytest.mark.parametrize("kind", ["needles", "lines", "pairs"])
def test_planted_numbers_weigh_little(sequences, tokenizer, kind):
    m = sequences.mixture
    for ids, weights in drawn(sequences, kind, 1000, 10):
        before = runs(weights == np.float32(m.answer))[0][0]
        groups = runs(weights[:before] == np.float32(m.noise))
        numbers = [tokenizer.decode(ids[start:stop]) for start, stop in groups]
        planted = PLANTED[kind].finditer(tokenizer.decode(ids[:before]))
        assert numbers == [first_group(match, "value") for match in planted]


@pytest.mark.parametrize(("kind", "start"), [("lines", "Below is a"), ("pairs", "JSON data:")])
def test_text_that_fills_up_is_closed(sequences, tokenizer, kind, start):
    filled = 0
    for ids, _ in drawn(sequences, kind, 1000, 20):
        before, found, _ = tokenizer.decode(ids).partition(start)
        assert found
        assert ids[-1] == tokenizer.eos_token_id
        if before:
            filled += 1
            assert before.endswith(tokenizer.eos_token)
    assert filled > 0


def test_needles_stand_at_sentence_ends(sequences, tokenizer):
    before = []
    for ids, weights in drawn(sequences, "needles", 1500, 20):
        stop = runs(weights == np.float32(sequences.mixture.answer))[0][0]
        text = tokenizer.decode(ids[:stop])
        for match in PLANTED["needles"].finditer(text):
            lead = re.search(r"(.)(\n| One of the special )$", text[: match.start()], re.DOTALL)
            before.append(lead[1] if lead else "")
    assert len(before) > 20
    # A needle after the last full stop of a window stands at the window's end.
    assert sum(character in (".", "\n") for character in before) > 0.8 * len(before)


def test_text_is_a_window_of_the_corpus(sequences, corpus):
    ids, weights = sequences.text(np.random.default_rng(0), 100)
    windows = np.lib.stride_tricks.sliding_window_view(corpus.tokens, 100)
    assert (windows == ids).all(1).any()
    assert (weights == 1).all()


def test_batches_follow_the_generator(sequences):
    def batch(seed):
        return sequences.batch(np.random.default_rng(seed), 6, 300)

    for a, b in zip(batch((0, 1)), batch((0, 1)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(batch((0, 1))[0], batch((0, 2))[0])
    assert not np.array_equal(batch((0, 1))[0], batch((1, 1))[0])


def test_sequences_travel_to_a_spawned_worker(sequences):
    copy = pickle.loads(pickle.dumps(sequences))
    for a, b in zip(
        sequences.batch(np.random.default_rng(3), 4, 200),
        copy.batch(np.random.default_rng(3), 4, 200),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_shares(sequences, corpus, tokenizer, kind):
    only = Mixture(**{name: float(name == kind) for name in KINDS})
    _, _, kinds = Sequences(corpus, tokenizer, only).batch(np.random.default_rng(0), 5, 64)
    assert (kinds == KINDS.index(kind)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", -0.1),
        ("noise", -1.0),
        ("answer", float("nan")),
        ("questions", (0, 4)),
        ("inserted", (5, 4)),
    ],
)
def test_wrong_mixture_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"mixture: {field}="):
        Mixture(**{field: value})


def test_no_share_at_all():
    with pytest.raises(ValueError, match="one of the shares text, needles, lines, pairs"):
        Mixture(text=0, needles=0, lines=0, pairs=0)


def test_too_little_text(sequences, corpus, tokenizer):
    few = Corpus(corpus.tokens, corpus.words[:999])
    with pytest.raises(ValueError, match=r"999 key words .* 1000 needed"):
        Sequences(few, tokenizer, Mixture())
    short = Sequences(Corpus(corpus.tokens[:511], corpus.words), tokenizer, Mixture())
    with pytest.raises(ValueError, match="511 tokens, one sequence 512"):
        short.batch(np.random.default_rng(0), 1, 512)
