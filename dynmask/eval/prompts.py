"""The exact prompt texts of the evaluations.

Every prompt is a prefix (what is read once) followed by a question (what is asked of it). Prefix
and question are tokenised apart and their ids joined, here and in training, so that many questions
can share one prefix; a tokenizer may give other ids for the joined string (two newlines at the
joint can become one token).

Sources:
    LongEval lines: DachengLi1/LongChat at 4b5faa5 (Apache-2.0),
    `longeval/evaluation/lines/testcases` and `longeval/utils.py`. Magic city numbers:
    microsoft/MInference, `experiments/needle_in_a_haystack`. Magic numbers of a key: NVIDIA/RULER,
    task `niah` with one answer.
"""

from __future__ import annotations

from collections.abc import Iterable

LINES_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each "
    "line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will "
    "ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the "
    "record start:\n\n"
)
"""What stands before the lines, byte for byte as in the official test cases."""

LINES_VALUES = (1, 50_000)
"""The lowest and the highest number of a line, both included."""

RULER_HEADER = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
"""What stands before the haystack in RULER's form."""


def record_line(key: str, value: int | str) -> str:
    """One line of the record, with its newline."""
    return f"line {key}: REGISTER_CONTENT is <{value}>\n"


def record(lines: Iterable[tuple[str, int]]) -> str:
    """The whole record: header and one line for each (key, value)."""
    return LINES_HEADER + "".join(record_line(key, value) for key, value in lines)


def official_question(key: str) -> str:
    """The question of the official cases of 200 to 600 lines, with their trailing space.

    The cases of 700 lines and more have no trailing space; they are read from their file as they
    are.
    """
    return (
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line "
        f"{key}? I need the number. "
    )


def base_question(key: str) -> str:
    """The official question and the start of an answer: LongEval's form for base models."""
    return f"{official_question(key)}Line <{key}>: <REGISTER_CONTENT> is"


def completion_question(key: str) -> str:
    """The start of a sentence that the number completes: for models that follow no instructions."""
    return f"\nThe <REGISTER_CONTENT> in line {key} is <"


def completion_answer(value: int | str) -> str:
    """What a model should put after `completion_question`."""
    return f"{value}>"


def city_needle(city: str, number: int | str) -> str:
    """MInference's needle; `number` has seven digits."""
    return f"\nThe special magic {city} number is: {number}\n"


def city_question(city: str) -> str:
    """MInference's question and the start of its answer, for base models."""
    return f"\nWhat is the special magic {city} number? The special magic {city} number is:"


def ruler_needle(key: str, value: int | str) -> str:
    """RULER's needle: one sentence; `value` has seven digits."""
    return f"One of the special magic numbers for {key} is: {value}."


def ruler_question(key: str) -> str:
    """RULER's question for one answer, with its answer prefix."""
    return (
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )


def needle_answer(number: int | str) -> str:
    """What a model should put after `city_question` or `ruler_question`."""
    return f" {number}"
