"""Train a causal language model on a retrieval mixture with the transformers Trainer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from dynmask.train.mixture import Sequences
from dynmask.train.recipe import Recipe
from dynmask.train.trainer import Steps, TimeLimit, WeightedTrainer, only_item


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A freshly initialised model of the recipe's shape.

    Raises:
        ValueError: the recipe's model has a field that ``LlamaConfig`` does not know.
    """
    known = LlamaConfig().to_dict()
    if unknown := sorted(set(recipe.model) - set(known)):
        raise ValueError(
            f"recipe: model: unknown field {', '.join(unknown)}; known are {', '.join(known)}"
        )
    set_seed(recipe.seed)
    config = LlamaConfig(
        **recipe.model,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def claim(out: Path, recipe: Recipe, sequences: Sequences) -> None:
    """Note in ``out`` which run the folder is for: recipe and text.

    Raises:
        ValueError: ``out`` holds a run of another recipe or on other text.
    """
    note = out / "run.json"
    # Through JSON, so that tuples compare as the lists that come back.
    run = json.loads(
        json.dumps({"recipe": recipe.to_dict(), "text_sha256": sequences.corpus.sha256()})
    )
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        for part, what in (("recipe", "of another recipe"), ("text_sha256", "on other text")):
            if found[part] != run[part]:
                raise ValueError(f"out: {out} holds a run {what}; give another folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    _write(note, json.dumps(run, indent=1))


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
    """Train, or go on from the last checkpoint in ``out``, on one GPU or on the CPU.

    Writes ``run.json`` (recipe and digest of the text) first, ``checkpoint-*`` while it runs, and
    ``log.json`` and ``model/`` (bf16 safetensors with the tokenizer) when it is complete.

    Args:
        recipe: what to run.
        sequences: the data.
        tokenizer: saved beside the model.
        out: a folder; a run found there goes on if its recipe and text are the same.
        minutes: stop after that long with a checkpoint.
        workers: processes that make batches; 0 makes them in this one.
        compiled: torch.compile the layers and the loss; default: on a GPU.

    Returns:
        Whether the run is complete.

    Raises:
        ValueError: ``out`` holds another run, the text is too short, or several GPUs are visible.
    """
    if torch.cuda.device_count() > 1:
        raise ValueError("train runs on one GPU: set CUDA_VISIBLE_DEVICES to the one to use")
    out = Path(out)
    steps = Steps(sequences, recipe)
    model = build_model(recipe, tokenizer)
    claim(out, recipe, sequences)
    compiled = torch.cuda.is_available() if compiled is None else compiled
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    trainer = WeightedTrainer(
        model=model,
        args=_arguments(recipe, out, workers),
        train_dataset=steps,
        data_collator=only_item,
        callbacks=[TimeLimit(minutes)] if minutes is not None else [],
        recipe=recipe,
        compiled=compiled,
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(out))
    done = trainer.state.global_step >= recipe.steps
    if done:
        _write(out / "log.json", json.dumps(trainer.state.log_history))
        _save(model, tokenizer, out / "model")
    return done


def _arguments(recipe: Recipe, out: Path, workers: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
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


def _last_checkpoint(out: Path) -> str | None:
    """The last checkpoint that is whole: its ``trainer_state.json`` is written last."""
    whole = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if last is None else str(last)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save to a folder of another name, then rename: ``folder`` is whole or not there."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
