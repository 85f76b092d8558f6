"""The texts are compared with literals copied from the official files, not with themselves."""

from dynmask.eval import prompts

OFFICIAL_START = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"  # noqa: E501
    "line grotesque-classmate: REGISTER_CONTENT is <42527>\n"
    "line imperfect-bull: REGISTER_CONTENT is <3119>\n"
)
OFFICIAL_END = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number. "  # noqa: E501


def test_record_is_the_official_one():
    lines = [("grotesque-classmate", 42527), ("imperfect-bull", 3119)]
    assert prompts.record(lines) == OFFICIAL_START
    assert len(prompts.LINES_HEADER) == 380


def test_line_questions():
    assert prompts.official_question("torpid-kid") == OFFICIAL_END
    assert (
        prompts.base_question("torpid-kid")
        == OFFICIAL_END + "Line <torpid-kid>: <REGISTER_CONTENT> is"
    )
    assert prompts.completion_question("a-b") == "\nThe <REGISTER_CONTENT> in line a-b is <"
    assert prompts.completion_question("a-b") + prompts.completion_answer(7) == (
        "\nThe <REGISTER_CONTENT> in line a-b is <7>"
    )


def test_needles():
    assert prompts.city_needle("Oslo", 1234567) == ("\nThe special magic Oslo number is: 1234567\n")
    assert prompts.city_question("Oslo") == (
        "\nWhat is the special magic Oslo number? The special magic Oslo number is:"
    )
    assert prompts.ruler_needle("a-b", 7654321) == (
        "One of the special magic numbers for a-b is: 7654321."
    )
    assert prompts.ruler_question("a-b") == (
        "\nWhat is the special magic number for a-b mentioned in the provided text?"
        " The special magic number for a-b mentioned in the provided text is"
    )
    assert prompts.needle_answer(7654321) == " 7654321"
