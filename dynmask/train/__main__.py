"""``python -m dynmask.train RECIPE --data FOLDER --out FOLDER``: train a model from a recipe."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib import resources
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynmask.eval import prompts
from dynmask.train.corpus import Corpus, documents, text_files
from dynmask.train.mixture import Sequences
from dynmask.train.recipe import Recipe
from dynmask.train.run import train
from dynmask.train.tokenizer import train_tokenizer


def make_tokenizer(files: list[Path], recipe: Recipe) -> PreTrainedTokenizerBase:
    """Train the recipe's tokenizer on 200,000 characters a document and on the record's wording."""
    texts = [text[-200_000:] for text in documents(files)]
    wording = prompts.LINES_HEADER + prompts.official_question("x") + prompts.ruler_needle("x", 1)
    texts.append(wording * 100 + prompts.record_line("x", 1) * 5000)
    return train_tokenizer(
        texts,
        vocab_size=recipe.vocab_size,
        context=int(recipe.model.get("max_position_embeddings", 8192)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Train; returns 0 when complete, 3 when stopped by ``--minutes`` before the end."""
    parser = argparse.ArgumentParser(prog="python -m dynmask.train", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe in dynmask/train/recipes")
    parser.add_argument("--data", required=True, help="folder of .txt or .jsonl text, .xz too")
    parser.add_argument("--pattern", default="train*", help="glob on the file names (train*)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokenizer", help="a folder with a tokenizer; default: train one")
    parser.add_argument("--minutes", type=float, help="stop after that long, to be gone on with")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    named = resources.files("dynmask.train").joinpath("recipes", f"{chosen.recipe}.yaml")
    recipe = Recipe.load(Path(str(named)) if named.is_file() else chosen.recipe)
    files = text_files(chosen.data, chosen.pattern)
    kept = chosen.out / "tokenizer"
    if chosen.tokenizer or kept.exists():
        tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer or kept)
    else:
        tokenizer = make_tokenizer(files, recipe)
        tokenizer.save_pretrained(kept)
    corpus = Corpus.build(files, tokenizer, cache=chosen.out / "corpus.npz")
    done = train(
        recipe,
        Sequences(corpus, tokenizer, recipe.mixture),
        tokenizer,
        chosen.out,
        minutes=chosen.minutes,
        workers=chosen.workers,
    )
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
