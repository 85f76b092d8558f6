"""What the gate costs in quality: tau and coverage target against retrieval, on the embedded model.

python benchmarks/gate_sweep.py --threads 4 --out benchmarks/results/gate_sweep.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers

import dynmask
from dynmask.assets import load_model, load_texts, load_tokenizer
from dynmask.eval import Result, longeval, needle, perplexity

GRID = {
    0.1: (0.9,),
    0.03: (0.95, 0.97),
    0.02: (0.96, 0.97),
    0.01: (0.97, 0.98),
}
STATIC = (0.1, 0.01)


def tasks(model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    haystack, held_out = load_texts("haystack"), load_texts("perplexity")

    def short(result: Result) -> dict[str, Any]:
        kept = result.to_json()
        return {k: kept[k] for k in ("task", "metric", "n", "score", "interval", "settings")}

    return {
        "longeval 200": short(longeval(model, tokenizer, lines=200, n=40, questions=20, seed=101)),
        "needles 8192": short(
            needle(model, tokenizer, haystack, length=8192, n=40, needles=10, seed=101)
        ),
        "ruler 4096": short(
            needle(
                model, tokenizer, haystack, length=4096, n=40, needles=10, seed=101, form="ruler"
            )
        ),
        "perplexity 4096": short(perplexity(model, tokenizer, held_out, length=4096, windows=3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(), load_tokenizer()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dynmask": dynmask.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "the embedded model",
        "rows": [],
    }

    def add(tau: float | None, mode: str, plan: dynmask.MaskPlan | None) -> None:
        heads = density = target = None
        if plan is None:
            scores = tasks(model, tokenizer)
        else:
            with dynmask.accelerate(model, plan, mode=mode):
                scores = tasks(model, tokenizer)
            density = float(plan.density(8192, mode).mean())
            target = plan.settings.coverage
            heads = sum(int((~layer.gate).sum()) for layer in plan.layers.values())
        row = {
            "tau": tau,
            "mode": mode,
            "coverage": target if mode == "auto" else None,
            "static_heads": heads if mode == "auto" else None,
            "density_8192": density,
            "scores": scores,
        }
        result["rows"].append(row)
        figures = "  ".join(f"{name} {score['score']:.3f}" for name, score in scores.items())
        print(
            f"tau {tau}  {mode}  target {row['coverage']}  heads {row['static_heads']}  "
            f"density {density}  {figures}",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    add(None, "full", None)
    for tau, targets in GRID.items():
        plan = dynmask.calibrate(model, tokenizer, load_texts("calibration"), tau=tau)
        if tau in STATIC:
            add(tau, "static", plan)
        for target in targets:
            add(tau, "auto", plan.with_coverage(target))


if __name__ == "__main__":
    main()
