"""Small recipes that tests of runs share."""

import dataclasses

from dynmask.train.mqar import Mqar
from dynmask.train.recipe import Recipe
from dynmask.train.sections import Phase, Retrieval, WarmupStableDecay

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
RECIPE = Recipe(
    model={"type": "llama", **SHAPE},
    data=Retrieval(),
    phases=(Phase(64, 3), Phase(128, 2)),
    tokens_per_step=256,
    schedule=WarmupStableDecay(2, 2),
    tokenizer="embedded",
    log_every=1,
    save_every=2,
)
MQAR = dataclasses.replace(
    RECIPE,
    model={"type": "dma", "keep": 24, **SHAPE},
    data=Mqar(vocab=64, pairs=8, filler=4),
    eval_every=3,
    eval_sequences=5,
)


def changed(recipe=RECIPE, **changes):
    return dataclasses.replace(recipe, **changes)


def losses(result):
    return [entry["loss"] for entry in result.log if "loss" in entry]
