"""What the transformers Trainer is given: batches by step number, weighted loss, time limit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from dynmask.train.mixture import KINDS, Sequences
from dynmask.train.recipe import Recipe


class Steps(Dataset[dict[str, torch.Tensor]]):
    """Item ``n`` is the whole batch of optimizer step ``n``, drawn from ``(seed, n)`` alone.

    So a resumed run sees the batches that it would have seen.

    Args:
        sequences: the data.
        recipe: lengths, tokens a step and seed.

    Raises:
        ValueError: the text is shorter than the recipe's longest sequence.
    """

    def __init__(self, sequences: Sequences, recipe: Recipe) -> None:
        sequences.corpus.require(recipe.longest)
        self.sequences, self.recipe = sequences, recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        length = self.recipe.length_at(step)
        rng = np.random.default_rng((self.recipe.seed, step))
        rows = self.recipe.tokens_per_step // length
        ids, weights, kinds = self.sequences.batch(rng, rows, length)
        return {
            "input_ids": torch.from_numpy(ids),
            "weights": torch.from_numpy(weights),
            "kinds": torch.from_numpy(kinds),
        }


def only_item(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate: an item of `Steps` is a batch already."""
    (item,) = items
    return item


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the next-token losses, in nats.

    ``sum_t w[t+1] * -log p(ids[t+1] | ids[..t]) / sum_t w[t+1]``

    Args:
        logits: ``[B, N, V]``.
        ids: ``[B, N]`` int64.
        weights: ``[B, N]``, the weight of predicting the token that stands there.
    """
    # Rolling the targets spares a copy of the logits, which slicing off the last row would make.
    targets = ids.roll(-1, dims=1)
    weights = weights.roll(-1, dims=1)
    weights[:, -1] = 0.0
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def answer_accuracy(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, answer: float
) -> torch.Tensor:
    """Share of answer tokens that are the arg max.

    Args:
        logits: ``[B, N, V]``.
        ids: ``[B, N]`` int64.
        weights: ``[B, N]``.
        answer: the weight that marks answer tokens.

    Returns:
        ``[B]``; NaN for a row without answers.
    """
    asked = weights[:, 1:] == answer
    hit = (logits[:, :-1].argmax(-1) == ids[:, 1:]) & asked
    return hit.sum(1) / asked.sum(1)


class WeightedTrainer(Trainer):
    """Trainer with the weighted loss, batches in order, and answer accuracy in its log.

    Args:
        recipe: gives the answers' weight and the lengths.
        compiled: torch.compile the loss.
        settings: what ``Trainer`` takes.
    """

    def __init__(self, *, recipe: Recipe, compiled: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.recipe = recipe
        self._loss = torch.compile(weighted_loss) if compiled else weighted_loss
        self._accuracy: dict[str, float] = {}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, Steps)
        return SequentialSampler(dataset)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted loss; it is a mean, so ``num_items_in_batch`` does not enter."""
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the accuracy of answers and the sequence length."""
        step = max(self.state.global_step - 1, 0)
        super().log({**logs, "length": self.recipe.length_at(step), **self._accuracy}, start_time)


class TimeLimit(TrainerCallback):
    """Saves and stops after so many minutes; the run resumes from there."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and a stop once the time is up."""
        if time.monotonic() > self.end:
            control.should_save = control.should_training_stop = True
        return control
