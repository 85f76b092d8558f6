import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dynmask.train import __main__, trainer
from dynmask.train.mixture import Mixture, Sequences
from dynmask.train.recipe import Phase, Recipe
from dynmask.train.run import train
from dynmask.train.trainer import Steps, answer_accuracy, weighted_loss

RECIPE = Recipe(
    model={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    },
    phases=(Phase(64, 3), Phase(128, 2)),
    tokens_per_step=256,
    warmup_steps=2,
    mixture=Mixture(),
)


def test_weighted_loss_is_the_naive_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, 11, generator=generator, dtype=torch.float64).float()
    ids = torch.randint(0, 11, (3, 17), generator=generator)
    weights = torch.rand(3, 17, generator=generator)
    before = weights.clone()
    total, over = 0.0, 0.0
    for row in range(3):
        for t in range(16):
            p = logits[row, t].double().softmax(0)[ids[row, t + 1]]
            total -= weights[row, t + 1].item() * p.log().item()
            over += weights[row, t + 1].item()
    assert weighted_loss(logits, ids, weights).item() == pytest.approx(total / over, rel=1e-5)
    assert torch.equal(weights, before)


def test_answer_accuracy_counts_answers_only():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    weights = torch.tensor([[4.0, 4.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    guesses = torch.tensor([[2, 0, 0, 0], [2, 3, 4, 0]])
    logits = torch.nn.functional.one_hot(guesses, 5).float()
    first, second = answer_accuracy(logits, ids, weights, answer=4.0).tolist()
    assert first == 0.5
    assert second != second


def test_steps_depend_on_seed_and_number_alone(sequences):
    steps = Steps(sequences, RECIPE)
    assert len(steps) == 5
    late = steps[4]
    assert late["input_ids"].shape == late["weights"].shape == (2, 128)
    assert steps[0]["input_ids"].shape == (4, 64)
    assert torch.equal(Steps(sequences, RECIPE)[4]["input_ids"], late["input_ids"])
    other = Recipe(**(vars(RECIPE) | {"seed": 1}))
    assert not torch.equal(Steps(sequences, other)[4]["input_ids"], late["input_ids"])


@pytest.fixture
def losses(monkeypatch):
    """The loss of every step, as the Trainer computes it."""
    seen = []

    def record(*args):
        loss = weighted_loss(*args)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(trainer, "weighted_loss", record)
    return seen


def run(sequences, tokenizer, out, **settings):
    return train(RECIPE, sequences, tokenizer, out, workers=0, compiled=False, **settings)


def test_resumed_run_equals_an_uninterrupted_one(sequences, tokenizer, tmp_path, losses):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(sequences, tokenizer, whole)
    expected = losses.copy()
    assert len(set(expected)) == 5
    losses.clear()
    assert not run(sequences, tokenizer, parts, minutes=0)
    assert len(losses) == 1
    assert not (parts / "model").exists()
    # What a checkpoint looks like if the process is killed while writing it.
    (parts / "checkpoint-4").mkdir()
    (parts / "checkpoint-4" / "model.safetensors").touch()
    assert run(sequences, tokenizer, parts)
    assert losses == expected
    weights = load_file(whole / "model" / "model.safetensors")
    resumed = load_file(parts / "model" / "model.safetensors")
    assert weights.keys() == resumed.keys()
    for name, value in weights.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, resumed[name]), name
    # A complete run has nothing left to do.
    losses.clear()
    assert run(sequences, tokenizer, parts)
    assert losses == []
    assert torch.equal(
        load_file(parts / "model" / "model.safetensors")["model.norm.weight"],
        resumed["model.norm.weight"],
    )
    assert (parts / "model" / "tokenizer.json").exists()
    assert not list(parts.glob("*.partial"))
    assert json.loads((parts / "log.json").read_text())


def test_folder_of_another_run_is_refused(sequences, corpus, tokenizer, tmp_path):
    assert not run(sequences, tokenizer, tmp_path, minutes=0)
    note = (tmp_path / "run.json").read_text()
    other = Recipe(**(vars(RECIPE) | {"lr": 1e-4}))
    with pytest.raises(ValueError, match="of another recipe; give another folder"):
        train(other, sequences, tokenizer, tmp_path, workers=0)
    longer = type(corpus)(corpus.tokens[:-1], corpus.words)
    with pytest.raises(ValueError, match="on other text; give another folder"):
        run(Sequences(longer, tokenizer, Mixture()), tokenizer, tmp_path)
    assert (tmp_path / "run.json").read_text() == note


def test_text_shorter_than_the_longest_phase(corpus, tokenizer, tmp_path):
    short = type(corpus)(corpus.tokens[:127], corpus.words)
    with pytest.raises(ValueError, match="127 tokens, one sequence 128"):
        run(Sequences(short, tokenizer, Mixture()), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_gpus_are_refused(sequences, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        run(sequences, tokenizer, tmp_path)


def test_command(text_folder, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(RECIPE.to_dict() | {"vocab_size": 400}), encoding="utf-8")
    arguments = [str(recipe), "--data", str(text_folder), "--out", str(tmp_path / "out")]
    assert __main__.main([*arguments, "--minutes", "0", "--workers", "1"]) == 3
    assert __main__.main([*arguments, "--workers", "1"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"run.json", "log.json", "model", "tokenizer", "corpus.npz"}


@pytest.mark.parametrize(
    ("recipe", "pattern", "message"),
    [
        ("no-such", "train*", "give a YAML file or the name of a recipe: embedded"),
        ("embedded", "valid*", "matches 'valid*'"),
    ],
)
def test_command_refuses_in_one_line(text_folder, tmp_path, capsys, recipe, pattern, message):
    arguments = ["--data", str(text_folder), "--pattern", pattern, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        __main__.main([recipe, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert max(map(len, lines)) <= 80


def test_without_accelerate_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "try:\n    import dynmask.train\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs accelerate" in done.stdout
    assert "pip install 'dynmask[train]'" in done.stdout
