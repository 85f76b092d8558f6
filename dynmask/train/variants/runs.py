"""Where the sequences of a batch stand: between padding, and one document after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dynmask.baselines.trainable import Run, Runs
from dynmask.masks import Padding


def read_runs(
    documents: Tensor | None, attention_mask: Tensor | None, *, batch: int, length: int
) -> Runs | None:
    """Return the runs, those with the same bounds together; None if every row is one sequence.

    Reads the numbers on the host, which waits for the device where there are any.

    Args:
        documents: ``[B or 1, N]``, the document of each slot; None for one.
        attention_mask: ``[B, N]``, 1 where a slot holds a real token; None if all do.
        batch: ``B``.
        length: Slots ``N``, cached ones included.

    Raises:
        ValueError: If a row's real tokens are not one run.
    """
    if documents is None and attention_mask is None:
        return None
    given = documents if attention_mask is None else attention_mask
    assert given is not None
    if attention_mask is None:
        real = [(0, length)] * batch
    else:
        real = Padding.from_mask(attention_mask.cpu()).runs(length)
    new: list[list[int]] = [[]] * batch
    if documents is not None:
        ids = documents.cpu().expand(batch, -1)
        new = [(row.diff().nonzero().flatten() + 1).tolist() for row in ids]
    found: dict[tuple[int, int], list[int]] = {}
    for row, (start, stop) in enumerate(real):
        cuts = [start, *(slot for slot in new[row] if start < slot < stop), stop]
        for bounds in pairwise(cuts):
            found.setdefault(bounds, []).append(row)
    if found.keys() == {(0, length)}:
        return None
    return Runs(
        [
            Run(torch.tensor(rows, device=given.device), start, stop)
            for (start, stop), rows in found.items()
            if start < stop
        ]
    )
