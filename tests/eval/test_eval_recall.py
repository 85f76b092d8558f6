import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from dynmask.assets import load_model, load_texts, load_tokenizer
from dynmask.eval import prompts
from dynmask.eval.needle import MAX_NEW_TOKENS
from dynmask.eval.quizzes import (
    KINDS,
    line_quizzes,
    needle_quizzes,
    pair_quizzes,
    ruler_quizzes,
)
from dynmask.eval.recall import most_likely, recall
from dynmask.eval.runner import Prefill, encode, evaluating
from dynmask.eval.words import is_eval_word

FACTS = {
    "lines": re.compile(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE),
    "minference": re.compile(r"\nThe special magic ([a-z]+) number is: (\d{7})\n"),
    "ruler": re.compile(r" One of the special magic numbers for (\S+) is: (\d{7})\."),
}
each_kind = pytest.mark.parametrize("kind", list(FACTS))
every_kind = pytest.mark.parametrize("kind", list(KINDS))
LATER = ("multikey", "multikey_2", "vt", "keyvalue")
each_later = pytest.mark.parametrize("kind", LATER)


def quizzes(tokenizer, texts, kind, *, lines=30, length=2000, n=5, questions=2, seed=0, filler=65):
    common = {"n": n, "questions": questions, "seed": seed, "filler": filler}
    if kind == "lines":
        return line_quizzes(tokenizer, texts, lines=lines, **common)
    if kind == "keyvalue":
        return pair_quizzes(tokenizer, texts, form="digits", pairs=lines, **common)
    if kind in LATER:
        return ruler_quizzes(tokenizer, texts, kind=kind, length=length, **common)
    return needle_quizzes(tokenizer, texts, form=kind, length=length, **common)


def head(tokenizer, quiz):
    """The text that the questions are about, and the text of the questions."""
    first, last = quiz.spans[0][0], quiz.spans[-1][1]
    text = tokenizer.decode(quiz.ids[:first])
    question = text.rindex("\nThe <REG" if "<REG" in text else "\nWhat is")
    return text[:question], text[question:] + tokenizer.decode(quiz.ids[first:last])


@each_kind
@pytest.mark.parametrize(("n", "questions"), [(1, 1), (7, 3), (12, 12)])
def test_quizzes(tokenizer, book, kind, n, questions):
    made = quizzes(tokenizer, book, kind, n=n, questions=questions, length=2000)
    assert sum(len(quiz.facts) for quiz in made) == n
    assert [len(quiz.facts) for quiz in made[:-1]] == [questions] * (len(made) - 1)
    assert len({quiz.ids for quiz in made}) == len(made)
    for quiz in made:
        read, asked = head(tokenizer, quiz)
        facts = [(key, int(number)) for key, number in FACTS[kind].findall(read)]
        assert len(facts) == (30 if kind == "lines" else questions)
        assert all(is_eval_word(word) for key, _ in facts for word in key.split("-"))
        assert len({fact.key for fact in quiz.facts}) == len(quiz.facts)
        for fact in quiz.facts:
            place = facts.index((fact.key, fact.expected))
            if kind == "lines":
                assert fact.depth == place / 30
            else:
                assert place - 0.2 <= fact.depth * questions < place + 1  # moved to a sentence end
        # The questions follow, each with its own answer behind it and nothing between.
        rule = KINDS[kind]
        assert asked == "".join(rule.question(f.key) + rule.answer(f.expected) for f in quiz.facts)
        answers = [tokenizer.decode(quiz.ids[start:stop]) for start, stop in quiz.spans]
        assert answers == [rule.answer(fact.expected) for fact in quiz.facts]


@pytest.mark.parametrize("form", ["minference", "ruler"])
@pytest.mark.parametrize(("length", "questions", "filler"), [(700, 1, 63), (3001, 12, 333)])
def test_the_whole_prompt_fits_its_length(tokenizer, book, form, length, questions, filler):
    made = quizzes(
        tokenizer, book, form, length=length, n=2 * questions, questions=questions, filler=filler
    )
    # `make_haystack` keeps room for a longer answer; with one question that is left over.
    assert all(length - MAX_NEW_TOKENS <= len(quiz.ids) <= length for quiz in made)


@every_kind
def test_questions_are_not_asked_in_the_order_of_their_facts(tokenizer, book, kind):
    made = quizzes(tokenizer, book, kind, n=40, questions=10, length=4500)
    orders = [[fact.depth for fact in quiz.facts] for quiz in made]
    assert all(order != sorted(order) for order in orders)


@every_kind
@pytest.mark.parametrize("filler", [1, 111])
def test_the_filler_is_a_run_of_the_texts(tokenizer, book, kind, filler):
    """So it was chosen without looking at the answers, and hides none of the keys."""
    words = " ".join(str(token) for text in book for token in encode(tokenizer, text))
    made = quizzes(tokenizer, book, kind, filler=filler)
    newline = encode(tokenizer, "\n")
    tails = [list(quiz.ids[quiz.spans[-1][1] :]) for quiz in made]
    for tail in tails:
        assert tail[: len(newline)] == newline
        run = tail[len(newline) :]
        assert len(run) == filler
        assert " ".join(map(str, run)) in words
    assert filler == 1 or len({tuple(tail) for tail in tails}) == len(tails)


def test_the_filler_changes_nothing_before_it(tokenizer, book):
    """Other texts give the same record, questions and answers."""
    others = [text.replace("river", "house") for text in book]
    pairs = zip(*(quizzes(tokenizer, t, "lines") for t in (book, others)), strict=True)
    for quiz, other in pairs:
        assert (quiz.facts, quiz.spans) == (other.facts, other.spans)
        end = quiz.spans[-1][1]
        assert quiz.ids[:end] == other.ids[:end]
        assert quiz.ids[end:] != other.ids[end:]


@every_kind
def test_quizzes_follow_the_seed(tokenizer, book, kind):
    three, four = (quizzes(tokenizer, book, kind, seed=seed) for seed in (3, 4))
    assert three == quizzes(tokenizer, book, kind, seed=3)
    for quiz, other in zip(three, four, strict=True):
        assert quiz.facts != other.facts
        assert quiz.ids[-65:] != other.ids[-65:]  # the filler
    # More questions leave the earlier prompts as they are.
    assert quizzes(tokenizer, book, kind, n=4) == quizzes(tokenizer, book, kind, n=7)[:2]


def test_special_tokens_stand_in_front_only(bos_tokenizer, book):
    for kind in KINDS:
        for quiz in quizzes(bos_tokenizer, book, kind):
            assert [place for place, token in enumerate(quiz.ids) if token == 1] == [0]


def solve(kind, read, key):
    """The answer in what is read, as a person would find it."""
    if kind == "keyvalue":
        return json.loads(read[read.index("{") :])[key]
    if kind != "vt":
        return re.search(rf"One of the special magic numbers for {key} is: (\d{{7}})\.", read)[1]
    names = []
    while line := re.search(rf"^VAR (\w+) = (?:VAR )?{key}$", read, re.MULTILINE):
        names.append(key := line[1])
    return " ".join(names)


@each_later
@pytest.mark.parametrize(("n", "questions"), [(1, 1), (7, 3), (8, 8)])
def test_later_kinds(tokenizer, book, kind, n, questions):
    """What `test_quizzes` asks of the older kinds."""
    made = quizzes(tokenizer, book, kind, n=n, questions=questions, length=4500)
    assert sum(len(quiz.facts) for quiz in made) == n
    assert [len(quiz.facts) for quiz in made[:-1]] == [questions] * (len(made) - 1)
    assert len({quiz.ids for quiz in made}) == len(made)
    rule = KINDS[kind]
    for quiz in made:
        text = tokenizer.decode(quiz.ids)
        asked = "".join(rule.question(f.key) + rule.answer(f.expected) for f in quiz.facts)
        assert text.count(asked) == 1
        read = text[: text.index(asked)]
        answers = [tokenizer.decode(quiz.ids[start:stop]) for start, stop in quiz.spans]
        assert answers == [rule.answer(fact.expected) for fact in quiz.facts]
        assert len({fact.key for fact in quiz.facts}) == len(quiz.facts)
        for fact in quiz.facts:
            assert solve(kind, read, fact.key) == fact.expected
            assert 0 <= fact.depth <= 1
        # No answer, nor a part of it, stands in another question or its answer: none to copy.
        parts = [part for fact in quiz.facts for part in str(fact.expected).split()]
        assert all(asked.count(part) == 1 for part in parts)
        words = [word for fact in quiz.facts for word in fact.key.split("-")]
        words += parts if kind == "vt" else []
        assert all(word.isdigit() or is_eval_word(word) for word in words)


@pytest.mark.parametrize("kind", ["multikey", "multikey_2", "vt"])
@pytest.mark.parametrize(("length", "questions", "filler"), [(1400, 1, 63), (4001, 8, 333)])
def test_later_kinds_fit_their_length(tokenizer, book, kind, length, questions, filler):
    made = quizzes(
        tokenizer, book, kind, length=length, n=2 * questions, questions=questions, filler=filler
    )
    assert all(length - 60 <= len(quiz.ids) <= length for quiz in made)  # less than two lines


@pytest.mark.parametrize("form", ["uuid", "digits", "words"])
def test_forms_of_pairs(tokenizer, book, form):
    settings = {"pairs": 9, "n": 4, "questions": 2, "seed": 1, "filler": 65}
    made = pair_quizzes(tokenizer, book, form=form, **settings)
    for quiz in made:
        text = tokenizer.decode(quiz.ids)
        inside = json.loads(text[text.index("{") : text.index("}") + 1])
        assert len(inside) == 9
        for fact in quiz.facts:
            assert inside[fact.key] == fact.expected
            assert fact.depth == list(inside).index(fact.key) / 9
    result = recall(Oracle(400, []), tokenizer, book, kind="keyvalue", form=form, **settings)
    assert (result.score, result.settings["form"], result.settings["pairs"]) == (1.0, form, 9)


class Oracle(torch.nn.Module):
    """Knows each prompt's next token, save at the places in `wrong`."""

    def __init__(self, vocabulary, wrong):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 1)
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=8192)
        )
        self.wrong, self.shapes = wrong, []

    def get_input_embeddings(self):
        return self.embed

    def logits(self, input_ids):
        following = torch.roll(input_ids, -1, 1)
        for place in self.wrong:
            following[0, place - 1] = 0
        return torch.nn.functional.one_hot(following, self.embed.num_embeddings).float()

    def forward(self, input_ids, use_cache, logits_to_keep=0):
        assert use_cache is False
        kept = self.logits(input_ids)[:, logits_to_keep]
        self.shapes.append(kept.shape)
        return SimpleNamespace(logits=kept)


class NoKeep(Oracle):
    """Its forward computes all logits, always."""

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits(input_ids))


@every_kind
@pytest.mark.parametrize("model_class", [Oracle, NoKeep])
def test_one_wrong_token_is_one_wrong_question(tokenizer, book, kind, model_class):
    """At the first and the last token of an answer; the tokens around the answers do not count."""
    settings = {"lines": 30, "length": 2800, "n": 5, "questions": 5, "filler": 65, "seed": 2}
    (quiz,) = quizzes(tokenizer, book, kind, **settings)
    settings["pairs"] = settings["lines"]
    starts, stops = zip(*quiz.spans, strict=True)
    around = [place for start, stop in quiz.spans for place in (start - 1, stop)]
    for wrong, hits in (
        (around, [True] * 5),
        ([starts[1]], [True, False, True, True, True]),
        ([stops[2] - 1, stops[4] - 1], [True, True, False, True, False]),
    ):
        model = model_class(400, wrong)
        result = recall(model, tokenizer, book, kind=kind, **settings)
        assert [row["correct"] for row in result.rows] == hits
        assert result.score == sum(hits) / 5
        assert [row["place"] for row in result.rows] == list(starts)
        assert [row["key"] for row in result.rows] == [fact.key for fact in quiz.facts]
        if model_class is Oracle:
            assert model.shapes == [(1, sum(stops) - sum(starts), 400)]
    assert result.prompt_tokens == len(quiz.ids)
    longest = len(quiz.ids) if kind in ("lines", "keyvalue") else settings["length"]
    assert result.settings["length"] == longest
    assert sum(part.n for part in result.parts) == 5
    json.dumps(result.to_json())


def test_progress_counts_questions(tokenizer, book):
    told = []
    recall(
        Oracle(400, []), tokenizer, book, lines=9, n=5, questions=2, filler=9,
        progress=lambda *step: told.append(step[:2]),
    )  # fmt: skip
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_most_likely_is_what_decode_says(llama, tokenizer, book):
    (quiz,) = quizzes(tokenizer, book, "lines", lines=6, n=3)[:1]
    with evaluating(llama):
        said = most_likely(llama, quiz)
        for (start, stop), tokens in zip(quiz.spans, said, strict=True):
            prefill = Prefill(llama, quiz.ids[: start - 5])
            logits = [prefill.logits(quiz.ids[start - 5 : at]) for at in range(start, stop)]
            assert tokens == [int(row.argmax()) for row in logits]


@pytest.fixture(scope="module")
def embedded():
    return load_model(), load_tokenizer(), load_texts("haystack")


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "lines", "lines": 20},
        {"kind": "ruler", "length": 1000},
        {"kind": "multikey_2", "length": 800, "n": 4},
        {"kind": "keyvalue", "pairs": 20, "form": "words", "n": 4},
    ],
    ids=lambda settings: settings["kind"],
)
def test_the_embedded_model_recalls_and_without_a_far_view_does_not(embedded, settings):
    model, tokenizer, texts = embedded
    settings = {"n": 8, "questions": 4, "filler": 65, **settings}
    result = recall(model, tokenizer, texts, **settings)
    assert (result.score, result.n) == (1.0, settings["n"])
    assert all(str(row["expected"]) in row["output"] for row in result.rows)
    # The same weights and layers, but each row sees 24 keys: a question, not the facts.
    config = model.config.to_dict() | {"sliding_window": 24, "model_type": "mistral"}
    near = MistralForCausalLM(MistralConfig.from_dict(config)).eval()
    near.load_state_dict(model.state_dict())
    assert recall(near, tokenizer, texts, **settings).score == 0
    # It is the window that fails it.
    near.config.sliding_window = None
    assert recall(near, tokenizer, texts, **settings).score == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "needles"}, "kind='needles' is unknown; choose one of lines, minference, ruler"),
        ({"n": 0}, "n=0"),
        ({"questions": 0}, "questions=0"),
        ({"filler": 0}, "filler=0"),
        ({"lines": 0}, "lines=0"),
        ({"lines": 5, "questions": 6}, "questions=6 is more than lines=5"),
        ({"lines": 400, "n": 1}, "over the model's context of 8192 tokens: take fewer lines"),
        ({"kind": "ruler", "n": 0}, "n=0"),
        ({"kind": "ruler", "questions": 0}, "questions=0"),
        ({"kind": "ruler", "filler": 0}, "filler=0"),
        ({"kind": "ruler", "length": 0}, "length=0"),
        ({"kind": "ruler", "length": 8193}, "length=8193 .*context of 8192"),
        ({"kind": "ruler", "length": 900}, "length=900 leaves .* questions=10: .*no room"),
        ({"texts": ["It was a cold day."]}, "filler=512: give more text"),
        ({"kind": "ruler", "texts": ["A day. " * 300]}, "give more text"),
        ({"kind": "vt", "n": 0}, "n=0"),
        ({"kind": "vt", "questions": 0}, "questions=0"),
        ({"kind": "vt", "filler": 0}, "filler=0"),
        ({"kind": "vt", "length": 0}, "length=0"),
        ({"kind": "multikey", "length": 8193}, "length=8193 .*context of 8192"),
        ({"kind": "multikey", "length": 900}, "length=900 leaves .* questions=10"),
        ({"kind": "keyvalue", "n": 0}, "n=0"),
        ({"kind": "keyvalue", "filler": 0}, "filler=0"),
        ({"kind": "keyvalue", "pairs": 5}, "questions=10 is more than pairs=5"),
        ({"kind": "keyvalue", "form": "hex"}, "form='hex' is unknown"),
        (
            {"kind": "keyvalue", "pairs": 600, "n": 1},
            "context of 8192 tokens: take fewer lines or p",
        ),
        ({"texts": []}, "texts have 0 tokens"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_impossible_settings(llama, tokenizer, book, settings, message):
    texts = settings.pop("texts", book)
    with pytest.raises(ValueError, match=message):
        recall(llama, tokenizer, texts, **settings)


def test_the_longest_filler_that_the_texts_hold(tokenizer, book):
    total = sum(len(encode(tokenizer, text)) for text in book)
    (quiz,) = quizzes(tokenizer, book, "lines", lines=3, n=1, filler=total)
    assert quiz.ids[-total:] == tuple(t for text in book for t in encode(tokenizer, text))
    with pytest.raises(ValueError, match=f"texts have {total} tokens, but filler={total + 1}"):
        quizzes(tokenizer, book, "lines", lines=3, n=1, filler=total + 1)
    assert prompts.LINES_HEADER in tokenizer.decode(quiz.ids)
