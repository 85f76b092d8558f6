"""A small plan and results, made without a model."""

import pytest
import torch

from dynmask.dam import (
    LayerPlan,
    MaskPlan,
    Settings,
    amplify,
    describe_data,
    gate_heads,
    match,
    preview,
    true_mask,
)
from dynmask.report import QualityRow, Results, SpeedRow

LAYERS, HEADS, LENGTH = 3, 4, 200


def make_layer(random, settings):
    """Random maps with a sink and a window whose width grows with the head."""
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None]).float()
    width = torch.arange(1, HEADS + 1)[:, None, None] * 4.0
    maps = torch.rand(HEADS, LENGTH, LENGTH, generator=random) ** 4 * torch.exp(-distance / width)
    maps[:, :, 0] += 0.3
    maps = maps.tril()
    maps = maps / maps.sum(-1, keepdim=True)
    amplified = amplify(maps, maps, settings)
    mask = true_mask(amplified, settings.tau)
    found = match(mask, settings.mu)
    coverage = torch.rand(HEADS, generator=random)
    return LayerPlan(
        columns=found.columns,
        offsets=found.offsets,
        corner=mask,
        coverage=coverage,
        tail_coverage=coverage**2,
        corner_coverage=coverage.sqrt(),
        gate=gate_heads(coverage, settings.coverage),
        previews=preview(maps, amplified),
    )


@pytest.fixture(scope="session")
def make_plan():
    def make(architecture="TinyForCausalLM", *, seed=0):
        settings = Settings(capture_length=LENGTH, coverage=0.5)
        random = torch.Generator().manual_seed(seed)
        return MaskPlan(
            fingerprint={"architecture": architecture, "heads": HEADS, "weights": {"w": [1.5]}},
            settings=settings,
            data=describe_data([[1, 2, 3], [4, 5]], holdout=1),
            layers={layer: make_layer(random, settings) for layer in range(LAYERS)},
        )

    return make


@pytest.fixture
def plan(make_plan):
    return make_plan()


@pytest.fixture(scope="session")
def results():
    def row(task, mode, metric, score, interval, density):
        return QualityRow(
            task, mode, metric, score, interval, 50, density, 1.0, 12.3, "cpu × 9", {"seed": 1}
        )

    def speed(mode, seconds, spread, ratio, ratio_spread, density, computed):
        return SpeedRow(
            mode=mode,
            length=8192,
            seconds=seconds,
            spread=spread,
            ratio=ratio,
            ratio_spread=ratio_spread,
            density=density,
            computed=computed,
            impl="cpu × 7, transformers sdpa × 2",
            repeats=5,
            baseline="torch SDPA, is_causal",
        )

    return Results(
        model="tiny-llama",
        date="2030-01-02T03:04:05+00:00",
        machine={"processor": "Test CPU", "cores": 2, "threads": 2, "gpus": []},
        versions={"python": "3.11", "torch": "2.13"},
        quality=(
            row("LongEval, 200 lines", "static", "accuracy", 0.1, (0.04, 0.2), 0.05),
            row("LongEval, 200 lines", "full", "accuracy", 0.98, (0.9, 1.0), 1.0),
            row("LongEval, 200 lines", "auto", "accuracy", 0.96, (0.87, 0.99), 0.61),
            row("Needles, 8192 tokens", "full", "accuracy", 1.0, (0.93, 1.0), 1.0),
            row("Needles, 8192 tokens", "static", "accuracy", 0.0, (0.0, 0.07), 0.03),
            row("Needles, 8192 tokens", "auto", "accuracy", 1.0, (0.93, 1.0), 0.6),
            row("Perplexity, 8192 tokens", "full", "perplexity", 22.5, (21.0, 24.0), 1.0),
            row("Perplexity, 8192 tokens", "static", "perplexity", 30.0, None, 0.03),
        ),
        speed=(
            speed("full", 2.0, (1.9, 2.2), 1.0, (1.0, 1.0), 1.0, 1.0),
            speed("static", 1.0, (0.9, 1.1), 2.0, (1.8, 2.1), 0.03, 0.05),
            speed("auto", 2.5, (2.4, 2.6), 0.8, (0.7, 0.9), 0.6, 0.61),
        ),
    )
