"""Calibration end to end, its errors, and what happens when it is interrupted."""

from __future__ import annotations

import logging

import pytest
import torch
from hf_models import make_model, random_ids, snapshot

from dynmask.dam import MaskPlan, amplify, match, true_mask
from dynmask.hf import accelerate, calibrate
from dynmask.hf.windows import make_batches, make_windows, split

LENGTH = 24
SETTINGS = {"capture_length": LENGTH, "tau": 0.4, "mu": 0.5, "holdout": 0.3}


def texts(count: int = 3) -> list[list[int]]:
    sizes = [60, 24, 41, 5, 33]
    return [random_ids(1, n, seed=n)[0].tolist() for n in sizes[:count]]


def same_plan(a: MaskPlan, b: MaskPlan) -> bool:
    if (a.settings, a.data, a.fingerprint) != (b.settings, b.data, b.fingerprint):
        return False
    pairs = zip(a.layers.items(), b.layers.items(), strict=True)
    return all(
        i == j
        and all(map(torch.equal, x.columns, y.columns))
        and all(map(torch.equal, x.offsets, y.offsets))
        and torch.equal(x.corner, y.corner)
        and torch.equal(x.coverage, y.coverage)
        and torch.equal(x.tail_coverage, y.tail_coverage)
        and torch.equal(x.corner_coverage, y.corner_coverage)
        and torch.equal(x.gate, y.gate)
        and torch.equal(x.previews, y.previews)
        for (i, x), (j, y) in pairs
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_plan_equals_one_made_from_eager_attentions(kind, batch_size):
    model = make_model(kind)
    before = snapshot(model)
    plan = calibrate(model, None, texts(), batch_size=batch_size, **SETTINGS)
    assert snapshot(model) == before
    assert list(plan.layers) == ([1, 2] if kind == "gemma3" else [0, 1, 2])
    model.set_attn_implementation("eager")
    windows, held_out = split(make_windows(None, texts(), LENGTH), 0.3, 0)
    assert plan.data["texts"] == len(windows) + len(held_out)
    assert plan.data["holdout"] == len(held_out)

    def attentions(ids):
        with torch.no_grad():
            return model(ids[None], output_attentions=True).attentions

    runs = [attentions(ids) for ids in windows]
    held_runs = [attentions(ids) for ids in held_out]
    for index, layer in plan.layers.items():
        total = torch.zeros(4, LENGTH, LENGTH)
        count = torch.zeros(LENGTH)
        for run in runs:
            n = run[index].shape[-1]
            total[:, :n, :n] += run[index][0]
            count[:n] += 1
        mean = total / (count[:, None] + plan.settings.eps)
        mask = true_mask(amplify(mean, total, plan.settings), plan.settings.tau)
        assert torch.equal(layer.corner, mask)
        found = match(mask, plan.settings.mu, support=plan.settings.support)
        assert all(map(torch.equal, layer.columns, found.columns))
        assert all(map(torch.equal, layer.offsets, found.offsets))
        seen = plan.stripes(index, "static").dense(LENGTH)[0]
        kept = torch.cat(
            [
                (run[index][0] * seen[:, : run[index].shape[-1], : run[index].shape[-1]]).sum(-1)
                for run in held_runs
            ],
            1,
        )
        torch.testing.assert_close(layer.corner_coverage, kept.mean(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.gate, layer.tail_coverage < plan.settings.coverage)
        # The random model must not make the comparison empty.
        assert 0.05 < mask.float().mean() < 0.5


def test_plan_survives_saving_and_runs(tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    plan = calibrate(model, None, texts(), **SETTINGS)
    plan.save(tmp_path / "plan")
    with accelerate(model, MaskPlan.load(tmp_path / "plan"), mode="static") as run:
        assert model(random_ids(1, 50)).logits.isfinite().all()
    assert run.stats()["calls"] == {"prefill": 3}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("stop_at", [1, 8, 18])
def test_interrupted_calibration_resumes_to_the_same_plan(tmp_path, stop_at, kind):
    model = make_model(kind)
    expected = calibrate(model, None, texts(), **SETTINGS)
    before = snapshot(model)

    def interrupt(done, total, text):
        assert total == 18
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, None, texts(), work_folder=tmp_path, progress=interrupt, **SETTINGS)
    assert snapshot(model) == before
    resumed = calibrate(model, None, texts(), work_folder=tmp_path, **SETTINGS)
    assert same_plan(resumed, expected)


def test_finished_layers_are_not_captured_again(tmp_path):
    model = make_model("llama")
    plan = calibrate(model, None, texts(), work_folder=tmp_path, **SETTINGS)
    calls: list[int] = []
    again = calibrate(
        model,
        None,
        texts(),
        work_folder=tmp_path,
        progress=lambda done, total, text: calls.append(done),
        **SETTINGS,
    )
    assert same_plan(again, plan)
    assert calls == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tau": 0.5}, "settings"),
        ({"texts": texts(5)}, "texts"),
        ({"model": make_model("llama", seed=5)}, "model"),
    ],
    ids=["settings", "texts", "model"],
)
def test_other_run_in_the_work_folder_starts_over(tmp_path, caplog, change, named):
    calibrate(make_model("llama"), None, texts(), work_folder=tmp_path, **SETTINGS)
    model = change.pop("model", None) or make_model("llama")
    given = change.pop("texts", texts())
    with caplog.at_level(logging.WARNING, logger="dynmask"):
        found = calibrate(model, None, given, work_folder=tmp_path, **{**SETTINGS, **change})
    assert named in caplog.text
    assert "starting over" in caplog.text
    assert same_plan(found, calibrate(model, None, given, **{**SETTINGS, **change}))


def test_damaged_work_folder_is_calibrated_again(tmp_path, caplog):
    model = make_model("llama")
    plan = calibrate(model, None, texts(), work_folder=tmp_path, **SETTINGS)
    (tmp_path / "layer-0001" / "plan.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="dynmask"):
        again = calibrate(model, None, texts(), work_folder=tmp_path, **SETTINGS)
    assert "layer 1 is calibrated again" in caplog.text
    assert same_plan(again, plan)


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        ([], {}, "at least one calibration text"),
        ("a string", {}, "must be a list"),
        ([[], []], {}, "all empty"),
        ([[5] * 9, [6] * 9], {}, "longest has 9 tokens"),
        ([[5] * 24], {}, "1 windows"),
        ([[5] * 50, [97]], {}, None),
        ([[5] * 50, [97] * 9], {}, "token ids from 5 to 97"),
        ([[5] * 50, "text"], {}, r"texts\[1\] is a string"),
        (texts(), {"capture_length": 257}, "limit of 256"),
        (texts(), {"tau": -0.1}, "tau=-0.1"),
        (texts(), {"mu": 1.5}, "mu=1.5"),
        (texts(), {"batch_size": 0}, "batch_size=0"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_bad_input_is_named(given, change, message):
    model = make_model("llama")
    if message is None:
        calibrate(model, None, given, **SETTINGS)
        return
    with pytest.raises(ValueError, match=message):
        calibrate(model, None, given, **{**SETTINGS, **change})


def test_nan_names_the_layer():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 1.*NaN"):
        calibrate(model, None, texts(), **SETTINGS)
    assert snapshot(model) == before


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ValueError, match="window of its own"):
        calibrate(make_model("mistral-window"), None, texts(), **SETTINGS)
    model = make_model("llama")
    plan = calibrate(model, None, texts(), **SETTINGS)
    with accelerate(model, plan), pytest.raises(ValueError, match="inside accelerate"):
        calibrate(model, None, texts(), **SETTINGS)


def test_unwritable_work_folder_fails_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        calibrate(make_model("llama"), None, texts(), work_folder=tmp_path / "file", **SETTINGS)


class Words:
    """A tokenizer of words, with a BOS token before each text."""

    bos_token_id = 1

    def __call__(self, text, *, verbose):
        return {"input_ids": [1, *(3 + len(word) for word in text.split())]}


def test_windows_of_strings():
    text = " ".join("x" * (n % 20 + 1) for n in range(53))
    windows = make_windows(Words(), [text, "", "a b"], 11)
    body = torch.tensor([3 + n % 20 + 1 for n in range(53)])
    assert [len(w) for w in windows] == [11, 11, 11, 11, 11, 4, 3]
    assert all(w[0] == 1 for w in windows)
    assert torch.equal(torch.cat([w[1:] for w in windows[:6]]), body)
    assert len(make_windows(Words(), ["a " * 500], 11)) == 16


def test_split_and_batches():
    windows = [torch.full((n,), n) for n in (5, 9, 8, 3, 9, 7)]
    kept, held = split(windows, 0.34, seed=3)
    assert len(kept) == 4
    assert len(held) == 2
    assert sorted(map(len, kept + held)) == [3, 5, 7, 8, 9, 9]
    for seed in range(20):
        assert windows[1] in [w for w in split(windows, 0.99, seed)[0] if len(w) == 9]
    batches = make_batches(windows, 4)
    assert [b.lengths.tolist() for b in batches] == [[9, 9, 8, 7], [5, 3]]
    assert batches[1].attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
