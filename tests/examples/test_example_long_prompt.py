"""examples/long_prompt_capped_cache.py finds the answer with a part of the cache."""

import re


def test_capped_cache_answers_from_a_quarter(example, capsys):
    example("long_prompt_capped_cache").main(["--lines", "50", "--slots", "256"])
    printed = capsys.readouterr().out
    tokens, value = re.search(r"(\d+) tokens; the answer is (\d+)", printed).groups()
    found = re.findall(r"(\w+): '(\d+)>.*', ([\d.]+) MiB", printed)
    assert [(name, answer) for name, answer, _ in found] == [("whole", value), ("capped", value)]
    whole, capped = (float(size) for _, _, size in found)
    # Six layers of three kv heads of size 64, two tensors of float32.
    slot = 6 * 3 * 64 * 2 * 4 / 2**20
    assert whole > int(tokens) * slot
    assert capped <= 256 * slot + 0.05
