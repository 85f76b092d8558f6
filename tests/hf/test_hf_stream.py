"""Layer-by-layer streaming against the model's own eager forward."""

from __future__ import annotations

import pytest
import torch
from hf_models import make_model, random_ids, snapshot

from dynmask.hf import compat
from dynmask.hf.stream import Batch, LayerStream, probabilities, sample_rows

ALL = ["llama", "llama-mha", "qwen3", "mistral", "mistral-window", "gemma3", "phi3"]


def stream_all(model, batch, most_rows=None):
    """Return per layer the maps by row, and the last hidden states."""
    maps, hidden = [], None
    with LayerStream(model) as stream:
        for depth in range(stream.depth):
            rows: dict[int, list[torch.Tensor]] = {}
            hidden = stream.step(
                depth,
                batch,
                hidden,
                lambda first, p, _, rows=rows: rows.setdefault(first, []).append(p),
                most_rows=most_rows,
            )
            maps.append(
                [
                    torch.cat([rows[first][row] for first in sorted(rows)])
                    for row in range(len(batch.lengths))
                ]
            )
    return maps, hidden


@pytest.mark.parametrize("kind", [*ALL, "gemma2-softcap"])
@pytest.mark.parametrize("lengths", [[33], [33, 20, 1]], ids=["whole", "padded"])
def test_maps_and_states_equal_eager(kind, lengths):
    model = make_model(kind)
    batch = Batch(random_ids(len(lengths), 33), torch.tensor(lengths))
    maps, hidden = stream_all(model, batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            output_attentions=True,
        )
        last = model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mine = model.model.norm(hidden)
    for layer, expected in zip(maps, out.attentions, strict=True):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                layer[row], expected[row, :, :length, :length], rtol=1e-4, atol=1e-5
            )
    real = batch.attention_mask.bool()
    torch.testing.assert_close(mine[real], last[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2-softcap"])
def test_sampled_rows_are_rows_of_the_whole_map(kind):
    model = make_model(kind)
    lengths = [33, 20, 1]
    batch = Batch(random_ids(3, 33), torch.tensor(lengths))
    whole, hidden = stream_all(model, batch)
    some, hidden_of_some = stream_all(model, batch, most_rows=7)
    assert torch.equal(hidden, hidden_of_some)
    for layer, expected in zip(some, whole, strict=True):
        for row, length in enumerate(lengths):
            rows = sample_rows(length, 7)
            assert layer[row].shape == (4, len(rows), length)
            torch.testing.assert_close(layer[row], expected[row][:, rows])


def test_no_square_is_made_of_sampled_rows(monkeypatch):
    # Softcap makes the layer's output of maps too; a batch without padding needs no mask.
    sizes = []
    softmax = torch.Tensor.softmax

    def spy(tensor, dim):
        sizes.append(tensor.shape)
        return softmax(tensor, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    model = make_model("gemma2-softcap", max_position_embeddings=1024)
    batch = Batch(random_ids(1, 600), torch.tensor([600]))
    stream_all(model, batch, most_rows=100)
    assert {shape[-1] for shape in sizes} == {600}
    assert {shape[-2] for shape in sizes} == {100, 256, 600 - 2 * 256}


@pytest.mark.parametrize(("length", "most"), [(1, 2), (63, 64), (65, 64), (111, 2), (4096, 256)])
def test_sampled_rows_are_spread_from_first_to_last(length, most):
    rows = sample_rows(length, most)
    assert len(rows) == min(length, most)
    assert (rows[0], rows[-1]) == (0, length - 1)
    gaps = rows.diff()
    assert (gaps >= 1).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert torch.equal(sample_rows(length, None), torch.arange(length))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_patched(error):
    model = make_model("gemma3")
    model.model.layers[1].train()  # a mixed training flag must come back too
    before = snapshot(model)
    batch = Batch(random_ids(1, 9), torch.tensor([9]))

    def consumer(first, probs, rows):
        if error is not None:
            raise error("stop")

    def run():
        with LayerStream(model) as stream:
            assert not any(module.training for module in model.modules())
            stream.step(0, batch, None, consumer)

    if error is None:
        run()
    else:
        with pytest.raises(error, match="stop"):
            run()
    assert snapshot(model) == before


def test_own_forward_of_a_layer_comes_back():
    # accelerate's device hooks put a `forward` on the layer itself.
    model = make_model("llama")
    layer = model.model.layers[0]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    hooked = layer.forward
    with LayerStream(model) as stream:
        stream.step(0, Batch(random_ids(1, 5), torch.tensor([5])), None)
    assert vars(layer)["forward"] is hooked


def test_unknown_attention_argument_names_the_layer_type():
    model = make_model("llama")
    original = model.forward
    model.forward = lambda **kwargs: original(**kwargs, s_aux=torch.zeros(4))
    batch = Batch(random_ids(1, 5), torch.tensor([5]))
    with LayerStream(model) as stream, pytest.raises(ValueError, match=r"LlamaAttention.*s_aux"):
        stream.step(0, batch, None)


def test_attention_layers_and_windows():
    found = compat.attention_layers(make_model("gemma3"))
    assert [(x.index, x.depth, x.own_window, x.heads) for x in found] == [
        (0, 0, 8, 4),
        (1, 1, None, 4),
        (2, 2, None, 4),
    ]
    assert [x.own_window for x in compat.attention_layers(make_model("mistral-window"))] == [8] * 3
    assert compat.context_limit(make_model("llama")) == 256


def test_unknown_layer_type_is_named():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"no attention layer that dynmask knows.*LlamaAttention"):
        compat.attention_layers(model)


def test_probabilities_of_wide_groups_come_in_parts():
    torch.manual_seed(0)
    q, k = torch.randn(20, 7, 8), torch.randn(2, 7, 8)
    parts = list(probabilities(q, k, None, torch.arange(7), scaling=0.5, softcap=None))
    assert [(first, len(p)) for first, p in parts] == [(0, 8), (8, 2), (10, 8), (18, 2)]
    logits = 0.5 * q @ k.repeat_interleave(10, 0).mT
    logits = logits.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(torch.cat([p for _, p in parts]), logits.softmax(-1))
