"""A small text of made-up words, read with the embedded model's tokenizer."""

import json
import random

import pytest
from train_cases import RECIPE

from dynmask.assets import load_tokenizer
from dynmask.train.corpus import Corpus
from dynmask.train.mixture import Mixture, Sequences
from dynmask.train.mqar import Mqar
from dynmask.train.run import train
from dynmask.train.texts import Folder


def made_up_text(words, repeats, seed):
    """Sentences in which each of ``words`` made-up words stands ``repeats`` times."""
    rng = random.Random(seed)
    known = {
        "".join(
            rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice([2, 3]))
        )
        for _ in range(2 * words)
    }
    drawn = sorted(known)[:words] * repeats
    rng.shuffle(drawn)
    sentences = [" ".join(drawn[i : i + 9]).capitalize() for i in range(0, len(drawn), 9)]
    return "".join(s + (".\n\n" if i % 5 == 4 else ". ") for i, s in enumerate(sentences))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """``train.txt`` of 2,000 words, about 400 of them the evaluation's, and ``train.jsonl``."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(made_up_text(2000, 6, 0), encoding="utf-8")
    rows = [{"text": "Élan vital.\nA second line."}, {"text": "Another document."}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder, tokenizer):
    return Corpus.build(Folder(text_folder, "train.txt"), tokenizer)


@pytest.fixture(scope="session")
def sequences(corpus, tokenizer):
    return Sequences(corpus, tokenizer, Mixture())


@pytest.fixture
def go(text_folder):
    """Train ``recipe`` in ``out`` and return the result."""

    def run(out, recipe=RECIPE, **settings):
        data = None if isinstance(recipe.data, Mqar) else str(text_folder)
        return train(recipe, out, data=data, workers=0, **settings)

    return run
