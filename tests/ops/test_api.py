"""Arguments, errors, and which backend runs."""

import subprocess
import sys
import typing

import pytest
import torch
from attention_cases import blocks, lifetimes, naive_mask, padding, stripes, tensors

from dynmask.masks import Lifetimes, Stripes
from dynmask.ops import attention, choose, computed_pairs, supports
from dynmask.ops.attention import BACKENDS


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


GOOD = zeros(1, 4, 8, 16)


@pytest.mark.parametrize(
    ("q", "k", "v", "more", "match"),
    [
        (zeros(4, 8, 16), GOOD, GOOD, {}, "q must be"),
        (GOOD, GOOD.numpy(), GOOD, {}, "k must be a torch tensor"),
        (GOOD, GOOD.double(), GOOD, {}, "k is torch.float64"),
        (GOOD.int(), GOOD.int(), GOOD.int(), {}, "float16"),
        (GOOD, GOOD, zeros(1, 4, 8, 32), {}, "one shape"),
        (GOOD, zeros(2, 4, 8, 16), zeros(2, 4, 8, 16), {}, "batch"),
        (GOOD, zeros(1, 3, 8, 16), zeros(1, 3, 8, 16), {}, "multiple"),
        (GOOD, zeros(1, 4, 7, 16), zeros(1, 4, 7, 16), {}, "own tokens"),
        (GOOD, zeros(1, 4, 0, 16), zeros(1, 4, 0, 16), {}, "only 0 keys"),
        (GOOD, GOOD, GOOD, {"mask": torch.ones(8, 8)}, "Blocks or None"),
        (GOOD, GOOD, GOOD, {"mask": Stripes.causal(3)}, "mask has 3 heads"),
        (GOOD, GOOD, GOOD, {"mask": Stripes.causal(4) & padding((0, 8), (0, 8))}, "2 rows"),
        (GOOD, GOOD, GOOD, {"mask": Stripes.causal(4) & padding((0, 9))}, "slot 9"),
        (GOOD, GOOD, GOOD, {"mask": Stripes.causal(4).to("meta")}, "to\\(q.device\\)"),
        (GOOD, GOOD, GOOD, {"mask": lifetimes(1, 2, 8)}, "2 kv heads, k has 1 and 4"),
        (GOOD, GOOD, GOOD, {"mask": lifetimes(2, 4, 8)}, "2 batch rows"),
        (GOOD, GOOD, GOOD, {"mask": lifetimes(1, 4, 7)}, "7 keys but k has 8"),
        (GOOD, GOOD, GOOD, {"mask": lifetimes(1, 4, 8).to("meta")}, "to\\(q.device\\)"),
        (GOOD, GOOD, GOOD, {"mask": blocks(1, 3, 8)}, "3 kv heads"),
        (GOOD, GOOD, GOOD, {"mask": blocks(1, 4, 7, tile=7)}, "every slot needs a tile"),
        (GOOD, GOOD, GOOD, {"mask": blocks(1, 4, 8) & padding((0, 9))}, "slot 9"),
        (GOOD, GOOD, GOOD, {"bias": zeros(1, 4, 7)}, "bias must be"),
        (GOOD, GOOD, GOOD, {"impl": "fast"}, 'no impl "fast"'),
        (GOOD, GOOD, GOOD, {"impl": "cpu"}, "without a mask"),
        (GOOD, GOOD, GOOD, {"impl": "sdpa", "return_lse": True}, "log-sum-exp"),
    ],
    ids=range(25),
)
def test_mistakes_are_named(q, k, v, more, match):
    with pytest.raises(ValueError, match=match):
        attention(q, k, v, **more)


def test_types_tell_whether_there_is_a_log_sum_exp():
    hints = [typing.get_type_hints(one) for one in typing.get_overloads(attention)]
    assert {hint["return_lse"]: hint["return"] for hint in hints} == {
        typing.Literal[False]: torch.Tensor,
        typing.Literal[True]: tuple[torch.Tensor, torch.Tensor],
        bool: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    }


def test_no_rows_give_no_rows():
    q = zeros(1, 4, 0, 16)
    for keys in (GOOD, zeros(1, 4, 0, 16)):
        out, lse = attention(q, keys, keys, return_lse=True)
        assert out.shape == (1, 4, 0, 16)
        assert lse.shape == (1, 4, 0)


@pytest.mark.parametrize("rows", [1, 8])
def test_an_empty_batch_gives_an_empty_batch(rows):
    q, k = zeros(0, 4, rows, 16), zeros(0, 2, 8, 16)
    for mask in (None, Stripes.causal(4), Lifetimes.top(zeros(0, 2, 8), keep=3)):
        assert attention(q, k, k, mask).shape == q.shape


def test_an_explicit_choice_never_falls_back():
    q, k, v = tensors(1, 4, 2, 8, 8, 16)
    q.requires_grad_()
    mask = stripes(4, 8)
    reason = supports("cpu", q, k, v, mask)
    assert "no backward" in reason
    with pytest.raises(ValueError, match="no backward"):
        attention(q, k, v, mask, impl="cpu")
    with torch.no_grad():
        assert supports("cpu", q, k, v, mask) is None
    assert supports("cpu", q.to("meta"), k, v, mask) is not None
    assert supports("sdpa", q, k, v, mask) is None
    assert supports("reference", q, k, v, mask) is None


def test_a_backend_that_is_not_here_is_a_reason(monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", "dynmask.ops.nowhere")
    q, k, v = tensors(1, 4, 2, 8, 8, 16)
    assert "cannot be imported" in supports("triton", q, k, v)
    with pytest.raises(ValueError, match="cannot be imported"):
        attention(q, k, v, impl="triton")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": -0.5}, "scale=-0.5 must be over 0"),
        ({"scale": 0}, "scale=0 must be over 0"),
        ({"scale": float("nan")}, "scale=nan must be"),
        ({"scale": "x"}, "scale must be a plain number or None, got str"),
        ({"scale": torch.nn.Parameter(torch.ones(()))}, "for a learned one pass q "),
        ({"bias": [0.0]}, "bias must be a torch tensor or None, got list"),
        ({"impl": ["cpu"]}, "no impl .* use one of"),
    ],
    ids=str,
)
def test_arguments_of_other_kinds(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors(1, 4, 2, 8, 8, 16), **wrong)


def test_heads_without_width():
    with pytest.raises(ValueError, match="D=0"):
        attention(*tensors(1, 4, 2, 8, 8, 0))


def test_auto_imports_neither_triton_nor_flex_on_the_cpu():
    code = """
import sys, torch
from dynmask.masks import Lifetimes
from dynmask.ops import attention
q = torch.randn(1, 4, 8, 16)
attention(q, q, q, Lifetimes.top(torch.randn(1, 4, 8), keep=3), bias=torch.randn(1, 4, 8))
print(*[m for m in sys.modules if m == "triton" or m.startswith("dynmask.ops.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "dynmask.ops.reference" in loaded
    assert not loaded & {"triton", "dynmask.ops.triton", "dynmask.ops.flex"}


@pytest.mark.parametrize("length", [100, 4000])
@pytest.mark.parametrize("kind", [None, "lifetimes", "blocks"], ids=str)
def test_auto_never_takes_flex_on_the_cpu(kind, length):
    k = torch.empty(1, 2, length, 1).expand(-1, -1, -1, 16)
    mask = {
        None: lambda: None,
        "lifetimes": lambda: Lifetimes.window(length, window=20),
        "blocks": lambda: blocks(1, 2, length, block=64, tile=64),
    }[kind]()
    assert choose(k, k, k, mask) in ("cpu", "sdpa")
    assert choose(k, k, k, mask, return_lse=True) in ("cpu", "reference")


def test_auto_takes_the_sparse_backend_only_where_it_pays():
    def choice(length, mask, q_len=None, **more):
        k = torch.empty(1, 4, length, 1).expand(-1, -1, -1, 64)
        return choose(k[:, :, : q_len or length].repeat(1, 2, 1, 1), k, k, mask, **more)

    sparse = Stripes.streaming(8, sinks=16, window=400)
    assert choice(128, sparse) == "sdpa"
    assert choice(16_384, sparse) == "cpu"
    assert choice(1024, Stripes.streaming(8, sinks=16, window=1000)) == "sdpa"
    assert choice(16_384, Stripes.causal(8)) == "sdpa"
    assert choice(16_384, None) == "sdpa"
    assert choice(16_384, sparse, q_len=1) == "cpu"
    assert choice(500, sparse, q_len=1) == "sdpa"
    assert choice(500, None, return_lse=True) == "reference"


@pytest.mark.parametrize("q_len", [1, 40, 150])
@pytest.mark.parametrize("corner", [0, 25])
def test_computed_pairs_bound_the_visible_ones(q_len, corner):
    mask = stripes(4, 150, corner=corner, full=(2,)) & padding((0, 150), (20, 140), (150, 150))
    computed = computed_pairs(mask, q_len, 150)
    visible = naive_mask(mask, q_len, 150).sum((2, 3))
    assert computed.shape == visible.shape
    assert (computed >= visible).all()
    if q_len == 150:
        assert computed[:, 2].equal(visible[:, 2])
        assert (computed[2] == 0).all()
