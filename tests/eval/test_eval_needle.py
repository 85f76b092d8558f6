import importlib
import random
import re

import pytest

from dynmask.eval import prompts
from dynmask.eval.needle import MAX_NEW_TOKENS, make_haystack, needle, place, sentence_end_before
from dynmask.eval.runner import encode
from dynmask.eval.words import is_eval_word

# `dynmask.eval.needle` as an attribute is the function of that name.
module = importlib.import_module("dynmask.eval.needle")

TEXT = 'One two. "Three four!" Five 6.7 six? Seven'


@pytest.mark.parametrize(
    ("position", "before"),
    [(0, ""), (7, ""), (8, "One two."), (20, "One two."), (22, 'One two. "Three four!"'),
     (35, 'One two. "Three four!"'), (36, 'One two. "Three four!" Five 6.7 six?'),
     (len(TEXT), 'One two. "Three four!" Five 6.7 six?')],
)  # fmt: skip
def test_moves_back_to_a_sentence_end(position, before):
    assert TEXT[: sentence_end_before(TEXT, position)] == before


def test_place():
    text, depths = place(TEXT, ["[a]", "[b]", "[c]", "[d]"], [0.1, 0.5, 0.55, 0.6])
    assert text == '[a]One two.[b] "Three four!"[c][d] Five 6.7 six? Seven'
    assert depths == [0.0, 8 / 42, 22 / 42, 22 / 42]


PATTERNS = {
    "minference": re.compile(r"\nThe special magic ([a-z]+) number is: (\d{7})\n"),
    "ruler": re.compile(r" One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\."),
}


@pytest.mark.parametrize("form", list(PATTERNS))
@pytest.mark.parametrize(("length", "needles"), [(400, 1), (1000, 5), (3001, 12)])
def test_haystack(tokenizer, book, form, length, needles):
    rng = random.Random(0)
    hay = make_haystack(tokenizer, book, length=length, needles=needles, rng=rng, form=form)
    found = list(PATTERNS[form].finditer(hay.text))
    assert [(m[1], int(m[2])) for m in found] == [(x.key, x.number) for x in hay.needles]
    assert len({x.key for x in hay.needles}) == len({x.number for x in hay.needles}) == needles
    assert all(is_eval_word(word) for x in hay.needles for word in x.key.split("-"))
    assert tuple(encode(tokenizer, hay.text)) == hay.ids
    question = max(len(encode(tokenizer, module.FORMS[form].question(x.key))) for x in hay.needles)
    total = len(hay.ids) + question + MAX_NEW_TOKENS
    assert length - 12 <= total <= length
    header = module.FORMS[form].header
    assert hay.text.startswith(header)
    bare = PATTERNS[form].sub("", hay.text)[len(header) :]
    assert any(bare[:200] in text for text in book)
    for i, (match, hidden) in enumerate(zip(found, hay.needles, strict=True)):
        before = PATTERNS[form].sub("", hay.text[: match.start()])[len(header) :]
        assert before == "" or before[-1] in ".!?"
        assert hidden.depth == pytest.approx(len(before) / len(bare))
        # One sentence of these texts has at most 60 characters.
        assert i / needles - 60 / len(bare) <= hidden.depth < (i + 1) / needles


def test_haystack_follows_the_seed(tokenizer, book):
    def make(seed):
        rng = random.Random(seed)
        return make_haystack(tokenizer, book, length=500, needles=2, rng=rng)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_haystack_goes_on_into_the_next_text(tokenizer, book):
    total = sum(len(encode(tokenizer, text)) for text in book)
    rng = random.Random(3)
    hay = make_haystack(tokenizer, book, length=total - 100, needles=1, rng=rng)
    assert "old man of house" in hay.text
    assert "cold day, number" in hay.text


def perfect(prefix, question):
    key = re.search(r"(?:magic|number for) ([a-z]+(?:-[a-z]+)?) (?:number\?|mentioned)", question)[
        1
    ]
    return " " + re.search(rf"(?:magic {key} number|for {key}) is: (\d+)", prefix)[1] + "\n"


@pytest.mark.parametrize("form", list(PATTERNS))
def test_a_perfect_reader_scores_one(tokenizer, llama, reader, book, monkeypatch, form):
    ask = reader(perfect)
    monkeypatch.setattr(module, "ask", ask)
    result = needle(llama, tokenizer, book, length=700, n=8, needles=3, seed=0, form=form)
    assert (result.score, result.n) == (1.0, 8)
    assert [len(prompt.questions) for prompt in ask.calls[0][0]] == [3, 3, 2]
    assert all(row["prompt_tokens"] + MAX_NEW_TOKENS <= 700 for row in result.rows)
    assert sum(part.n for part in result.parts) == 8


@pytest.mark.parametrize(("said", "score"), [("{} it is", 1.0), ("1{}2", 1.0), ("none", 0.0)])
def test_score_is_a_substring(tokenizer, llama, reader, book, monkeypatch, said, score):
    ask = reader(lambda prefix, question: said.format(perfect(prefix, question).strip()))
    monkeypatch.setattr(module, "ask", ask)
    assert needle(llama, tokenizer, book, length=600, n=3, needles=3).score == score


def test_end_to_end_is_deterministic(llama, tokenizer, book):
    def run(seed):
        return needle(llama, tokenizer, book, length=300, n=2, needles=2, seed=seed).rows

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"needles": 0}, "needles=0"),
        ({"length": 0}, "length=0"),
        ({"length": 8193}, "length=8193 is over the model's context of 8192"),
        ({"length": 100}, "no room for 5 needles"),
        ({"form": "essay"}, "form='essay' is unknown"),
        ({"texts": ["It was a cold day."]}, "give more text"),
        ({"texts": []}, "texts is empty"),
        ({"texts": [" "]}, "texts is empty"),
        ({"texts": "It was a cold day. " * 3000}, "one string"),
    ],
    ids=["n", "needles", "length", "context", "room", "form", "short", "no-texts", "blank", "one"],
)
def test_impossible_settings(llama, tokenizer, book, settings, message):
    texts = settings.pop("texts", book)
    with pytest.raises(ValueError, match=message):
        needle(llama, tokenizer, texts, **settings)


def test_haystack_fits_when_the_first_cut_is_too_long(tokenizer, book, monkeypatch):
    """As with a tokenizer whose joints cost tokens: the cut must shrink until the prompt fits."""
    cut = module.cut_to
    budgets = []

    def too_long(tokenizer, text, tokens):
        budgets.append(tokens)
        return cut(tokenizer, text, tokens + 40 // len(budgets))

    monkeypatch.setattr(module, "cut_to", too_long)
    hay = make_haystack(tokenizer, book, length=600, needles=2, rng=random.Random(0))
    assert len(budgets) > 1
    assert budgets == sorted(set(budgets), reverse=True)
    question = max(len(encode(tokenizer, prompts.city_question(x.key))) for x in hay.needles)
    assert len(hay.ids) + question + MAX_NEW_TOKENS <= 600
