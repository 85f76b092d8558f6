"""Tensor parallelism of transformers' models under `accelerate`, two processes on the CPU."""

from types import SimpleNamespace

import pytest
from dam_worker import CASES
from hf_models import make_model
from parallel_cases import outcomes
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate, Shard

from dynmask.hf.parallel import heads_here, refuse_split, split_group
from dynmask.masks import Stripes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "llama-mha", "qwen3"):
        make_model(kind, vocab_size=96).save_pretrained(folder / kind)
    return outcomes("dam_worker.py", folder, folder)


@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(found, case):
    assert found[case] is None, found[case]


def test_heads_that_nothing_tells():
    with pytest.raises(ValueError, match="computes 2 of 4 heads on one of 1 processes"):
        heads_here(nn.Linear(2, 2), Stripes.causal(4), 2)


class Sharded(nn.Sequential, FSDPModule):
    """What `fully_shard` makes of a module's class."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)


def spread(names, placements, *, size=2, fsdp=False):
    """A module whose weight says that it lies on a mesh of so many processes an axis."""
    module = nn.Linear(4, 4)
    axes = len(placements)
    module.weight.device_mesh = SimpleNamespace(
        mesh_dim_names=names,
        ndim=axes,
        size=lambda axis: size if axis == axes - 1 else 3,
        get_group=lambda axis: f"group {axis} of {axes}",
    )
    module.weight.placements = placements
    return Sharded(module) if fsdp else nn.Sequential(module)


@pytest.mark.parametrize(
    "model",
    [
        spread(None, [Shard(0)]),
        spread(("tp",), [Shard(0)]),
        spread(("tp",), [Shard(1)]),
        spread(("fsdp", "tp"), [Replicate(), Shard(0)], fsdp=True),
    ],
    ids=["no names", "rows", "columns", "beside fsdp"],
)
def test_split_heads_are_refused(model):
    with pytest.raises(ValueError, match="heads are split over 2 processes"):
        refuse_split(model, model)
    axes = model[0].weight.device_mesh.ndim
    assert split_group(model, model) == f"group {axes - 1} of {axes}"


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4)),
        spread(("tp",), [Replicate()]),
        spread(("tp",), [Shard(0)], size=1),
        spread(None, [Shard(0)], fsdp=True),
        spread(("fsdp",), [Shard(0)]),
        spread(("fsdp", "tp"), [Shard(0), Replicate()], fsdp=True),
    ],
    ids=["plain", "replicated", "one process", "fsdp", "transformers' fsdp", "fsdp beside"],
)
def test_whole_heads_are_not(model):
    refuse_split(model, model)
    assert split_group(model, model) is None
