"""The kernel of native sparse attention's importance against its definition in torch."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import each_dtype, needs_gpu, place, require_triton

from dynmask.baselines.nsa_compress import importance

require_triton()

from dynmask.baselines.triton.importance import block_importance  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def by_definition(q, keys, k_len, block, stride, select_block):
    """Row by row, head by head, in float64: no tensor operation of the module's."""
    q, keys = q.double().cpu(), keys.double().cpu()
    (batch, heads, q_len, dim), groups = q.shape, keys.shape[1]
    made = torch.zeros(batch, groups, q_len, -(-k_len // select_block), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            for i in range(q_len):
                row = k_len - q_len + i
                ends = [end for end in range(0, k_len + 1, stride) if end <= row]
                p = (keys[b, g, : len(ends)] @ q[b, h, i] / dim**0.5).softmax(0)
                for at, end in enumerate(ends[1:], 1):
                    for token in range(end - block, end, stride):
                        if token >= 0:
                            made[b, g, i, token // select_block] += p[at]
    return made


def inputs(*, batch, heads, groups, q_len, k_len, dim, stride, dtype, sharp=1.0):
    torch.manual_seed(k_len)
    # Heads and tokens as a projection leaves them, not in the order of the axes.
    q = (torch.randn(batch, q_len, heads, dim) * sharp).to(dtype).transpose(1, 2)
    keys = torch.randn(batch, groups, 1 + k_len // stride, dim).to(dtype)
    return place(q, keys)


CASES = {
    "nsa": {"k_len": 150, "block": 8, "stride": 4, "select_block": 16},
    "no overlap": {"k_len": 70, "block": 4, "stride": 4, "select_block": 4},
    "odd numbers": {"k_len": 131, "block": 9, "stride": 3, "select_block": 15, "dim": 20},
    "wider than selected": {"k_len": 66, "block": 12, "stride": 2, "select_block": 4},
    "chunk": {"k_len": 139, "q_len": 70, "block": 8, "stride": 4, "select_block": 8},
    "row": {"k_len": 40, "q_len": 1, "block": 4, "stride": 2, "select_block": 4},
    "nothing compressed": {"k_len": 3, "block": 8, "stride": 4, "select_block": 8},
    "one head": {"k_len": 80, "heads": 1, "groups": 1, "block": 4, "stride": 4, "select_block": 8},
    "mqa": {"k_len": 80, "heads": 3, "groups": 1, "block": 8, "stride": 4, "select_block": 8},
    "sharp": {"k_len": 90, "block": 8, "stride": 4, "select_block": 8, "sharp": 60.0},
}


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_importance(name, dtype):
    case = {"batch": 2, "heads": 4, "groups": 2, "dim": 16, "q_len": CASES[name]["k_len"]}
    case |= CASES[name]
    lengths = case["k_len"], case.pop("block"), case["stride"], case.pop("select_block")
    q, keys = inputs(**case, dtype=dtype)
    found = block_importance(q, keys, *lengths)
    expected = by_definition(q, keys, *lengths)
    assert found.dtype == torch.float32
    # Sharp logits are 60 times as large, and so are their errors in float32.
    torch.testing.assert_close(found.double().cpu(), expected, atol=2e-4, rtol=1e-4)


def test_passes_opcheck():
    shape = {"batch": 2, "heads": 4, "groups": 2, "q_len": 20, "k_len": 30, "dim": 16}
    q, keys = inputs(**shape, stride=4, dtype=torch.float32)
    torch.library.opcheck(block_importance, (q, keys, 30, 8, 4, 16))


def test_torch_is_the_definition():
    """What runs where there is no GPU."""
    lengths = {"block": 9, "stride": 3, "select_block": 15}
    shape = {"batch": 2, "heads": 4, "groups": 2, "q_len": 40, "k_len": 131, "dim": 8}
    q, keys = inputs(**shape, stride=3, dtype=torch.float32)
    found = importance(q.cpu(), keys.cpu(), 131, **lengths)
    expected = by_definition(q, keys, 131, *lengths.values())
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@needs_gpu
@pytest.mark.parametrize("dim", [32, 64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_long(dim, dtype):
    """Sizes of the paper, more blocks than a program has."""
    shape = {"batch": 1, "heads": 8, "groups": 2, "q_len": 5000, "k_len": 9001, "dim": dim}
    q, keys = inputs(**shape, stride=16, dtype=dtype)
    found = block_importance(q, keys, 9001, 32, 16, 64)
    given = {"block": 32, "stride": 16, "select_block": 64}
    expected = importance(q.double(), keys.double(), 9001, **given)
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-4, rtol=1e-4)


@needs_gpu
def test_runs_on_the_gpu():
    """`importance` leaves it to the kernel."""
    shape = {"batch": 1, "heads": 2, "groups": 1, "q_len": 100, "k_len": 100, "dim": 32}
    q, keys = inputs(**shape, stride=4, dtype=torch.bfloat16)
    found = importance(q, keys, 100, block=8, stride=4, select_block=16)
    assert torch.equal(found, block_importance(q, keys, 100, 8, 4, 16))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynmask.baselines.triton import importance

shape = {"STRIDE": 16, "D": 64, "BLOCK_D": 64, "BLOCK_M": 64, "PRECISION": "tf32", "BLOCK_N": 64}
tensors = {"p_q": "*bf16", "p_k": "*bf16", "p_total": "*fp32", "p_made": "*fp32"}
for capability in 80, 90:
    for kernel, more in (
        (importance.importance_total_kernel, {}),
        (importance.importance_kernel, {"OVERLAP": 2, "STRIDES": 4}),
    ):
        constants = {**shape, **more}
        numbers = {"scale_log2": "fp32"} | dict.fromkeys(constants, "constexpr") | tensors
        source = ASTSource(
            fn=kernel,
            signature={name: numbers.get(name, "i32") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): x for name, x in constants.items()},
        )
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_stages": 2})
        print(len(made.asm["cubin"]) > 0, made.metadata.shared <= 99 * 1024)
"""


def test_compiles_for_gpus(tmp_path):
    """Without one: the interpreter takes programs that the compiler refuses."""
    cache = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 8, done.stderr[-2000:]
