"""The documents of both tasks: LongEval's lines, made here, so that nothing is downloaded."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from dynmask.eval import prompts
from dynmask.eval.words import sample_pairs

LINES, DOCUMENTS = 60, 4  # Some 1,300 tokens of the embedded model's.


def dataset(**kwargs: Any) -> dict[str, Dataset]:
    """Return the test split; the harness hands over its metadata, which is not needed."""
    random_ = random.Random(0)
    rows = []
    for _ in range(DOCUMENTS):
        keys = sample_pairs(random_, LINES)
        lines = [(key, random_.randint(10_000, 50_000)) for key in keys]
        asked = random_.randrange(LINES)
        choices = random_.sample([line for line in lines if line != lines[asked]], 3)
        target = random_.randrange(4)
        choices.insert(target, lines[asked])
        prompt = prompts.record(lines) + prompts.completion_question(lines[asked][0])
        rows.append({"prompt": prompt, "choices": [str(n) for _, n in choices], "target": target})
    return {"test": Dataset.from_list(rows)}
