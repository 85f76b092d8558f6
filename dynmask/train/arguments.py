"""A recipe as the Trainer's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dynmask.train.recipe import Recipe
from dynmask.train.sections import Cosine


def training_arguments(
    recipe: Recipe, out: Path, *, workers: int, accumulate: int = 1, fsdp: bool = False
) -> TrainingArguments:
    """Translate a recipe.

    Args:
        recipe: the run.
        out: its folder.
        workers: processes that make batches.
        accumulate: micro batches of a step in one process.
        fsdp: shard the model.
    """
    on_gpu = torch.cuda.is_available()
    schedule = recipe.schedule
    kind: dict[str, Any] = (
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": schedule.floor},
        }
        if isinstance(schedule, Cosine)
        else {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": schedule.decay_steps,
                "decay_type": "1-sqrt",
                "min_lr_ratio": schedule.floor,
            },
        }
    )
    if fsdp:
        # Whole state dicts, so that a run may go on with another number of processes.
        kind["fsdp"] = True
        kind["fsdp_config"] = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=accumulate,
        learning_rate=recipe.lr,
        warmup_steps=schedule.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu and recipe.bf16,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        ddp_timeout=2 * 3600,  # the others wait while the first process tokenises
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        # Two, since the older one must not go before the newer one is marked as whole.
        save_total_limit=2,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
        disable_tqdm=True,
        **kind,
    )
    if fsdp and arguments.bf16:
        # Not there in builds of torch without distributed.
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Weights are gathered in the dtype that they are computed in and saved in. accelerate
        # would sum gradients in bfloat16 too, where DDP sums them in float32.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
        )
    return arguments
