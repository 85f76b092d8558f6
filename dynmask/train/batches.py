"""A run's batches as a dataset, numbered so that a resumed run sees what it would have seen."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from dynmask.train.recipe import Recipe
from dynmask.train.scored import scored_positions
from dynmask.train.source import Batch, Source, Step

Item = dict[str, torch.Tensor]


class Steps(Dataset[Item]):
    """Item ``n`` is micro batch ``n % parts`` of optimizer step ``n // parts``.

    The whole step is drawn from the seed and its number alone, then cut, so that a step is the same
    however many micro batches and processes share it.

    An item holds ``input_ids`` and ``weights`` ``[rows, length]``; ``norm``, the mean weight of the
    step's micro batches, over which the loss is taken; ``scored`` where most tokens weigh nothing
    (see `dynmask.train.scored`); and ``kinds``, ``documents`` and ``position_ids`` where the source
    has them.

    Args:
        source: the data.
        recipe: lengths, tokens a step and seed.
        parts: micro batches of a step.

    Raises:
        ValueError: the data is too short for the recipe's longest sequence.
    """

    def __init__(self, source: Source, recipe: Recipe, *, parts: int = 1) -> None:
        source.require(recipe.longest)
        self.source, self.recipe, self.parts = source, recipe, parts
        self._last: tuple[int, Batch] | None = None

    def __len__(self) -> int:
        return self.recipe.steps * self.parts

    def __getitem__(self, index: int) -> Item:
        number, part = divmod(index, self.parts)
        # The micro batches of a step are asked for one after the other.
        if self._last is None or self._last[0] != number:
            self._last = number, self.source.at(self.step(number))
        batch = self._last[1]
        rows = len(batch.ids) // self.parts
        return to_item(batch, slice(part * rows, (part + 1) * rows), parts=self.parts)

    def step(self, number: int) -> Step:
        """What the source is asked for."""
        phase, within = self.recipe.phase_at(number)
        length = self.recipe.phases[phase].length
        rows = self.recipe.tokens_per_step // length
        return Step(number, phase, within, rows, length, self.recipe.seed)


class HeldOut(Dataset[Item]):
    """Held-out sequences of the recipe's longest length, one an item; always the same ones.

    Args:
        source: the data; for generated data the training source, which gets another seed here.
        recipe: length, number and seed.
    """

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self.source, self.recipe = source, recipe

    def __len__(self) -> int:
        return self.recipe.eval_sequences

    def __getitem__(self, index: int) -> Item:
        seed = self.recipe.seed + 1_000_003
        step = Step(index, 0, index, 1, self.recipe.longest, seed)
        return to_item(self.source.at(step), slice(None), parts=1)


def to_item(batch: Batch, rows: slice, *, parts: int) -> Item:
    """Cut ``rows`` out of a batch, one of ``parts`` of it."""
    item = {
        "input_ids": torch.from_numpy(batch.ids[rows]),
        "weights": torch.from_numpy(batch.weights[rows]),
        # The first token of a row is never predicted.
        "norm": torch.tensor(batch.weights[:, 1:].sum() / parts),
    }
    scored = scored_positions(item["weights"])
    if scored is not None:
        item["scored"] = scored
    if batch.kinds is not None:
        item["kinds"] = torch.from_numpy(batch.kinds[rows])
    if batch.documents is not None:
        documents = torch.from_numpy(batch.documents[rows])
        item["documents"], item["position_ids"] = documents, positions(documents)
    return item


def positions(documents: torch.Tensor) -> torch.Tensor:
    """Return ``[rows, length]``, the place of each token in its document, from 0."""
    slot = torch.arange(documents.shape[1]).expand_as(documents)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return slot - torch.where(new, slot, 0).cummax(dim=1).values


def only_item(items: list[Item]) -> Item:
    """Collate: an item is a batch already."""
    (item,) = items
    return item
