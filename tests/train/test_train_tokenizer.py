import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmask.train.tokenizer import END, PAD, train_tokenizer

SPECIAL = (END, PAD)


@pytest.fixture(scope="module")
def small():
    return train_tokenizer(["The old man walked to the river in 1893.\n" * 50], vocab_size=300)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_reversible_on_any_text(small, text):
    if any(special in text for special in SPECIAL):
        return
    ids = small(text)["input_ids"]
    assert small.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= i < len(small) for i in ids)


@pytest.mark.parametrize(
    "text", ["\ud7ff\u0000\U0010ffff", "naïve 東京 🙂", " \t\r\n\n  ", "a\u0301"], ids=ascii
)
@pytest.mark.parametrize("which", ["small", "tokenizer"], ids=["trained", "embedded"])
def test_reversible_on_hard_text(request, which, text):
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("which", ["small", "tokenizer"], ids=["trained", "embedded"])
def test_digits_stand_alone(request, which):
    tokenizer = request.getfixturevalue(which)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1893")["input_ids"]) == list("1893")
    multiple = [t for t in tokenizer.get_vocab() if sum(c.isdigit() for c in t) > 1]
    assert multiple == []


def test_special_tokens(small):
    assert len(small) <= 300
    assert small.unk_token is None
    assert (small.eos_token, small.pad_token) == SPECIAL
    assert small("river")["input_ids"] == small("river", add_special_tokens=False)["input_ids"]
    assert (small.model_max_length, small.padding_side) == (8192, "left")


@pytest.mark.parametrize("size", [257, 65536])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"vocab_size must be in .* got {size}"):
        train_tokenizer(["x"], vocab_size=size)
