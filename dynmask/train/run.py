"""Train a causal language model on a retrieval mixture with the transformers Trainer."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dynmask.train.mixture import KINDS, Sequences
from dynmask.train.recipe import Recipe

log = logging.getLogger(__name__)


class Steps(Dataset):
    """Item ``n`` is the whole batch of optimizer step ``n``, drawn from ``(seed, n)`` alone.

    So a resumed run sees the batches that it would have seen.
    """

    def __init__(self, sequences: Sequences, recipe: Recipe) -> None:
        self.sequences, self.recipe = sequences, recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        length = self.recipe.length_at(step)
        rng = np.random.default_rng((self.recipe.seed, step))
        ids, weights, kinds = self.sequences.batch(rng, self.recipe.tokens_per_step // length, length)
        return {
            "input_ids": torch.from_numpy(ids),
            "weights": torch.from_numpy(weights),
            "kinds": torch.from_numpy(kinds),
        }


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the next-token losses.

    ``sum_t w[t+1] * -log p(ids[t+1] | ids[..t]) / sum_t w[t+1]``

    Args:
        logits: ``[B, N, V]``.
        ids: ``[B, N]`` int64.
        weights: ``[B, N]``, the weight of predicting the token that stands there.
    """
    # Rolling the targets spares a copy of the logits, which slicing off the last row would make.
    targets = ids.roll(-1, dims=1)
    weights = weights.roll(-1, dims=1).clone()
    weights[:, -1] = 0.0
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def answer_accuracy(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, answer: float
) -> torch.Tensor:
    """Share of answer tokens that are the arg max, for each row ``[B]`` (NaN without answers)."""
    asked = weights[:, 1:] == answer
    hit = (logits[:, :-1].argmax(-1) == ids[:, 1:]) & asked
    return hit.sum(1) / asked.sum(1)


class WeightedTrainer(Trainer):
    """Trainer with the weighted loss, batches in order, and answer accuracy in its log."""

    def __init__(self, *args: Any, recipe: Recipe, compiled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self._loss = torch.compile(weighted_loss) if compiled else weighted_loss
        self._accuracy: dict[str, float] = {}

    def _get_train_sampler(self, *args: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The weighted loss; the mean over the batch does not depend on ``num_items_in_batch``."""
        ids, weights = inputs["input_ids"], inputs["weights"]
        outputs = model(input_ids=ids, use_cache=False)
        loss = self._loss(outputs.logits, ids, weights)
        if (self.state.global_step + 1) % self.args.logging_steps == 0:
            rows = answer_accuracy(
                outputs.logits.detach(), ids, weights, answer=self.recipe.mixture.answer
            )
            for number, kind in enumerate(KINDS):
                value = rows[inputs["kinds"] == number].nanmean().item()
                if value == value:
                    self._accuracy[f"answers_{kind}"] = round(value, 4)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the accuracy of answers and the sequence length."""
        step = max(self.state.global_step - 1, 0)
        extra = {"length": self.recipe.length_at(min(step, self.recipe.steps - 1))}
        super().log({**logs, **extra, **self._accuracy}, *args, **kwargs)


class Stop(TrainerCallback):
    """Saves and stops after so many minutes; the run resumes from there."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and a stop once the time is up."""
        if time.monotonic() > self.end:
            control.should_save = control.should_training_stop = True
        return control


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A freshly initialised model of the recipe's shape."""
    set_seed(recipe.seed)
    config = LlamaConfig(
        **recipe.model,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    recipe: Recipe,
    sequences: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    out: Path | str,
    *,
    minutes: float | None = None,
    workers: int = 2,
    compiled: bool | None = None,
) -> bool:
    """Train, or go on from the last checkpoint in ``out``.

    Writes ``checkpoint-*`` while it runs, and ``model/`` (bf16 safetensors with tokenizer),
    ``recipe.json`` and ``log.json`` at the end.

    Args:
        recipe: what to run.
        sequences: the data.
        tokenizer: saved beside the model.
        out: a folder; a run found there goes on if its recipe is the same.
        minutes: stop after that long with a checkpoint.
        workers: processes that make batches.
        compiled: torch.compile the layers and the loss; default: on a GPU.

    Returns:
        Whether the run is complete.

    Raises:
        ValueError: ``out`` holds a run of another recipe.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = json.loads(json.dumps(recipe.to_dict()))
    note = out / "recipe.json"
    if note.exists() and json.loads(note.read_text()) != written:
        raise ValueError(f"out: {out} holds a run of another recipe; give another folder")
    note.write_text(json.dumps(written, indent=1))
    on_gpu = torch.cuda.is_available()
    compiled = on_gpu if compiled is None else compiled
    model = build_model(recipe, tokenizer)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.floor},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=25,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=2000,
        save_total_limit=1,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
        disable_tqdm=True,
    )
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=Steps(sequences, recipe),
        data_collator=lambda items: items[0],
        callbacks=[Stop(minutes)] if minutes is not None else [],
        recipe=recipe,
        compiled=compiled,
    )
    last = any(out.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=last or None)
    done = trainer.state.global_step >= recipe.steps
    if done:
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))
        trainer.model.to(torch.bfloat16).save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    return done
