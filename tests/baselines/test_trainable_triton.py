"""The trainable baselines through the GPU kernels, or through Triton's interpreter without one."""

import copy

import pytest
import torch
from features import lacks_kernels, needs

from dynmask.baselines.moba import MixtureOfBlockAttention
from dynmask.baselines.nsa import NativeSparseAttention, NsaBlocks

LENGTHS = NsaBlocks(
    compress_block=8,
    compress_stride=4,
    select_block=8,
    select_count=3,
    select_local=1,
    window=9,
)
SHAPE = {"heads": 4, "groups": 2, "dim": 16}


def make(kind):
    torch.manual_seed(0)
    if kind == "nsa":
        layer = NativeSparseAttention(24, **SHAPE, blocks=LENGTHS)
    else:
        layer = MixtureOfBlockAttention(24, **SHAPE, block=8, top=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(length):
    draw = torch.Generator().manual_seed(1)
    turns = torch.rand(1, length, 8, generator=draw).mul(6).repeat(1, 1, 2)
    return torch.randn(1, length, 24, generator=draw), (turns.cos(), turns.sin())


def results(layer, x, angles):
    """Output, and gradients of the input and of all weights, on the CPU."""
    x = x.clone().requires_grad_()
    out = layer(x, position_embeddings=angles)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    return [t.detach().float().cpu() for t in (out, *grads)]


def close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("kind", ["nsa", "moba"])
def test_kernels_are_the_reference(kind, device):
    needs(lacks_kernels)
    layer, (x, angles) = make(kind), inputs(45)
    layer.impl = "reference"
    expected = results(layer, x, angles)
    layer.impl = "triton"
    layer.to(device)
    found = results(layer, x.to(device), tuple(t.to(device) for t in angles))
    close(found, expected, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
@pytest.mark.parametrize("kind", ["nsa", "moba"])
def test_compiled_in_bfloat16(kind):
    """As training runs them."""
    layer, (x, angles) = make(kind).cuda(), inputs(301)
    x, angles = x.cuda(), tuple(t.cuda() for t in angles)
    compiled = copy.deepcopy(layer)
    compiled.compile()
    with torch.autocast("cuda", torch.bfloat16):
        plain, found = results(layer, x, angles), results(compiled, x, angles)
    # Fused kernels round less often, which now and then changes what is chosen.
    close(found, plain, 0.1)
