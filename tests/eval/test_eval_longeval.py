import importlib
import json
import re

import pytest

from dynmask.eval import prompts
from dynmask.eval.longeval import (
    integer_before_bracket,
    last_integer,
    longeval,
    make_records,
    read_records,
)
from dynmask.eval.words import is_eval_word

# `dynmask.eval.longeval` as an attribute is the function of that name.
module = importlib.import_module("dynmask.eval.longeval")


@pytest.mark.parametrize(
    ("output", "official", "completion"),
    [
        ("2416>", 2416, 2416),
        (" 2416>\nThe <REG", 2416, 2416),
        ("2416", 2416, -1),
        ("2416> or 17>", 17, 2416),
        ("24 16>", 16, -1),
        ("<2416>", 2416, -1),
        ("-5>", 5, -1),
        ("2416.5>", 5, -1),
        ("none", -1, -1),
        ("", -1, -1),
        (">", -1, -1),
        ("02416>", 2416, 2416),
    ],
)
def test_scoring_rules(output, official, completion):
    assert last_integer(output) == official
    assert integer_before_bracket(output) == completion


@pytest.mark.parametrize(("lines", "n", "questions"), [(1, 3, 1), (20, 23, 10), (65, 130, 65)])
def test_records(lines, n, questions):
    records = make_records(lines=lines, n=n, questions=questions, seed=1)
    assert sum(len(record.questions) for record in records) == n
    assert len({record.text for record in records}) == len(records)
    for record in records:
        rows = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", record.text, re.MULTILINE)
        assert len(rows) == len({key for key, _ in rows}) == lines
        assert all(1 <= int(value) <= 50_000 for _, value in rows)
        assert all(is_eval_word(word) for key, _ in rows for word in key.split("-"))
        assert len({question.position for question in record.questions}) == len(record.questions)
        for question in record.questions:
            assert rows[question.position] == (question.key, str(question.expected))


def test_depth_is_uniform():
    records = make_records(lines=50, n=1000, questions=10, seed=0)
    positions = [question.position for record in records for question in record.questions]
    assert [sum(p // 5 == i for p in positions) for i in range(10)] == [100] * 10
    assert set(positions) == set(range(50))


def test_records_follow_the_seed():
    def make(seed):
        return make_records(lines=30, n=20, questions=10, seed=seed)

    assert make(3) == make(3)
    assert make(3) != make(4)


def perfect(prefix, question):
    key = re.search(r"in line (\S+?)(?: is <|\?)", question)[1]
    number = re.search(rf"line {key}: REGISTER_CONTENT is <(\d+)>", prefix)[1]
    return f"{number}>" if question.endswith("<") else f"It is line 3: {number}"


@pytest.mark.parametrize(
    ("form", "ending", "new"),
    [
        ("completion", " is <", 10),
        ("official", "I need the number. ", 100),
        ("base", ">: <REGISTER_CONTENT> is", 15),
    ],
)
def test_a_perfect_reader_scores_one(tokenizer, llama, reader, monkeypatch, form, ending, new):
    ask = reader(perfect)
    monkeypatch.setattr(module, "ask", ask)
    result = longeval(llama, tokenizer, lines=20, n=25, questions=10, seed=0, form=form)
    assert (result.score, result.n) == (1.0, 25)
    [(asked, settings)] = ask.calls
    assert settings["max_new_tokens"] == new
    assert [len(prompt.questions) for prompt in asked] == [10, 10, 5]
    for prompt in asked:
        assert tokenizer.decode(prompt.prefix).startswith(prompts.LINES_HEADER)
        assert all(tokenizer.decode(q).endswith(ending) for q in prompt.questions)
    tokens = [len(p.prefix) + len(q) for p in asked for q in p.questions]
    assert result.prompt_tokens == pytest.approx(sum(tokens) / 25)
    assert sum(part.n for part in result.parts) == 25
    json.dumps(result.to_json())


def test_a_wrong_reader_scores_what_it_gets_right(tokenizer, llama, reader, monkeypatch):
    """Right in the first half of the record only: the parts must show it."""

    def half(prefix, question):
        answer = perfect(prefix, question)
        found = prefix.index(f"<{answer}")
        return answer if prefix[:found].count("\nline ") <= 10 else "1>"

    monkeypatch.setattr(module, "ask", reader(half))
    result = longeval(llama, tokenizer, lines=20, n=20, questions=10, seed=0)
    assert result.score == 0.5
    assert [part.score for part in result.parts] == [1.0] * 5 + [0.0] * 5
    assert [row["correct"] for row in result.rows][:10] == [True] * 5 + [False] * 5


def test_end_to_end_is_deterministic(llama, tokenizer):
    def run(seed):
        result = longeval(llama, tokenizer, lines=5, n=4, questions=2, seed=seed)
        return result.rows

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_official_cases(tmp_path, llama, tokenizer, reader, monkeypatch):
    lines = [("wide-eyed-cat", 17), ("red-dog", 9)]
    question = prompts.official_question("red-dog").rstrip(" ")  # as in the longer official files
    case = {
        "random_idx": ["red-dog", 1],
        "expected_number": 9,
        "num_lines": 2,
        "correct_line": "line red-dog: REGISTER_CONTENT is <9>\n",
        "prompt": prompts.record(lines) + question,
    }
    path = tmp_path / "2_lines.jsonl"
    path.write_text(json.dumps(case) + "\n" + json.dumps(case | {"expected_number": 8}) + "\n")
    ask = reader(perfect)
    monkeypatch.setattr(module, "ask", ask)
    result = longeval(llama, tokenizer, n=2, form="official", cases=path)
    assert (result.score, result.settings["lines"]) == (0.5, 2)
    assert [row["depth"] for row in result.rows] == [0.5, 0.5]
    prompt = ask.calls[0][0][0]
    assert tokenizer.decode(prompt.prefix) + tokenizer.decode(prompt.questions[0]) == case["prompt"]
    longeval(llama, tokenizer, n=1, form="completion", cases=path)
    assert tokenizer.decode(ask.calls[1][0][0].questions[0]) == (
        prompts.completion_question("red-dog")
    )
    with pytest.raises(ValueError, match="n=3 is more than the 2 cases"):
        read_records(path, n=3)


@pytest.mark.parametrize(
    "row",
    ["not json", "[]", '{"random_idx": ["a", 1]}',
     '{"random_idx": ["a", 1], "prompt": "x", "expected_number": 1, "num_lines": 2}'],
    ids=["text", "list", "keys-missing", "no-question"],
)  # fmt: skip
def test_bad_cases(tmp_path, row):
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ValueError, match=r"cases: .*line 1"):
        read_records(path, n=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"lines": 0}, "lines=0"),
        ({"questions": 0}, "questions=0"),
        ({"lines": 5, "questions": 6}, "questions=6 is more than lines=5"),
        ({"form": "chat"}, "form='chat' is unknown"),
        ({"lines": 500, "n": 1, "questions": 1}, "fewer lines"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_impossible_settings(llama, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        longeval(llama, tokenizer, **settings)
