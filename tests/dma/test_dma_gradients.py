"""Gradients in float64, and the paper's equations 6 to 9: what is masked gets none."""

from __future__ import annotations

import pytest
import torch
from dma_models import hidden, make_layer, make_model, paper_layer, random_ids
from kernel_cases import device_of

from dynmask.dma import DmaForCausalLM

F64 = torch.float64


@pytest.mark.parametrize(
    "options",
    [{}, {"score": "linear"}, {"threshold": 0.7}, {"keep": None}],
    ids=["exp", "linear", "threshold", "keep-all"],
)
def test_gradcheck(options):
    # Without norms of q and k: transformers' compute in float32.
    small = {"keep": 3, "hidden_size": 4, "head_dim": 2, "qk_norm": False, "impl": "reference"}
    layer = make_layer(**{**small, **options}, dtype=F64)
    x = hidden(1, 6, dtype=F64)[..., :4].contiguous().requires_grad_()
    names, weights = zip(*layer.named_parameters(), strict=True)

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *weights))


def test_gradients_are_those_of_the_paper():
    layer = make_layer(keep=5, dtype=F64)
    x = hidden(1, 23, dtype=F64).requires_grad_()
    leaves = [x, *layer.parameters()]
    weight = hidden(1, 23, seed=1, dtype=F64)
    ours = torch.autograd.grad((layer(x) * weight).sum(), leaves)
    paper = torch.autograd.grad((paper_layer(layer, x[0], keep=5) * weight[0]).sum(), leaves)
    for a, b in zip(ours, paper, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "cpu", "triton"])
def test_scores_whose_exp_no_float_holds(impl):
    device = device_of(impl)

    def gradients(layer, x):
        with torch.no_grad():
            layer.score.A.fill_(3.0)
            layer.score.dt_proj.weight.mul_(20)
        values = layer.v_proj(x).view(1, 40, 2, 8).transpose(1, 2)
        exponent = torch.nn.functional.softplus(
            layer.score.dt_proj(values.transpose(1, 2).flatten(2))
        )
        assert (3.0 * exponent.max()).float().exp().isinf()
        weight = hidden(1, 40, seed=1).to(x)
        return torch.autograd.grad((layer(x) * weight).sum(), [x, *layer.parameters()])

    x = hidden(1, 40)
    exact = gradients(make_layer(dtype=F64, impl="reference"), x.to(F64).requires_grad_())
    found = gradients(make_layer(impl=impl).to(device), x.to(device).requires_grad_())
    # One key has all of a row's attention, so queries, keys and scores get next to nothing.
    largest = max(b.norm() for b in exact)
    for a, b in zip(found, exact, strict=True):
        assert (a.cpu() - b).norm() < 0.005 * largest


def attend(keep, rows, length=12):
    """Gradients of some rows in the layer's k, v and score, and who sees whom ``[G, N, N]``."""
    layer = make_layer(keep=keep, dtype=F64)
    found = {}
    select = layer._select

    def spy(k, v, score, slots, cache):
        score = score.detach().requires_grad_()
        k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
        out = select(k, v, score, slots, cache)
        found.update(k=k, v=v, score=score, seen=out[3].dense(length)[0])
        return out

    layer._select = spy
    layer(hidden(1, length, dtype=F64))[:, rows].square().sum().backward()
    return found


@pytest.mark.parametrize("keep", [1, 4, 11])
def test_masked_pairs_get_no_gradient_and_kept_ones_do(keep):
    for row in (0, 3, 11):
        found = attend(keep, [row])
        seen = found["seen"][:, row]
        assert (seen.sum(-1) == min(keep, row + 1)).all()
        for name in ("k", "v", "score"):
            gradient = found[name].grad[0].view(*seen.shape, -1)
            assert (gradient[~seen] == 0).all()
            # A lone key has probability 1 whatever its logit: only its value counts.
            if name == "v" or min(keep, row + 1) > 1:
                assert (gradient[seen] != 0).any(-1).all()


def test_an_evicted_key_learns_from_the_rows_that_kept_it():
    found = attend(4, list(range(12)))
    seen = found["seen"]
    evicted = seen.any(1) & ~seen[:, -1] & (seen.sum(1) > 1)
    assert evicted.any()
    assert (found["score"].grad[0][evicted] != 0).all()


def test_all_weights_learn_from_the_start():
    torch.manual_seed(0)
    model = DmaForCausalLM(make_model().config)
    ids = random_ids(2, 40)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, ids = make_model().train(), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def gradients():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        return loss, [weight.grad.clone() for weight in model.parameters()]

    loss, plain = gradients()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.model.layers[0].gradient_checkpointing
    again, checkpointed = gradients()
    assert loss == again
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cache_in_training_changes_no_gradient():
    model, ids = make_model().train(), random_ids(2, 40)
    found = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
