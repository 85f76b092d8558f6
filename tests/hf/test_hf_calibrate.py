"""Calibration end to end, its errors, and what happens when it is interrupted."""

from __future__ import annotations

import logging
from importlib import import_module

import pytest
import torch
from hf_models import make_model, random_ids, snapshot

from dynmask.dam import (
    CoverageMeter,
    MapAccumulator,
    MaskPlan,
    amplify,
    describe_data,
    match,
    true_mask,
)
from dynmask.hf import accelerate, calibrate
from dynmask.hf.windows import make_windows

LENGTH = 24
# This target lies between the heads' means and tails.
SETTINGS = {"capture_length": LENGTH, "tau": 0.4, "mu": 0.5, "coverage": 0.3, "holdout": 0.3}


def texts(count: int = 3) -> list[list[int]]:
    sizes = [60, 24, 41, 5, 33]
    return [random_ids(1, n, seed=n)[0].tolist() for n in sizes[:count]]


def windows_of(given, limit=256):
    cuts = {"capture_length": LENGTH, "coverage_length": limit, "holdout": 0.3, "seed": 0}
    return make_windows(None, given, **cuts)


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
    windows, held_out = windows_of(texts())
    used = [window.tolist() for window in windows + held_out]
    assert plan.data == describe_data(used, holdout=len(held_out))
    assert max(map(len, held_out)) > LENGTH

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
        kept = [
            (run[index][0] * plan.stripes(index, "static").dense(run[index].shape[-1])[0]).sum(-1)
            for run in held_runs
        ]
        # Beyond row L the corner is no part of the mask.
        beyond = torch.cat([rows[:, LENGTH:] for rows in kept], 1)
        within = torch.cat([rows[:, :LENGTH] for rows in kept], 1)
        worst = beyond.sort(1).values[:, : -(-beyond.shape[1] // 10)]
        for got, want in (
            (layer.coverage, beyond),
            (layer.tail_coverage, worst),
            (layer.corner_coverage, within),
        ):
            torch.testing.assert_close(got, want.mean(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.gate, layer.coverage < plan.settings.coverage)
        # The random model must not make the comparison empty.
        assert 0.05 < mask.float().mean() < 0.5


def test_held_out_maps_are_sampled_and_never_square(monkeypatch):
    model = make_model("llama")
    whole = calibrate(model, None, texts(), **SETTINGS)
    shapes = []
    add = CoverageMeter.add

    def spy(meter, probs, rows):
        shapes.append(tuple(probs.shape))
        assert rows[-1] == probs.shape[-1] - 1
        add(meter, probs, rows)

    monkeypatch.setattr(CoverageMeter, "add", spy)
    monkeypatch.setattr(import_module("dynmask.hf.calibration"), "_SAMPLED_ROWS", 20)
    sampled = calibrate(model, None, texts(), **SETTINGS)
    held_out = windows_of(texts())[1]
    assert set(shapes) == {(2, min(20, len(window)), len(window)) for window in held_out}
    for index, layer in sampled.layers.items():
        assert torch.equal(layer.corner, whole.layers[index].corner)
        assert not torch.equal(layer.coverage, whole.layers[index].coverage)
        torch.testing.assert_close(layer.coverage, whole.layers[index].coverage, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("coverage_length", "longest"), [(2, 24), (30, 30), (4096, 41)], ids=["L", "given", "text"]
)
def test_coverage_length_is_an_upper_bound_but_not_below_the_capture_length(
    coverage_length, longest, caplog
):
    given = [random_ids(1, n, seed=n)[0].tolist() for n in (40, 41, 41, 41)]
    change = {**SETTINGS, "coverage_length": coverage_length, "seed": 1}
    with caplog.at_level(logging.WARNING, logger="dynmask"):
        plan = calibrate(make_model("llama"), None, given, **change)
    assert plan.data["holdout_length"] == longest
    assert ("not measured" in caplog.text) == (longest == LENGTH)


def test_held_out_windows_end_at_the_models_limit(caplog):
    model = make_model("llama", max_position_embeddings=32)
    plan = calibrate(model, None, texts(), **SETTINGS)
    assert plan.data["holdout_length"] == 32
    # At the limit itself nothing longer can come.
    with caplog.at_level(logging.WARNING, logger="dynmask"):
        calibrate(model, None, texts(), **{**SETTINGS, "capture_length": 32})
    assert caplog.text == ""


def test_calibration_is_deterministic_and_the_seed_matters():
    model = make_model("llama")
    plan = calibrate(model, None, texts(5), **SETTINGS)
    assert same_plan(calibrate(model, None, texts(5), **SETTINGS), plan)
    others = [calibrate(model, None, texts(5), **SETTINGS, seed=seed) for seed in (1, 2)]
    assert len({plan.data["sha256"], *(other.data["sha256"] for other in others)}) > 1


def test_plan_survives_saving_and_runs(tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    plan = calibrate(model, None, texts(), **SETTINGS)
    plan.save(tmp_path / "plan")
    with accelerate(model, MaskPlan.load(tmp_path / "plan"), mode="static") as run:
        assert model(random_ids(1, 50)).logits.isfinite().all()
    assert run.stats()["calls"] == {"prefill": 3}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("stop_at", [1, 6, 12])
def test_interrupted_calibration_resumes_to_the_same_plan(tmp_path, stop_at, kind):
    model = make_model(kind)
    expected = calibrate(model, None, texts(), **SETTINGS)
    before = snapshot(model)

    def interrupt(done, total, text):
        assert total == 12
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
        ({"coverage_length": 30}, "settings"),
        ({"texts": texts(5)}, "texts"),
        ({"model": make_model("llama", seed=5)}, "model"),
    ],
    ids=["tau", "coverage_length", "texts", "model"],
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
        (None, {}, "at least one calibration text"),
        ("a string", {}, "must be a list"),
        ([[], []], {}, "all empty"),
        ([[5] * 9, [6] * 9], {}, "longest has 9 tokens"),
        ([[5] * 29], {}, "the only one of use has 29 tokens.* 6 more"),
        ([[5] * 30], {}, None),
        ([[5] * 50, [97]], {}, None),
        ([[5] * 50, [97] * 9], {}, "token ids from 5 to 97"),
        ([[5] * 50, "text"], {}, r"texts\[1\] is a string"),
        (texts(), {"capture_length": 257}, "limit of 256"),
        (texts(), {"tau": -0.1}, "tau=-0.1"),
        (texts(), {"mu": 1.5}, "mu=1.5"),
        (texts(), {"coverage_length": 1}, "coverage_length=1"),
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


def test_bad_maps_name_the_head(monkeypatch):
    mean = MapAccumulator.mean
    calls = []

    def spoil(maps):
        calls.append(maps)
        return mean(maps) + 2 * (len(calls) == 2)

    monkeypatch.setattr(MapAccumulator, "mean", spoil)
    # Two heads a group: the second group begins with head 2.
    with pytest.raises(ValueError, match="layer 0, head 2"):
        calibrate(make_model("llama"), None, texts(), **SETTINGS)


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ValueError, match="window of its own"):
        calibrate(make_model("mistral-window"), None, texts(), **SETTINGS)
    with pytest.raises(ValueError, match="attends 2 times a call"):
        calibrate(make_model("diffllama"), None, texts(), **SETTINGS)
    model = make_model("llama")
    plan = calibrate(model, None, texts(), **SETTINGS)
    with accelerate(model, plan), pytest.raises(ValueError, match="inside accelerate"):
        calibrate(model, None, texts(), **SETTINGS)


def test_unwritable_work_folder_fails_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        calibrate(make_model("llama"), None, texts(), work_folder=tmp_path / "file", **SETTINGS)


def test_a_name_is_no_tokenizer():
    with pytest.raises(ValueError, match=r"tokenizer must be a loaded one, got str: AutoTokenizer"):
        calibrate(make_model("llama"), "gpt2", ["a text"], **SETTINGS)
