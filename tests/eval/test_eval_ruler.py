import importlib
import itertools
import json
import random
import re
from collections import Counter

import pytest

from dynmask.eval import niah, prompts, ruler, wilson
from dynmask.eval.haystacks import Book, Coded, Draft, Filled, Lines, Question, fill
from dynmask.eval.niah import NIAH, NOISE, header, needle, niah_draft
from dynmask.eval.niah import question as niah_question
from dynmask.eval.ruler import NEW_TOKENS, make_draft, string_match_all
from dynmask.eval.runner import encode
from dynmask.eval.words import is_eval_word

# `dynmask.eval.ruler` as an attribute is the function of that name.
module = importlib.import_module("dynmask.eval.ruler")

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(rf"One of the special magic (\w+) for (\S+) is: (\d{{7}}|{UUID})\.")
VT_HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text."
each_kind = pytest.mark.parametrize("kind", list(NEW_TOKENS))
each_niah = pytest.mark.parametrize("kind", list(NIAH))


def made(tokenizer, texts, kind, *, length=1600, questions=1, seed=0):
    rng = random.Random(seed)
    draft = make_draft(kind, texts, length=length, questions=questions, rng=rng)
    asked = max(len(encode(tokenizer, question.text)) for question in draft.questions)
    room = length - NEW_TOKENS[kind] - asked
    return draft, fill(tokenizer, draft, room=room, length=length), room


def values_of(text):
    """By key, the values that a text gives it, in their order."""
    found = {}
    for _, key, value in NEEDLE.findall(text):
        found.setdefault(key, []).append(value)
    return found


def chain_from(text, value):
    """The names that a value is handed on to, in the last of a text's problems."""
    lines = text.rpartition(VT_HEADER)[2].splitlines()
    owner = {}
    for line in lines:
        if match := re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)", line):
            assert match[2] not in owner, "a value is handed on once"
            assert match[2].isdigit() or match[2] in owner.values(), "before it is there"
            owner[match[2]] = match[1]
    names = []
    while value in owner:
        value = owner[value]
        names.append(value)
    return names


def most_frequent(text):
    """Words by how often they stand in a coded text, dots left out."""
    counts = Counter(text.partition("coded words. ")[2].split())
    del counts["..."]
    return counts.most_common()


def solve(prefix, question):
    """All right answers, found in the prompt alone."""
    if "variables" in question:
        return chain_from(prefix, re.search(r"value (\d+)", question)[1])
    if "frequently" in question:
        return [word for word, _ in most_frequent(prefix)[:3]]
    keys = re.search(r" for (.+?) mentioned", question)[1]
    found = values_of(prefix)
    return [value for key in re.split(r", and |, ", keys) for value in found[key]]


@pytest.mark.parametrize(
    ("output", "gold", "share"),
    [
        (" 1234567, 7654321.", ["1234567", "7654321"], 1.0),
        (" 1234567, 7654321.", ["1234567", "1111111"], 0.5),
        ("aBcDe", ["ABCDE"], 1.0),
        ("x abcde5 y", ["ABCDE", "q", "r", "s"], 0.25),
        ("", ["ABCDE"], 0.0),
    ],
)
def test_string_match_all(output, gold, share):
    assert string_match_all(output, gold) == share


def test_wording_is_that_of_the_needles():
    """With one number, RULER's task is the form that `needle` has; the others are as published."""
    one, four = NIAH["multikey"], NIAH["multiquery"]
    assert header(one) == prompts.RULER_HEADER
    assert niah_question(one, "a-b") == prompts.ruler_question("a-b")
    assert header(four) == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\n"
    )
    draft = niah_draft(four, ["A book. "], questions=1, rng=random.Random(0))
    a, b, c, d = draft.questions[0].key.replace(" and", "").split(", ")
    about = f"the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text"
    assert draft.questions[0].text == f"\nWhat are all {about}? T{about[1:]} are"
    uuids = NIAH["multikey_3"]
    assert "magic uuid is hidden" in header(uuids)
    assert niah_question(uuids, "k").endswith(
        "special magic uuid for k mentioned in the provided text is"
    )
    assert needle(one, "a-b", "1234567") == prompts.ruler_needle("a-b", 1234567)
    assert needle(uuids, "k", "v") == "One of the special magic uuids for k is: v."


@each_kind
@pytest.mark.parametrize(("length", "questions"), [(1600, 1), (3001, 3)])
def test_a_prompt_holds_its_answers_and_fits(tokenizer, book, kind, length, questions):
    if kind == "fwe":
        questions = 1
    draft, hay, room = made(tokenizer, book, kind, length=length, questions=questions)
    assert tuple(encode(tokenizer, hay.text)) == hay.ids
    line = 120  # no hay's lines or coded words are longer, in tokens
    assert room - line <= len(hay.ids) <= room
    assert len(draft.questions) == questions
    assert len({question.key for question in draft.questions}) == questions
    everything = [string for question in draft.questions for string in question.gold]
    assert len(set(everything)) == len(everything)
    for question in draft.questions:
        assert solve(hay.text, question.text) == list(question.gold) or (
            kind == "multivalue" and sorted(solve(hay.text, question.text)) == sorted(question.gold)
        )
        if kind == "fwe":
            continue
        for string, place in zip(question.gold, question.needles, strict=True):
            assert string in draft.hidden[place]
            assert hay.text.count(draft.hidden[place]) == 1
        assert hay.depths_of(question) == [hay.depths[place] for place in question.needles]


@each_niah
@pytest.mark.parametrize("questions", [1, 3])
def test_needles(tokenizer, book, kind, questions):
    rule = NIAH[kind]
    draft, hay, _ = made(tokenizer, book, kind, length=3001, questions=questions)
    found = NEEDLE.findall(hay.text)
    assert len(draft.hidden) == questions * rule.keys * rule.values
    assert (len(found) > len(draft.hidden)) == (rule.hay == "needles")
    assert {noun for noun, _, _ in found} == {rule.nouns[1]}
    keys = {key for _, key, _ in found}
    assert len(keys) * rule.values == len({value for _, _, value in found}) == len(found)
    if not rule.uuid_keys:
        assert all(is_eval_word(word) for key in keys for word in key.split("-"))
    assert all(re.fullmatch(UUID, value) for _, _, value in found) == rule.uuid_values
    body = hay.text.removeprefix(header(rule))
    if rule.hay == "book":
        bare = NEEDLE.sub("", body.replace(" One of", "One of"))
        assert any(bare[:200] in text for text in book)
        for hidden, depth in zip(draft.hidden, hay.depths, strict=True):
            before = NEEDLE.sub("", body.partition(f" {hidden}")[0].replace(" One of", "One of"))
            assert not before or before[-1] in ".!?"
            assert depth == pytest.approx(len(before) / len(bare))
    else:
        lines = body.split("\n")
        own = [line for line in lines if line not in draft.hidden]
        assert all(NEEDLE.fullmatch(line) for line in own) or set(own) == {NOISE}
        for hidden, depth in zip(draft.hidden, hay.depths, strict=True):
            before = [line for line in lines[: lines.index(hidden)] if line in own]
            assert depth == pytest.approx(len(before) / len(own))
    # Moved back to the end of a sentence (of at most 60 characters) or of a line.
    step = 60 / len(bare) if rule.hay == "book" else 1 / len(own)
    for wanted, depth in zip(draft.depths, hay.depths, strict=True):
        assert wanted - step < depth <= wanted


@each_niah
def test_depths_are_spread_and_needles_in_random_order(tokenizer, book, kind):
    order, depths = set(), []
    for seed in range(12):
        draft = niah_draft(NIAH[kind], book, questions=2, rng=random.Random(seed))
        order.add(tuple(place for question in draft.questions for place in question.needles))
        depths.append(draft.depths)
    assert len(order) > 1  # RULER's own order is the same in every sample
    for row in depths:
        assert all(i / len(row) <= depth < (i + 1) / len(row) for i, depth in enumerate(row))
    assert len(set(depths)) == 12


def test_hay_of_needles_gives_no_asked_key_a_second_value(tokenizer, monkeypatch):
    """Among so few keys, hay drawn without care would hold some that are asked for."""
    keys = [f"key-{number}" for number in range(300)]
    monkeypatch.setattr(niah, "sample_pairs", lambda rng, count: rng.sample(keys, count))
    draft = niah_draft(NIAH["multikey_2"], [], questions=100, rng=random.Random(0))
    text, _ = draft.hay.fill(tokenizer, 2500, hidden=draft.hidden, depths=draft.depths)
    found = [key for _, key, _ in NEEDLE.findall(text)]
    assert len(found) == len(set(found)) > 130


@pytest.mark.parametrize("questions", [1, 4])
def test_chains(tokenizer, book, questions):
    draft, hay, _ = made(tokenizer, book, "vt", length=3500, questions=questions)
    example, mark, problem = hay.text.rpartition(VT_HEADER)
    assert mark
    # The example is one more problem, with its question and its answer.
    assert example.startswith(VT_HEADER)
    assert example.count(VT_HEADER) == 1
    value = re.search(r"assigned the value (\d+) in the text", example)[1]
    answer = example.rpartition("they are:")[2]
    assert answer == f" {' '.join(chain_from(example, value))}\n\n"
    assert len(answer.split()) == 5
    assert {question.key for question in draft.questions}.isdisjoint({value})
    names = [name for question in draft.questions for name in question.gold]
    assert len(set(names)) == len(names) == 5 * questions
    assert all(is_eval_word(name) and re.fullmatch("[A-Z]{5}", name) for name in names)
    assert problem.count("VAR") == questions * 9
    for question in draft.questions:
        depths = hay.depths_of(question)
        assert depths == sorted(depths)
    assert {line for line in problem.split("\n") if line and "VAR" not in line} == {NOISE}


@pytest.mark.parametrize("length", [700, 1600, 3001])
def test_frequent_words(tokenizer, book, length):
    draft, hay, _ = made(tokenizer, book, "fwe", length=length)
    counts = most_frequent(hay.text)
    assert [word for word, _ in counts[:3]] == list(draft.questions[0].gold)
    assert counts[2][1] > counts[3][1]
    assert all(is_eval_word(word) and re.fullmatch("[a-z]{6}", word) for word, _ in counts)
    # zeta(2) is pi^2 / 6 = 1.644934: of N words, rank 1 (the dots) has N / 1.64.
    dots = hay.text.split().count("...")
    for rank, (_, count) in enumerate(counts, 2):
        assert (dots - 1) // rank**2 - 1 <= count <= (dots + 1) / rank**2
    words = hay.text.partition("coded words. ")[2].split()
    assert words != sorted(words)


@each_kind
def test_a_perfect_reader_scores_one(tokenizer, llama, reader, book, monkeypatch, kind):
    ask = reader(lambda prefix, question: " " + ", ".join(solve(prefix, question)).lower() + "\n")
    monkeypatch.setattr(module, "ask", ask)
    questions = 1 if kind == "fwe" else 2
    result = ruler(llama, tokenizer, book, kind=kind, length=2222, n=5, questions=questions)
    assert (result.score, result.n, result.metrics["all_found"]) == (1.0, 5, 1.0)
    assert result.interval == wilson(5, 5)
    [(asked, settings)] = ask.calls
    assert settings["max_new_tokens"] == NEW_TOKENS[kind] == result.settings["max_new_tokens"]
    assert [len(prompt.questions) for prompt in asked] == ([1] * 5 if kind == "fwe" else [2, 2, 1])
    assert all(row["prompt_tokens"] + NEW_TOKENS[kind] <= 2222 for row in result.rows)
    strings = sum(len(row["expected"]) for row in result.rows)
    assert sum(part.n for part in result.parts) == (0 if kind == "fwe" else strings)
    json.dumps(result.to_json())


@pytest.mark.parametrize("kind", ["multivalue", "multiquery", "vt", "fwe"])
def test_a_part_of_an_answer_is_a_part_of_the_score(
    tokenizer, llama, reader, book, monkeypatch, kind
):
    """A reader that says only the first string: the share counts, and no question is all found."""
    ask = reader(lambda prefix, question: solve(prefix, question)[0])
    monkeypatch.setattr(module, "ask", ask)
    result = ruler(llama, tokenizer, book, kind=kind, length=2222, n=6)
    strings = {"vt": 5, "fwe": 3}.get(kind, 4)
    assert result.score == pytest.approx(1 / strings)
    assert result.metrics["all_found"] == 0
    assert result.interval == pytest.approx(wilson(6 / strings, 6))
    assert all(sum(row["found"]) == 1 and not row["correct"] for row in result.rows)
    if kind != "fwe":
        depths = [(d, f) for r in result.rows for d, f in zip(r["depths"], r["found"], strict=True)]
        for i, part in enumerate(result.parts):
            hits = [found for depth, found in depths if i <= 10 * depth < i + 1]
            assert (part.n, part.score) == (len(hits), sum(hits) / len(hits) if hits else None)


@pytest.mark.parametrize("kind", ["multikey", "multikey_2"])
def test_a_guesser_is_right_as_often_as_it_happens_to_be(
    tokenizer, llama, reader, book, monkeypatch, kind
):
    """It always says the first value in the prompt, so it is right where that is asked for."""
    ask = reader(lambda prefix, question: NEEDLE.search(prefix)[3])
    monkeypatch.setattr(module, "ask", ask)
    result = ruler(llama, tokenizer, book, kind=kind, length=1111, n=40)
    said = [NEEDLE.search(tokenizer.decode(prompt.prefix))[3] for prompt in ask.calls[0][0]]
    lucky = [[value] == row["expected"] for value, row in zip(said, result.rows, strict=True)]
    assert [row["correct"] for row in result.rows] == lucky
    assert result.score == sum(lucky) / 40
    assert result.interval == wilson(sum(lucky), 40)
    low, high = (0.1, 0.45) if kind == "multikey" else (0.0, 0.2)  # chance: 1 in 4, 1 in some 20
    assert low <= result.score <= high


@each_kind
def test_end_to_end_follows_the_seed(llama, tokenizer, book, kind, monkeypatch, reader):
    ask = reader(lambda prefix, question: "")
    monkeypatch.setattr(module, "ask", ask)

    def run(seed, n=2):
        ruler(llama, tokenizer, book, kind=kind, length=1600, n=n, seed=seed)
        return ask.calls[-1][0]

    one = run(1)
    assert one == run(1)
    assert one != run(2)
    assert run(1, n=3)[:2] == one  # more questions leave the earlier prompts as they are
    assert one[0] != one[1]


def test_with_a_model(llama, tokenizer, book):
    told = []
    result = ruler(
        llama, tokenizer, book, kind="single_1", length=400, n=2, questions=2,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert (result.score, result.n) == (0.0, 2)
    assert told == [(1, 2, "RULER single_1, 400 tokens"), (2, 2, "RULER single_1, 400 tokens")]


def test_special_tokens_stand_in_front_only(bos_tokenizer, book):
    for kind in NEW_TOKENS:
        _, hay, room = made(bos_tokenizer, book, kind)
        assert [place for place, token in enumerate(hay.ids) if token == 1] == [0]
        assert len(hay.ids) <= room


class Joint:
    """A hay whose text has more tokens than were asked for, as with joints that cost some."""

    def __init__(self):
        self.asked = []

    def fill(self, tokenizer, tokens, *, hidden, depths):
        self.asked.append(tokens)
        return " a" * (tokens + 30 // len(self.asked)), []


def test_hay_is_cut_until_it_fits(tokenizer):
    hay = Joint()
    draft = Draft("", hay, (), (), (Question("k", "?", ("a",)),))
    filled = fill(tokenizer, draft, room=100, length=200)
    assert len(filled.ids) <= 100
    assert len(hay.asked) > 1
    assert hay.asked == sorted(set(hay.asked), reverse=True)


@pytest.mark.parametrize("tokens", [1, 63, 65, 111, 1000])
def test_every_hay_gives_about_the_tokens_asked_for(tokenizer, book, tokens):
    words = ["...", *(f"word{letter}" for letter in "abcdefgh")]
    for hay in (
        Book(book, random.Random(0)),
        Lines(f"line {i}" for i in itertools.count()),
        Coded(words, alpha=2.0, zeta=1.6449, seed="0"),
    ):
        text, _ = hay.fill(tokenizer, tokens, hidden=(), depths=())
        assert text == hay.fill(tokenizer, tokens, hidden=(), depths=())[0]
        got = len(encode(tokenizer, text))
        assert got <= tokens + 1
        assert not text or got >= tokens - 40
        assert text or tokens < 1000


def test_depths_of():
    filled = Filled("", (), (0.1, 0.2, 0.3))
    assert filled.depths_of(Question("k", "?", ("a", "b"), (2, 0))) == [0.3, 0.1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cwe"}, "kind='cwe' is unknown; choose one of single_1, .*multikey, .*vt, fwe"),
        ({"n": 0}, "n=0"),
        ({"questions": 0}, "questions=0"),
        ({"length": 0}, "length=0"),
        ({"length": 8193}, "length=8193 is over the model's context of 8192"),
        ({"length": 200}, "length=200 leaves .* questions=1: take a greater length"),
        ({"length": 100, "kind": "vt"}, "length=100 leaves 0 tokens"),
        ({"length": 300, "kind": "fwe"}, "length=300 leaves"),
        ({"length": 900, "questions": 9}, "length=900 .*questions=9: .*fewer questions"),
        ({"kind": "fwe", "questions": 2}, "questions=2: .*'fwe'"),
        ({"texts": []}, "texts is empty"),
        ({"texts": ["It was a cold day."]}, "give more text"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_impossible_settings(llama, tokenizer, book, settings, message):
    texts = settings.pop("texts", book)
    with pytest.raises(ValueError, match=message):
        ruler(llama, tokenizer, texts, **settings)


def test_noise_needs_no_text(llama, tokenizer, monkeypatch, reader):
    monkeypatch.setattr(module, "ask", reader(lambda prefix, question: solve(prefix, question)[0]))
    for kind in ("single_1", "multikey_2", "multikey_3", "vt", "fwe"):
        assert ruler(llama, tokenizer, [], kind=kind, length=1600, n=1).score > 0
