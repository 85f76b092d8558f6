"""What the transformers Trainer is given: the loss, answer accuracy, and a stop when it breaks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer

from dynmask.train.batches import Item
from dynmask.train.recipe import Recipe
from dynmask.train.scored import ScoredHead
from dynmask.train.source import Source


class NonFiniteLossError(RuntimeError):
    """The loss or the weights are no numbers any more; the message says where and what was kept."""


def weighted_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    norm: torch.Tensor,
    scored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of the next-token losses over ``norm``, in nats.

    ``sum_t w[t+1] * -log p(ids[t+1] | ids[..t]) / norm``

    Args:
        logits: ``[B, N, V]``, or ``[1, M, V]`` of the scored positions.
        ids: ``[B, N]`` int64.
        weights: ``[B, N]``, the weight of predicting the token that stands there.
        norm: a number; the sum of the weights that count gives their mean.
        scored: ``[M]``, see `dynmask.train.scored`; None for all positions.
    """
    # Rolling the targets spares a copy of the logits, which slicing off the last row would make.
    targets = ids.roll(-1, dims=1).flatten()
    weights = weights.roll(-1, dims=1)
    weights[:, -1] = 0.0
    weights = weights.flatten()
    if scored is not None:
        targets, weights = targets[scored], weights[scored]
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    return (losses * weights).sum() / norm


def answer_counts(
    logits: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    scored: torch.Tensor | None = None,
    *,
    answer: float,
) -> torch.Tensor:
    """Count answer tokens, and those that are the arg max.

    Args:
        logits: ``[B, N, V]``, or ``[1, M, V]`` of the scored positions.
        ids: ``[B, N]`` int64.
        weights: ``[B, N]``.
        scored: ``[M]``, see `dynmask.train.scored`; None for all positions.
        answer: the weight that marks answer tokens; over 0, so that they are scored.

    Returns:
        ``[B, 2]``: right ones, and all.
    """
    asked = weights[:, 1:] == answer
    best = logits.argmax(-1)
    if scored is not None:
        best = torch.zeros_like(ids).flatten().index_copy(0, scored, best.flatten()).view_as(ids)
    hit = (best[:, :-1] == ids[:, 1:]) & asked
    return torch.stack([hit.sum(1), asked.sum(1)], dim=1)


def answers(counts: EvalPrediction) -> dict[str, float]:
    """Share of held-out answers that are right; for the Trainer's ``compute_metrics``."""
    right, asked = np.asarray(counts.predictions).sum(axis=0)
    return {"answers": round(float(right) / float(asked), 4)} if asked else {}


class WeightedTrainer(Trainer):
    """Trainer with the weighted loss, batches in order, and answer accuracy in its log.

    A step's loss is ``sum of weight * loss / sum of weights`` over the whole step, however many
    micro batches and processes share it: each computes its part over the mean weight of a part, and
    the Trainer takes the mean over micro batches, DDP and FSDP that over processes.

    Args:
        recipe: gives the lengths.
        source: gives the answers' weight and kinds.
        compiled: torch.compile the loss.
        settings: what ``Trainer`` takes.

    Attributes:
        head: the model's output projection.
    """

    def __init__(self, *, recipe: Recipe, source: Source, compiled: bool, **settings: Any) -> None:
        if source.answer is not None:
            settings["compute_metrics"] = answers
        super().__init__(**settings)
        self.recipe, self.source = recipe, source
        self._loss = torch.compile(weighted_loss) if compiled else weighted_loss
        self._accuracy: dict[str, float] = {}
        self.head = ScoredHead(settings["model"])
        self._probe = Probe()
        self._knows_documents = (
            "documents" in inspect.signature(settings["model"].forward).parameters
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, Sized)
        return SequentialSampler(dataset)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Item,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted loss; ``norm`` is in the batch, so ``num_items_in_batch`` does not enter."""
        ids, weights = inputs["input_ids"], inputs["weights"]
        given = {"input_ids": ids, "use_cache": False}
        if "documents" in inputs:
            # transformers' own models read documents off positions that start again.
            given["position_ids"] = inputs["position_ids"]
            if self._knows_documents:
                given["documents"] = inputs["documents"]
        scored = inputs.get("scored")
        with self.head.only(scored):
            outputs = model(**given)
        loss = self._loss(outputs.logits, ids, weights, inputs["norm"], scored)
        if model.training:
            self._probe.watch(loss)
            if (self.state.global_step + 1) % self.args.logging_steps == 0:
                self._score(outputs.logits.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _score(self, logits: torch.Tensor, inputs: Item) -> None:
        """Keep the accuracy of answers in this micro batch for the next entry of the log."""
        if self.source.answer is None:
            return
        counts = self._counts(logits, inputs)
        for number, kind in enumerate(self.source.kinds):
            right, asked = counts[inputs["kinds"] == number].sum(0).tolist()
            if asked:
                self._accuracy[f"answers_{kind}"] = round(right / asked, 4)

    def _counts(self, logits: torch.Tensor, inputs: Item) -> torch.Tensor:
        assert self.source.answer is not None
        ids, weights = inputs["input_ids"], inputs["weights"]
        return answer_counts(logits, ids, weights, inputs.get("scored"), answer=self.source.answer)

    def training_step(self, model: torch.nn.Module, inputs: Item, *args: Any) -> torch.Tensor:
        """Forward and backward; a loss that is no number stops the run with the batch saved.

        Raises:
            NonFiniteLossError: naming the step and the file with the batch.
        """
        loss = super().training_step(model, inputs, *args)
        value = self._probe.value()
        if not math.isfinite(value):
            step, rank = self.state.global_step + 1, self.args.process_index
            assert self.args.output_dir is not None
            path = Path(self.args.output_dir) / f"nonfinite-step-{step}-process-{rank}.safetensors"
            kept = {name: tensor.cpu().contiguous() for name, tensor in inputs.items()}
            save_file(kept, path, metadata={"step": str(step), "loss": str(value)})
            raise NonFiniteLossError(
                f"the loss of step {step} is {value}; its batch is in {path}. The last checkpoint "
                f"is from before: lower lr or raise warmup_steps, in another folder"
            )
        return loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Item,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss of held-out sequences, and in place of logits ``[B, 2]``, the counts of answers."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if self.source.answer is None:
            return loss.detach(), None, None
        counts = self._counts(outputs.logits, inputs)
        return loss.detach(), counts, counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the accuracy of answers and the sequence length to what training logs."""
        if "loss" in logs:
            step = max(self.state.global_step - 1, 0)
            logs = {**logs, "length": self.recipe.length_at(step), **self._accuracy}
        super().log(logs, start_time)


class Probe:
    """The value of a loss, read without waiting for the backward pass that was queued after it."""

    def __init__(self) -> None:
        self._copy: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Copy the loss to the host, once it is there."""
        loss = loss.detach()
        if not loss.is_cuda:
            self._copy = loss
            return
        if self._event is None:
            self._copy = torch.empty((), pin_memory=True)
            self._event = torch.cuda.Event()
        assert self._copy is not None
        self._copy.copy_(loss, non_blocking=True)
        self._event.record()

    def value(self) -> float:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        assert self._copy is not None
        return float(self._copy)
