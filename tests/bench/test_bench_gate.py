"""Every gate must pass what is right and stop what is slightly wrong."""

import math

import pytest
import torch

from dynmask.bench import gate
from dynmask.bench.inputs import Inputs, make_inputs, make_score, settings_for
from dynmask.masks import Lifetimes
from dynmask.ops import attention

LENGTH, KEEP = 203, 17
SETTINGS = settings_for("op", device="cpu", keep=KEEP, lengths=(LENGTH,))
ROWS = gate.sample_rows(LENGTH, keep=KEEP)


@pytest.fixture(scope="module")
def case():
    inputs = make_inputs(SETTINGS, LENGTH)
    score = make_score(SETTINGS, "normal", LENGTH)
    mask = Lifetimes.top(score, keep=KEEP)
    return inputs, score, mask


def attend(inputs, mask, bias):
    return attention(*inputs, mask, bias=bias, impl="reference")


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 100_000])
def test_sampled_rows_hold_both_ends_and_where_eviction_begins(length):
    rows = gate.sample_rows(length, keep=48)
    assert rows == sorted(set(rows))
    assert len(rows) == min(length, len(rows)) <= gate.ROWS
    assert {0, length - 1} <= set(rows) <= set(range(length))
    assert {47, 48} & set(range(length)) <= set(rows)


def test_sampled_rows_of_a_chunk_are_its_own():
    assert gate.sample_rows(100, keep=8, q_len=1) == [99]
    assert min(gate.sample_rows(10_000, keep=8, q_len=500)) == 9500


def test_of_equal_scores_the_earlier_key_is_kept():
    score = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 0.0]]])
    assert gate.top_set(score, 4, 2).tolist() == [[[1, 2]]]
    assert gate.top_set(score, 0, 2).tolist() == [[[0]]]


@pytest.mark.parametrize("kind", ["normal", "local", "recent", "rising", "dma"])
def test_right_selection_passes(kind):
    score = make_score(SETTINGS, kind, LENGTH)
    gate.check_selection(Lifetimes.top(score, keep=KEEP), score, KEEP, ROWS)


def test_tied_selection_passes():
    score = make_score(SETTINGS, "normal", LENGTH).round()
    gate.check_selection(Lifetimes.top(score, keep=KEEP), score, KEEP, ROWS)


def one_step_late(mask):
    return Lifetimes(mask.expiry + (mask.expiry > 40) * (mask.expiry < LENGTH))


WRONG_SELECTIONS = {
    "one-more": lambda score, mask: Lifetimes.top(score, keep=KEEP + 1),
    "one-step-late": lambda score, mask: one_step_late(mask),
    "sliding-window": lambda score, mask: Lifetimes.window(LENGTH, window=KEEP),
    "of-another-score": lambda score, mask: Lifetimes.top(-score, keep=KEEP),
    "one-head": lambda score, mask: Lifetimes(mask.expiry[:, :1].expand(-1, 2, -1)),
}


@pytest.mark.parametrize("name", WRONG_SELECTIONS)
def test_wrong_selection_is_caught(case, name):
    _, score, mask = case
    with pytest.raises(gate.GateError, match="selection"):
        gate.check_selection(WRONG_SELECTIONS[name](score, mask), score, KEEP, ROWS)


def test_right_output_passes(case):
    inputs, score, mask = case
    assert gate.check_rows(attend(inputs, mask, score), inputs, score, score, KEEP, ROWS) <= 2


def test_right_half_precision_output_passes(case):
    inputs, score, mask = case
    inputs = Inputs(*(tensor.bfloat16() for tensor in inputs))
    assert gate.check_rows(attend(inputs, mask, score), inputs, score, score, KEEP, ROWS) <= 2


def without_a_key(mask):
    """Hide one kept key of one head from one sampled row on."""
    expiry = mask.expiry.clone()
    alive = (expiry[0, 1, : LENGTH - 1] == expiry[0, 1].max()).nonzero()[0, 0]
    expiry[0, 1, alive] = LENGTH - 1
    return Lifetimes(expiry)


def poisoned(out):
    out = out.clone()
    out[0, 0, LENGTH - 1, 0] = math.nan
    return out


WRONG_OUTPUTS = {
    "a-key-less": lambda i, s, m: attend(i, without_a_key(m), s),
    "no-bias": lambda i, s, m: attend(i, m, None),
    "dense": lambda i, s, m: attend(i, None, s),
    "scale": lambda i, s, m: attention(*i, m, bias=s, scale=0.18, impl="reference"),
    "nan": lambda i, s, m: poisoned(attend(i, m, s)),
    "heads-swapped": lambda i, s, m: attend(i, m, s).flip(1),
    "shape": lambda i, s, m: attend(i, m, s)[:, :, :, :-1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_wrong_output_is_caught(case, name, dtype):
    inputs, score, mask = case
    inputs = Inputs(*(tensor.to(dtype) for tensor in inputs))
    out = WRONG_OUTPUTS[name](inputs, score, mask)
    with pytest.raises(gate.GateError, match="attention: row"):
        gate.check_rows(out, inputs, score, score, KEEP, ROWS)


def test_decode_row_stands_at_the_last_slot(case):
    inputs, score, mask = case
    last = inputs._replace(q=inputs.q[:, :, -1:])
    out = attend(last, mask, score)
    gate.check_rows(out, last, score, score, KEEP, [LENGTH - 1])
    with pytest.raises(gate.GateError):
        gate.check_rows(out * 1.001, last, score, score, KEEP, [LENGTH - 1])


def test_dense_gate(case):
    inputs, _, mask = case
    gate.check_dense(attend(inputs, None, None), inputs, [0, 100, 202])
    with pytest.raises(gate.GateError, match="dense"):
        gate.check_dense(attend(inputs, mask, None), inputs, [0, 100, 202])


def gradients(inputs, score, mask, grad_out):
    leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, score)]
    out = attention(*leaves[:3], mask, bias=leaves[3], impl="reference")
    return list(torch.autograd.grad(out, leaves, grad_out))


@pytest.fixture(scope="module")
def backward(case):
    """A sequence longer than the three windows together, so that some keys are left out."""
    length = 500
    inputs, score = make_inputs(SETTINGS, length), make_score(SETTINGS, "normal", length)
    mask = Lifetimes.top(score, keep=KEEP)
    grad_out = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1))
    return inputs, score, mask, grad_out, gradients(inputs, score, mask, grad_out)


def test_right_gradients_pass(backward):
    inputs, score, mask, grad_out, grads = backward
    assert gate.check_window_backward(grads, inputs, score, mask, grad_out) <= 2
    seen = gate.seen_rows(score, KEEP)
    assert torch.equal(seen, mask.dense(500))
    assert gate.check_whole_backward(grads, inputs, score, seen, grad_out) <= 2


@pytest.mark.parametrize("check", ["window", "whole"])
@pytest.mark.parametrize("which", range(4), ids=["dq", "dk", "dv", "dbias"])
@pytest.mark.parametrize("place", [3, 250, 499], ids=["first", "middle", "last"])
def test_one_wrong_gradient_is_caught(backward, check, which, place):
    inputs, score, mask, grad_out, grads = backward
    if which > 0 and check == "window":  # a key whose lifetime lies in a window
        life = mask.expiry[0, 1].clamp_max(500)
        slot = torch.arange(500)
        for begin in (0, 186, 372):
            inside = (life > slot) & (slot >= begin) & (life <= begin + 128)
            if begin <= place < begin + 128:
                place = int(inside.nonzero()[0, 0])
                break
    wrong = [grad.clone() for grad in grads]
    wrong[which][0, 1, place] += 0.01
    name = "d" + ("q", "k", "v", "bias")[which]
    if check == "window":
        with pytest.raises(gate.GateError, match=name):
            gate.check_window_backward(wrong, inputs, score, mask, grad_out)
    else:
        seen = gate.seen_rows(score, KEEP)
        with pytest.raises(gate.GateError, match=name):
            gate.check_whole_backward(wrong, inputs, score, seen, grad_out)


def test_plain_is_torchs_attention():
    q, k, v = make_inputs(SETTINGS, 40)
    bias = make_score(SETTINGS, "normal", 40)
    seen = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    added = torch.where(seen, bias[:, :, None], -math.inf).repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=added, enable_gqa=True
    )
    out = gate.plain(q, k, v, bias, seen, 1 / math.sqrt(q.shape[-1]))
    torch.testing.assert_close(out, expected)
