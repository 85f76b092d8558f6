import numpy as np
import pytest

from dynmask.eval import prompts
from dynmask.train import mixture
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
