"""The model: saving, loading, what transformers expects, and what must not change its rows."""

from __future__ import annotations

import pytest
import torch
from dma_models import VOCAB, config, make_model, random_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from dynmask.dma import DmaForCausalLM, DmaModel, LifetimeCache


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **kwargs}).logits


def test_known_to_transformers(tmp_path):
    model = AutoModelForCausalLM.from_config(config())
    assert type(model) is DmaForCausalLM
    assert type(AutoModel.from_config(config())) is DmaModel
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).keep == 7
    assert type(AutoModel.from_pretrained(tmp_path)) is DmaModel


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_saved_and_loaded_is_the_same(tied, residual, tmp_path):
    model = make_model(tie_word_embeddings=tied, residual_weights=residual)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    ids = random_ids(2, 30)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_weights_missing_from_a_file_start_as_new_ones(tmp_path):
    model = make_model()
    state = {k: v for k, v in model.state_dict().items() if ".score." not in k}
    torch.manual_seed(0)
    loaded = DmaForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    std = torch.stack([layer.self_attn.score.A for layer in loaded.model.layers]).std()
    assert 0.1 < std < 0.6


def test_loss_is_that_of_the_logits():
    model, ids = make_model(), random_ids(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels, use_cache=False)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    )
    close(out.loss, expected, 1e-6)
    halved = model(ids, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(68)).loss
    close(halved, out.loss / 2, 1e-6)  # 15 + 19 tokens count.


def test_what_is_returned():
    model, ids = make_model(), random_ids(2, 20)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert isinstance(out.past_key_values, LifetimeCache)
    assert model(ids, use_cache=False).past_key_values is None
    close(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([1, 7])).logits, out.logits[:, [1, 7]])
    close(model(inputs_embeds=out.hidden_states[0]).logits, out.logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


def test_positions_of_padding_are_no_documents():
    model, ids = make_model(), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # As ``generate`` makes them.
    out = model(ids, attention_mask=mask, position_ids=positions)
    assert out.past_key_values.get_seq_length() == 20
    close(out.logits[mask.bool()], logits(model, ids, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast(use_cache):
    model, ids = make_model(initializer_range=0.05), random_ids(2, 40)
    expected = model(ids, labels=ids, use_cache=use_cache).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids, use_cache=use_cache)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    close(out.loss, expected, 0.02)
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_resized_embeddings():
    model, ids = make_model(), random_ids(2, 20)
    before = logits(model, ids)
    model.resize_token_embeddings(VOCAB + 9)
    after = logits(model, ids)
    assert after.shape[-1] == model.config.vocab_size == VOCAB + 9
    close(after[..., :VOCAB], before)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("changes", [{}, {"threshold": 0.9}, {"keep": [3, None, 9]}], ids=str)
def test_padding_changes_nothing(changes, use_cache):
    model, ids, length = make_model(**changes), random_ids(3, 25), 25
    alone = logits(model, ids[:1])
    for start in (0, 3, 8):
        padded, mask = random_ids(3, 33, seed=1), torch.ones(3, 33, dtype=torch.long)
        padded[0, start : start + length] = ids[0]
        mask[0, :start] = 0
        mask[0, start + length :] = 0
        out = logits(model, padded, attention_mask=mask, use_cache=use_cache)
        close(out[:1, start : start + length], alone)
        close(out[1:2], logits(model, padded[1:2]))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("changes", [{}, {"threshold": 0.9}, {"keep": [3, None, 40]}], ids=str)
def test_padding_between_tokens_changes_nothing(changes, use_cache):
    model, ids = make_model(**changes), random_ids(2, 33)
    mask = torch.ones_like(ids)
    mask[0, [0, 4, 5, 6, 20, 32]] = 0
    real = mask[0].bool()
    for positions in (None, mask.cumsum(-1) - 1):
        given = {"attention_mask": mask, "position_ids": positions}
        out = logits(model, ids, use_cache=use_cache, **given)
        close(out[:1, real], logits(model, ids[:1, real]))
        close(out[1:], logits(model, ids[1:]))


HOLE = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1]])
each_restart = pytest.mark.parametrize(
    ("positions", "mask", "restarts"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], None, True),
        ([0, 1, 2, 3, 9, 10, 11, 12], None, True),
        ([5, 6, 7, 8, 9, 10, 11, 12], None, False),
        ([1, 0, 1, 2, 1, 1, 0, 1], HOLE, True),
        ([1, 0, 1, 2, 1, 1, 9, 10], HOLE, True),
        ([1, 0, 1, 2, 1, 1, 3, 4], HOLE, False),
        ([0, 1, 2, 3, 4, 5, 6, 7], HOLE, False),
        ([0, 1, 2, 3, 0, 1, 2, 3], HOLE.new_tensor([[1, 1, 1, 1, 0, 0, 0, 0]]), False),
    ],
    ids=[
        "packed",
        "jump",
        "on",
        "hole-packed",
        "hole-jump",
        "hole-counted",
        "hole-slots",
        "padding",
    ],
)


@torch.no_grad()
@each_restart
def test_positions_that_start_again_are_refused_with_a_cache(positions, mask, restarts):
    model, ids, cache = make_model(), random_ids(1, 8), LifetimeCache()
    model(ids[:, :3], past_key_values=cache)
    given = {"position_ids": torch.tensor([positions]), "past_key_values": cache}
    if mask is not None:
        given["attention_mask"] = torch.cat([torch.ones_like(mask[:, :3]), mask], 1)
    if restarts:
        with pytest.raises(ValueError, match=r"position_ids that do not go on, .* use_cache=False"):
            model(ids, **given)
    else:
        model(ids, **given)
    assert cache.get_seq_length() == (3 if restarts else 11)


@pytest.mark.parametrize("use_cache", [True, False])
def test_documents_need_their_tokens_together(use_cache):
    positions = torch.tensor([[1, 0, 1, 2, 1, 1, 0, 1]])
    given = {"attention_mask": HOLE, "position_ids": positions, "use_cache": use_cache}
    with pytest.raises(ValueError, match="several runs"):
        logits(make_model(), random_ids(1, 8), **given)


@pytest.mark.parametrize("keep", [5, [5, None, 3]])
def test_future_tokens_never_change_the_past(keep):
    model, ids = make_model(keep=keep), random_ids(2, 40)
    whole = logits(model, ids)
    for end in (1, 5, 6, 23):
        changed = ids.clone()
        changed[:, end:] = random_ids(2, 40 - end, seed=1)
        close(logits(model, changed)[:, :end], whole[:, :end])


@pytest.mark.parametrize("said_by", ["collator", "documents"])
def test_packed_equals_one_by_one(said_by):
    model = make_model(keep=5)
    texts = [random_ids(1, n, seed=n)[0] for n in (1, 17, 4, 23)]
    batch = DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts])
    labels = batch.pop("labels")
    if said_by == "documents":
        ids = torch.cat([torch.full((len(text),), i) for i, text in enumerate(texts)])
        batch = {"input_ids": batch["input_ids"], "documents": ids[None]}
    with torch.no_grad():
        out = model(**batch, labels=labels)
    assert out.past_key_values is None
    losses = []
    for text, part in zip(texts, out.logits.split([len(t) for t in texts], 1), strict=True):
        alone = logits(model, text[None])
        close(part, alone)
        losses.append(torch.nn.functional.cross_entropy(alone[0, :-1], text[1:], reduction="sum"))
    close(out.loss, sum(losses) / sum(len(text) - 1 for text in texts))


def test_trains_under_the_trainer(tmp_path):
    model = make_model(initializer_range=0.02)
    rows = [{"input_ids": [3 + (i + j) % 9 for j in range(30 + i)]} for i in range(32)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model, arguments, DataCollatorWithFlattening(), rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_config_is_read_at_each_call():
    model, ids = make_model(keep=40), random_ids(2, 40)
    before = logits(model, ids)
    model.config.keep = 7
    after = logits(model, ids)
    assert torch.equal(after, logits(make_model(keep=7), ids))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask is \[2, 9\] but must be \[2, 10\]"),
        ({"attention_mask": torch.full((2, 10), -1e9)}, "must hold only 0 and 1"),
        ({"past_key_values": DynamicCache()}, "DynamicCache has no place .*LifetimeCache"),
        (
            {"documents": torch.zeros(2, 10).long(), "past_key_values": LifetimeCache()},
            "use_cache=False",
        ),
        ({"attentoin_mask": torch.ones(2, 10)}, "no argument attentoin_mask"),
        ({"output_attentions": True}, "never computed"),
        ({"is_causal": False}, "is_causal=False"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 20])}, "give documents, or position_ids"),
        ({"inputs_embeds": torch.ones(2, 10, 32)}, "either input_ids or inputs_embeds"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_model()(random_ids(2, 10), **inputs)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(1, 0), (0, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.long, torch.float32], ids=str)  # Empty texts are float32.
def test_no_tokens_are_refused(shape, dtype, use_cache):
    with pytest.raises(ValueError, match=r"input_ids is .* holds no token"):
        make_model()(torch.zeros(shape, dtype=dtype), use_cache=use_cache)
    with pytest.raises(ValueError, match="holds no token"):
        make_model()(inputs_embeds=torch.zeros(*shape, 32), use_cache=use_cache)


def test_other_attention_is_refused():
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        AutoModelForCausalLM.from_config(config(), attn_implementation="sdpa")
