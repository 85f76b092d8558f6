"""examples/lm_eval_harness.py, offline: its two tasks, on the embedded model and on a DMA model."""

import re

import pytest

pytest.importorskip("datasets", reason="the tasks are datasets: pip install datasets")


def test_tasks_ask_for_a_number_of_the_record(example, tokenizer):
    lines = example("lm_eval_tasks/lines")
    rows = lines.dataset()["test"]
    assert len(rows) == lines.DOCUMENTS
    for row in rows:
        asked = re.search(r"in line (\S+) is <$", row["prompt"])[1]
        answer = re.search(rf"^line {asked}: .*<(\d+)>$", row["prompt"], re.MULTILINE)[1]
        assert row["choices"][row["target"]] == answer
        assert len(set(row["choices"])) == 4
        assert len(tokenizer(row["prompt"])["input_ids"]) > 1024  # where dynamic masks begin


def scores(printed):
    """{(run, task): score} of the lines that the example prints."""
    found = re.findall(
        r"^(.+): (\w+): \{.*: (?:np\.float64\()?([\d.]+)\)?\}$", printed, re.MULTILINE
    )
    return {(run, task): float(score) for run, task, score in found}


def test_accelerated_model_answers_as_well(example, capsys):
    pytest.importorskip("lm_eval", reason="the example needs lm-eval: pip install lm-eval")
    example("lm_eval_harness").main(["--limit", "1"])
    printed = capsys.readouterr().out
    tasks = ("dynmask_lines_choice", "dynmask_lines_generate")
    assert scores(printed) == {
        (run, task): 1.0 for run in ("as it is", "accelerated") for task in tasks
    }
    density = float(re.search(r"density: \{'prefill': ([\d.]+)\}", printed)[1])
    assert 0.1 < density < 0.9  # the calls were sparse


def test_dma_checkpoint_is_measured(example, dma_folder, capsys):
    pytest.importorskip("lm_eval", reason="the example needs lm-eval: pip install lm-eval")
    example("lm_eval_harness").main([dma_folder, "--limit", "1"])
    assert [run for run, _ in scores(capsys.readouterr().out)] == ["as it is", "as it is"]
