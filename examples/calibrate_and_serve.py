"""Calibrate a model and serve it, sparse, with ``transformers serve``.

The server loads models by itself, so this script hands it a model manager that accelerates what it
loads. A DMA model chooses its keys by itself: it is served as it is, and needs no plan.

    python examples/calibrate_and_serve.py MODEL --plan my-plan --texts book.txt another.txt
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "It was", "max_tokens": 20}'

The plan is made if its folder does not exist yet. Without ``--plan`` all masks are made from the
input. Needs ``pip install 'transformers[serving]' accelerate``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

import dynmask
from dynmask.assets import load_texts, model_folder

OWN_MANAGER = model_manager.ModelManager


def manager(plan: dynmask.MaskPlan | None, mode: str) -> type[model_manager.ModelManager]:
    """Return transformers' model manager, with each model that it loads accelerated."""

    class Accelerating(OWN_MANAGER):  # type: ignore[misc,valid-type]
        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._load_model(*args, **kwargs).eval()
            if model.config.model_type != dynmask.DmaConfig.model_type:
                dynmask.accelerate(model, plan, mode=mode)  # for as long as the model lives
            return model

    return Accelerating


def load_or_make_plan(folder: Path, name: str, texts: list[str], **settings: Any) -> None:
    """Calibrate the model, unless there is a plan already."""
    if folder.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    dynmask.calibrate(model, tokenizer, texts, **settings).save(folder)


def serve(
    name: str, plan: dynmask.MaskPlan | None = None, *, mode: str = "auto", **options: Any
) -> Serve:
    """Serve one model; ``options`` are those of ``transformers serve``."""
    # The server looks a checkpoint's class up in transformers itself.
    transformers.DmaForCausalLM = dynmask.DmaForCausalLM
    model_manager.ModelManager = manager(plan, mode)
    try:
        return Serve(force_model=name, **options)
    finally:
        model_manager.ModelManager = OWN_MANAGER


def main(arguments: list[str] | None = None) -> None:
    """Calibrate if that is to be done, and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_folder()), help="folder or hub name")
    parser.add_argument("--plan", type=Path, help="folder of the plan; made if it is not there")
    parser.add_argument("--texts", nargs="+", type=Path, help="to calibrate with")
    parser.add_argument("--mode", default="auto", help="as in dynmask.accelerate")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    plan = None
    if options.plan is not None:
        texts = [path.read_text() for path in options.texts or []] or load_texts("calibration")
        load_or_make_plan(options.plan, options.model, texts)
        plan = dynmask.MaskPlan.load(options.plan)
    serve(options.model, plan, mode=options.mode, port=options.port)


if __name__ == "__main__":
    main()
