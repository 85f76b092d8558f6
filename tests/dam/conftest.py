import pytest
import torch

from dynmask.dam import LayerPlan, MaskPlan, Settings, describe_data, preview

LENGTH = 16


def make_layer(seed, gate):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, LENGTH, LENGTH, generator=generator) < 0.4
    maps = torch.rand(2, LENGTH, LENGTH, generator=generator)
    return LayerPlan(
        columns=(torch.tensor([0, 3, 11]), torch.tensor([], dtype=torch.int64)),
        offsets=(torch.tensor([0]), torch.tensor([0, 1, 2, 7 + seed])),
        corner=corner.tril() | torch.eye(LENGTH, dtype=torch.bool),
        coverage=torch.rand(2, generator=generator),
        tail_coverage=torch.rand(2, generator=generator),
        corner_coverage=torch.rand(2, generator=generator),
        gate=torch.tensor(gate),
        previews=preview(maps, 2 * maps),
    )


@pytest.fixture
def plan():
    return MaskPlan(
        fingerprint={"architecture": "TestForCausalLM", "heads": 2, "theta": 1e4, "tied": True},
        settings=Settings(capture_length=LENGTH, coverage=0.5),
        data=describe_data([[1, 2, 3], [4, 5]], holdout=1),
        layers={0: make_layer(0, [False, True]), 2: make_layer(2, [True, False])},
    )
