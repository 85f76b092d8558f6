"""lm-evaluation-harness on an accelerated model, and on a DMA model, through its ``hf`` model.

The harness takes a model that is loaded already, so a model inside ``accelerate`` is measured like
any other. The two tasks are made here (``lm_eval_tasks``), so that nothing is downloaded; put names
of the harness's own tasks in their place.

    python examples/lm_eval_harness.py MODEL [--plan my-plan] [--tasks NAME ...]

Needs ``pip install lm-eval``.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynmask
from dynmask.assets import model_folder

TASKS = Path(__file__).parent / "lm_eval_tasks"
LINES = ["dynmask_lines_choice", "dynmask_lines_generate"]


def measure(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    """Return the harness's results, task by task.

    One document at a time: the harness pads batches without telling the model where, and dynamic
    masks are made from all that a call holds.
    """
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(model.device))
    manager = TaskManager(include_path=str(TASKS), include_defaults=tasks != LINES)
    found = simple_evaluate(hf, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    return found["results"]


def main(arguments: list[str] | None = None) -> None:
    """Measure a model as it is and, if it is no DMA model, accelerated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_folder()), help="folder or hub name")
    parser.add_argument("--plan", help="folder of a plan for it")
    parser.add_argument("--tasks", nargs="+", default=LINES, help="names of the harness's tasks")
    parser.add_argument("--limit", type=int, help="documents of each task")
    options = parser.parse_args(arguments)
    # `import dynmask.dma`, which these names need, makes DMA checkpoints known to transformers.
    kind = dynmask.DmaConfig.model_type
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    runs: dict[str, Any] = {"as it is": nullcontext()}
    if model.config.model_type != kind:
        plan = None if options.plan is None else dynmask.MaskPlan.load(options.plan)
        runs["accelerated"] = None
    for name, context in runs.items():
        with context or dynmask.accelerate(model, plan) as run:
            found = measure(model, tokenizer, options.tasks, limit=options.limit)
        for task, values in found.items():
            shown = {k: v for k, v in values.items() if isinstance(v, float) and "stderr" not in k}
            print(f"{name}: {task}: {shown}")
        if run is not None:
            print(f"density: {run.stats()['density']}")


if __name__ == "__main__":
    main()
