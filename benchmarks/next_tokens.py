"""What dynamic masks do to next tokens: each row's distribution beside that of full attention.

python benchmarks/next_tokens.py --out benchmarks/results/next_tokens.json
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch

from dynmask import accelerate
from dynmask.assets import load_model, load_texts, load_tokenizer
from dynmask.report.machine import machine, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.99, 0.985, 0.98, 0.9])
    arguments = parser.parse_args()
    model, tokenizer = load_model(), load_tokenizer()
    ids = tokenizer(load_texts("perplexity")[0], verbose=False)["input_ids"][: arguments.tokens]
    tokens = torch.tensor([ids])
    cells = []
    with torch.no_grad():
        full = model(tokens).logits[0].log_softmax(-1)
        for coverage in arguments.coverages:
            with accelerate(model, coverage=coverage) as run:
                found = model(tokens).logits[0].log_softmax(-1)
            divergence = (full.exp() * (full - found)).sum(-1)
            same = (full.argmax(-1) == found.argmax(-1)).double().mean()
            cells.append(
                {
                    "coverage": coverage,
                    "density": run.stats()["density"]["prefill"],
                    "same_most_likely": float(same),
                    "mean_kl": float(divergence.mean()),
                    "largest_kl": float(divergence.max()),
                }
            )
    document = {
        "model": "embedded",
        "tokens": len(ids),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "cells": cells,
    }
    Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
