import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynmask.eval import prompts
from dynmask.eval.frequent import frequent_draft
from dynmask.eval.keyvalue import make_stores, pair_answer, pair_question
from dynmask.eval.niah import NIAH, niah_draft
from dynmask.eval.runner import encode
from dynmask.eval.tracking import tracking_draft, tracking_question
from dynmask.eval.words import is_eval_word
from dynmask.train import mixture
from dynmask.train.mixture import Mixture, Sequences
from dynmask.train.recipe import Recipe
from dynmask.train.templates import CUT, TemplateWriter, flatten, length

QUESTIONS = {
    **{f"first {name}": text for name, text in mixture.FIRST_QUESTION.items()},
    **{f"next {name}": text for name, text in mixture.NEXT_QUESTION.items()},
    "city": mixture.CITY[1] + ".",
    "ruler": mixture.RULER_QUESTION + ".",
    "pair": mixture.PAIR_QUESTION,
}
KEYS = [("zuvola", "-", "rimi"), ("window", "-", "stone"), ("Zuvola", " ", "Rimi"), ("Kelato",)]


def written(writer, template, key, value, **weights):
    words, joiner = key[::2], key[1] if len(key) > 1 else "-"
    made = writer.key(*words, joiner=joiner)
    return writer.pieces(template, made, writer.number(value), **weights)


def whole(template, key, value):
    return template.replace("{key}", "".join(key)).replace("{value}", str(value))


@pytest.fixture(scope="module")
def writer(tokenizer):
    return TemplateWriter(tokenizer)


@pytest.mark.parametrize("key", KEYS, ids="".join)
@pytest.mark.parametrize("template", QUESTIONS.values(), ids=QUESTIONS)
def test_two_questions_are_tokenised_as_the_whole_string(writer, tokenizer, template, key):
    ids, _ = flatten([*written(writer, template, key, 40721), *written(writer, template, key, 7)])
    text = whole(template, key, 40721) + whole(template, key, 7)
    expected = [i for part in text.split(CUT) for i in tokenizer(part)["input_ids"]]
    assert ids.tolist() == expected


@pytest.mark.parametrize("key", KEYS, ids="".join)
@pytest.mark.parametrize(
    ("head", "line"),
    [(prompts.LINES_HEADER, mixture.LINE), ("JSON data:\n{", mixture.PAIR_LINE)],
    ids=["lines", "pairs"],
)
def test_record_is_tokenised_as_the_whole_string(writer, tokenizer, head, line, key):
    pieces = writer.pieces(head)
    for value in (1, 50000, 38):
        pieces += written(writer, line, key, value)
    text = head + "".join(whole(line, key, value) for value in (1, 50000, 38))
    assert flatten(pieces)[0].tolist() == tokenizer(text)["input_ids"]
    assert length(pieces) == len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("key", KEYS, ids="".join)
@pytest.mark.parametrize("form", [0, 1], ids=["city", "ruler"])
def test_needle_is_tokenised_as_the_whole_string(writer, tokenizer, form, key):
    template = mixture.NEEDLES[form][0]
    ids, _ = flatten(written(writer, template, key, 1234567))
    assert tokenizer.decode(ids) == whole(template, key, 1234567)
    text = "It was late." + whole(template, key, 1234567) + "It was dark."
    expected = tokenizer("It was late.")["input_ids"] + ids.tolist()
    assert tokenizer(text)["input_ids"][: len(expected)] == expected


def test_weights_stand_at_their_slots(writer, tokenizer):
    pieces = written(
        writer, mixture.LINE, ("zuvola", "-", "rimi"), 40721, key_weight=0.25, value_weight=3.0
    )
    ids, weights = flatten(pieces)
    assert weights.dtype == np.float32
    assert tokenizer.decode(ids[weights == 3]) == "40721"
    assert tokenizer.decode(ids[weights == 0.25]) == " zuvola-rimi"
    assert tokenizer.decode(ids[weights == 1]) == "line: REGISTER_CONTENT is <>\n"


# Documents of further tasks, in the evaluation's own wording.

HEAD = {
    "niah": r"(?:Some special magic|A special magic) \w+ (?:is|are) hidden",
    "vt": "Memorize and track",
    "fwe": "Read the following coded text",
    "keyvalue": "Extract the value",
}
BEGINS = {  # a question
    "niah": r"(?=\nWhat (?:is|are all) the special)",
    "vt": r"(?=\nQuestion: )",
    "fwe": r"(?=\nQuestion: )",
    "keyvalue": r"(?=\n\nKey: )",
}
ENDS = {
    "niah": r"(?<=text is)(?= )|(?<=text are)(?= )",
    "vt": r"(?<=, they are:)",
    "fwe": r"(?<=appeared words are:)",
    "keyvalue": r"(?<=Corresponding value:)",
}


class Document:
    """A document read back: what stands before the questions, and each question with its answer."""

    def __init__(self, sequences, tokenizer, kind, seed, size=1400):
        ids, weights = getattr(sequences, kind)(np.random.default_rng((11, seed)), size)
        assert len(ids) == len(weights) == size
        assert ids[-1] == tokenizer.eos_token_id
        ends = np.flatnonzero(ids[:-1] == tokenizer.eos_token_id)
        start = ends[-1] + 1 if len(ends) else 0
        self.ids, self.weights = ids[start:-1], weights[start:-1]
        text = tokenizer.decode(self.ids)
        head = [match.start() for match in re.finditer(HEAD[kind], text)][-1]
        rest, *asked = re.split(BEGINS[kind], text[head:])
        self.before = text[:head]
        self.prefix = text[:head] + rest
        self.asked = [tuple(re.split(ENDS[kind], question, maxsplit=1)) for question in asked]
        assert self.asked


def documents(sequences, tokenizer, kind, count=30, **size):
    for seed in range(count):
        yield Document(sequences, tokenizer, kind, seed, **size)


@pytest.mark.parametrize("kind", mixture.TASKS)
def test_documents_are_tokenised_as_the_evaluation_does(sequences, tokenizer, kind):
    whole = 0
    for document in documents(sequences, tokenizer, kind):
        prefix = encode(tokenizer, document.prefix)
        asked = [i for parts in document.asked for part in parts for i in encode(tokenizer, part)]
        ids = document.ids.tolist()
        assert ids[-len(asked) :] == asked
        # A book is cut anywhere, and so its first token may be none that the text would have.
        whole += ids == [*prefix, *asked]
    assert whole >= (8 if kind == "niah" else 30)


@pytest.mark.parametrize("kind", mixture.TASKS)
def test_answers_weigh_most_and_random_things_little(sequences, tokenizer, kind):
    m = sequences.mixture
    for document in documents(sequences, tokenizer, kind, 10):
        answers = "".join(answer for _, answer in document.asked)
        said = tokenizer.decode(document.ids[document.weights == m.answer])
        assert re.findall(r"\w", said)[-3:] == re.findall(r"\w", answers)[-3:]
        assert (document.weights < 1).any()


def test_needles_answer_with_all_values_in_order(sequences, tokenizer):
    several = 0
    for document in documents(sequences, tokenizer, "niah", 60):
        found = re.findall(r"magic (?:numbers|uuids) for (\S+) is: (\S+)\.", document.prefix)
        values = [value for _, value in found]
        assert len(set(values)) == len(values)
        for question, answer in document.asked:
            keys = re.search(r"for (.*) mentioned .* for (.*) mentioned", question)
            assert keys[1] == keys[2]
            keys = re.split(", and |, ", keys[1])
            expected = [value for key in keys for k, value in found if k == key]
            assert len(expected) >= len(keys)
            assert re.split(", and |, ", answer.strip(" .")) == expected
            several += len(expected) > 1
            words = [word for key in keys if key.count("-") == 1 for word in key.split("-")]
            assert not any(map(is_eval_word, words))
    assert several > 20


def test_chains_are_answered_from_their_value_on(sequences, tokenizer):
    for document in documents(sequences, tokenizer, "vt"):
        hay = document.prefix[len(document.before) :]
        later = re.findall(r"VAR (\w+) = VAR (\w+)", hay)
        first = re.findall(r"VAR (\w+) = (\d+)", hay)
        follows = {before: name for name, before in later}
        assert len(follows) == len(later), "a name is handed on once"
        for question, answer in document.asked:
            (value,) = set(re.findall(r"\d{5}", question))
            (chain,) = [[name] for name, number in first if number == value]
            while chain[-1] in follows:
                chain.append(follows[chain[-1]])
            assert answer.split() == chain
            assert len(chain) == 5
            assert not any(map(is_eval_word, chain))


def test_frequent_words_are_the_answer(sequences, tokenizer):
    for document in documents(sequences, tokenizer, "fwe"):
        words = re.findall(r"\b[a-z]{6}\b", document.prefix.partition("coded words. ")[2])
        most = Counter(words).most_common(4)
        assert document.asked[0][1].split() == [word for word, _ in most[:3]]
        counts = [count for _, count in most]
        assert len(set(counts)) == 4
        assert not any(map(is_eval_word, set(words)))


def test_objects_answer_for_their_key(sequences, tokenizer):
    forms = Counter()
    for document in documents(sequences, tokenizer, "keyvalue", 50):
        pairs = json.loads(
            document.prefix[document.prefix.index("{") :], object_pairs_hook=lambda x: x
        )
        said = [string for pair in pairs for string in pair]
        assert len(said) == len(set(said)) or not said[0].isdigit()
        assert len(dict(pairs)) == len(pairs)
        for question, answer in document.asked:
            key = re.search('"(.*)"', question)[1]
            assert question == pair_question(key)
            assert answer == pair_answer(dict(pairs)[key])
            if len(key) == 4 or key.count("-") == 1:  # Random hex digits need no rule.
                assert not any(is_eval_word(part) for part in key.split("-"))
        forms[len(said[0].split("-")), len(said[0]) == 4] += 1
    assert len(forms) >= 4, "digits, words, eight hex digits, UUIDs"


def test_wording_is_the_evaluations(sequences, tokenizer):
    texts = ["It was late. " * 50]
    heads = {
        niah_draft(rule, texts, questions=1, rng=random.Random(0)).header for rule in NIAH.values()
    }
    for document in documents(sequences, tokenizer, "niah", 12):
        assert any(document.prefix.startswith(head) for head in heads)
    example = tracking_draft(questions=1, rng=random.Random(0)).header
    for document in documents(sequences, tokenizer, "vt", 12):
        assert document.prefix[len(document.before) :].startswith(example[: example.index("\n")])
        for question, _ in document.asked:
            assert question == tracking_question(re.search(r"\d+", question)[0])
    draft = frequent_draft(length=512, rng=random.Random(0))
    (document,) = documents(sequences, tokenizer, "fwe", 1)
    assert document.prefix.startswith(draft.header)
    assert document.asked[0][0] == draft.questions[0].text
    (store,) = make_stores(pairs=2, n=1, questions=1, seed=0)
    (document,) = documents(sequences, tokenizer, "keyvalue", 1)
    assert document.prefix.startswith(store.text.partition("{")[0])


@pytest.mark.parametrize("kind", mixture.TASKS)
@pytest.mark.parametrize("size", [64, 111, 300, 2049])
def test_documents_fill_any_size(sequences, tokenizer, kind, size):
    for seed in range(8):
        ids, weights = getattr(sequences, kind)(np.random.default_rng((3, seed)), size)
        assert ids.shape == weights.shape == (size,)
        assert ids.max() < len(tokenizer)


def test_a_mixture_without_tasks_draws_as_ever(sequences):
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    _, _, kinds = sequences.batch(rng, 200, 64)
    shares = np.array([getattr(Mixture(), kind) for kind in mixture.KINDS])
    np.testing.assert_array_equal(kinds, again.choice(4, size=200, p=shares / shares.sum()))


def test_shares_of_tasks(corpus, tokenizer):
    others = dict.fromkeys(mixture.KINDS, 0)
    some = Sequences(corpus, tokenizer, Mixture(**others, niah=1, vt=1, fwe=1, keyvalue=1))
    _, _, kinds = some.batch(np.random.default_rng(0), 40, 200)
    assert set(kinds) == {4, 5, 6, 7}
    assert [some.kinds[kind] for kind in (4, 5, 6, 7)] == list(mixture.TASKS)
    with pytest.raises(ValueError, match="mixture: vt=-1"):
        Mixture(vt=-1)


@pytest.mark.parametrize(
    ("name", "millions", "groups", "context"),
    [("28M", (25, 30), 4, 16384), ("mha", (10, 20), 1, 8192)],
)
def test_recipes_with_all_tasks(name, millions, groups, context):
    recipe = Recipe.load(name)
    fields = {key: value for key, value in recipe.model.items() if key != "type"}
    config = LlamaConfig(vocab_size=4096, **fields)
    with torch.device("meta"):
        size = LlamaForCausalLM(config).num_parameters() / 1e6
    assert millions[0] <= size <= millions[1]
    assert config.num_attention_heads // config.num_key_value_heads == groups
    assert recipe.longest == config.max_position_embeddings == context
    assert all(
        getattr(recipe.data.mixture, kind) > 0
        for kind in itertools.chain(mixture.KINDS, mixture.TASKS)
    )
