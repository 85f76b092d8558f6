import importlib
import json
import re

import pytest

from dynmask.eval import keyvalue
from dynmask.eval.keyvalue import FORMS, is_right, make_stores, pair_answer, pair_question
from dynmask.eval.words import is_eval_word

# `dynmask.eval.keyvalue` as an attribute is the function of that name.
module = importlib.import_module("dynmask.eval.keyvalue")

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KEYS = {"uuid": UUID, "digits": r"\d{4}", "words": "[a-z]+-[a-z]+"}
VALUES = {"uuid": UUID, "digits": r"\d{4}", "words": r"\d{4}"}
each_form = pytest.mark.parametrize("form", FORMS)


def published(pairs, key):
    """The prompt of Lost in the Middle, built as its paper shows it."""
    rows = [f'"{name}": "{value}"' for name, value in pairs.items()]
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "JSON data:\n{" + ",\n ".join(rows) + '}\n\nKey: "' + key + '"\nCorresponding value:'
    )


def held(text):
    """The JSON object in a prompt."""
    return json.loads(text[text.index("{") :])


@each_form
@pytest.mark.parametrize(
    ("pairs", "n", "questions"), [(2, 3, 1), (8, 16, 8), (16, 5, 3), (32, 7, 7), (75, 30, 10)]
)
def test_stores(form, pairs, n, questions):
    stores = make_stores(pairs=pairs, n=n, questions=questions, seed=1, form=form)
    assert sum(len(store.asked) for store in stores) == n
    assert len({store.text for store in stores}) == len(stores)
    for store in stores:
        inside = held(store.text)
        assert len(inside) == pairs  # json keeps the last of two equal keys
        everything = [*inside, *inside.values()]
        assert len(set(everything)) == 2 * pairs
        assert all(re.fullmatch(KEYS[form], key) for key in inside)
        assert all(re.fullmatch(VALUES[form], value) for value in inside.values())
        if form == "words":
            assert all(is_eval_word(word) for key in inside for word in key.split("-"))
        assert len({pair.position for pair in store.asked}) == len(store.asked)
        for pair in store.asked:
            assert list(inside.items())[pair.position] == (pair.key, pair.value)
            assert store.text.count(f'"{pair.key}"') == store.text.count(f'"{pair.value}"') == 1
            assert store.text + pair_question(pair.key) == published(inside, pair.key)


def test_positions_are_uniform():
    stores = make_stores(pairs=40, n=800, questions=10, seed=0, form="digits")
    places = [pair.position for store in stores for pair in store.asked]
    assert [sum(place // 4 == i for place in places) for i in range(10)] == [80] * 10
    assert set(places) == set(range(40))


@each_form
def test_stores_follow_the_seed(form):
    def make(seed, n=6):
        return make_stores(pairs=9, n=n, questions=3, seed=seed, form=form)

    assert make(3) == make(3)
    assert all(one != other for one, other in zip(make(3), make(4), strict=True))
    assert make(3, n=9)[:2] == make(3)


@pytest.mark.parametrize(
    ("output", "form", "right"),
    [
        (' "1234"\n', "digits", True),
        ("1234", "digits", True),
        (' "12345"', "digits", False),
        (' "4321", "1234"', "digits", False),
        (' "1234", "4321"', "words", True),
        ("none", "digits", False),
        ("", "words", False),
    ],
)
def test_first_number(output, form, right):
    assert is_right(output, "1234", form) is right


def test_uuids_by_the_published_rule():
    value = "2a8d601d-1d69-4e64-9f90-8ad825a74195"
    assert is_right(f'The value is "{value.upper()}".', value, "uuid")
    assert is_right(f"not {value[::-1]} but {value}", value, "uuid")
    assert not is_right(f'"{value[:-1]}"', value, "uuid")


def perfect(prefix, question):
    key = re.search(r'Key: "(.+?)"', question)[1]
    return pair_answer(held(prefix)[key]) + "\n"


@each_form
def test_a_perfect_reader_scores_one(tokenizer, llama, reader, monkeypatch, form):
    ask = reader(perfect)
    monkeypatch.setattr(module, "ask", ask)
    result = keyvalue(llama, tokenizer, pairs=20, n=25, questions=10, form=form)
    assert (result.score, result.n, result.task) == (1.0, 25, "keyvalue")
    [(asked, settings)] = ask.calls
    assert settings["max_new_tokens"] == 100
    assert [len(prompt.questions) for prompt in asked] == [10, 10, 5]
    tokens = [len(p.prefix) + len(q) for p in asked for q in p.questions]
    assert result.prompt_tokens == pytest.approx(sum(tokens) / 25)
    assert result.settings["form"] == form
    json.dumps(result.to_json())


@each_form
def test_a_guesser_is_right_once_in_all_pairs(tokenizer, llama, reader, monkeypatch, form):
    """It says the first value of the object: right at the first position only."""
    first = lambda prefix, question: next(iter(held(prefix).values()))  # noqa: E731
    monkeypatch.setattr(module, "ask", reader(first))
    result = keyvalue(llama, tokenizer, pairs=20, n=40, questions=20, form=form)
    assert result.score == 1 / 20
    assert [row["correct"] for row in result.rows] == [row["position"] == 0 for row in result.rows]
    assert [part.score for part in result.parts] == [0.5] + [0.0] * 9
    assert [part.n for part in result.parts] == [4] * 10
    low, high = result.interval
    assert 0 < low < 1 / 20 < high < 0.2


def test_end_to_end_is_deterministic(llama, tokenizer):
    def run(seed):
        return keyvalue(llama, tokenizer, pairs=3, n=2, questions=2, form="digits", seed=seed).rows

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "hex"}, "form='hex' is unknown; choose one of uuid, digits, words"),
        ({"pairs": 1}, "pairs=1 must be at least 2"),
        ({"n": 0}, "n=0"),
        ({"questions": 0}, "questions=0"),
        ({"pairs": 5, "questions": 6}, "questions=6 is more than pairs=5"),
        ({"pairs": 4501, "form": "digits"}, "pairs=4501 .*up to 4500, or form='uuid'"),
        ({"pairs": 600, "n": 1, "form": "digits"}, "pairs=600: .*holds 8192; take fewer pairs"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_impossible_settings(llama, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        keyvalue(llama, tokenizer, **settings)
