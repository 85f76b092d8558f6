"""Calibrate: from a model and texts to a plan of masks (DAM, stage 1)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmask.dam import (
    CoverageMeter,
    LayerPlan,
    MapAccumulator,
    MaskPlan,
    Settings,
    check_writable,
    describe_data,
    gate_heads,
    match,
    preview,
    true_mask,
)
from dynmask.dam import (
    amplify as amplify_maps,
)
from dynmask.hf import compat
from dynmask.hf.fingerprint import compare, fingerprint
from dynmask.hf.parallel import refuse_split
from dynmask.hf.stream import Batch, LayerStream
from dynmask.hf.windows import make_batches, make_windows
from dynmask.masks import Stripes

_log = logging.getLogger(__name__)
_DEFAULTS = Settings()
# Rows of a held-out map that are computed: memory grows with the window, not with its square.
_SAMPLED_ROWS = 256

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, text)`` after each batch of each layer."""


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    capture_length: int = _DEFAULTS.capture_length,
    amplify: str = _DEFAULTS.amplify,
    lam: float = _DEFAULTS.lam,
    eps: float = _DEFAULTS.eps,
    tau: float = _DEFAULTS.tau,
    mu: float = _DEFAULTS.mu,
    support: float = _DEFAULTS.support,
    coverage: float = _DEFAULTS.coverage,
    coverage_length: int = _DEFAULTS.coverage_length,
    holdout: float = _DEFAULTS.holdout,
    seed: int = _DEFAULTS.seed,
    batch_size: int = 1,
    work_folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> MaskPlan:
    """Make a mask plan for a model from calibration texts; nothing is trained.

    Layer by layer: attention maps of the calibration windows are averaged, amplified, cut at
    ``tau`` to the true mask and matched to columns and offsets; longer, held-out windows then tell
    how much attention these keep beyond the first ``L`` tokens. Layers with a window of their own
    (sliding or chunked attention) are left out of the plan. Memory beyond the model: one layer's
    maps (``[H, L, L]`` float32 and a bool mask of that size), 256 rows of 8 heads' held-out maps,
    and the windows' hidden states (on the CPU).

    Whole texts are held out, at random by ``seed``; of a single text, its end. Of each text the
    first 16 ``L`` tokens are used (``coverage_length`` if that is more), in windows that do not
    overlap; a last, shorter one counts if it has a quarter of ``L``. At least one text must fill a
    window, and held-out texts longer than ``L`` are needed to see past it: without them a warning
    is logged, and the coverage is that of the second half of each held-out window.

    Args:
        model: A causal language model of transformers, on any device, in any float dtype. It is
            left exactly as it was, also on an error.
        tokenizer: Its tokenizer; None if ``texts`` are sequences of token ids.
        texts: Calibration texts, like those the model will read.
        capture_length: ``L``, tokens of a window; maps are ``[L, L]``.
        amplify: Name of the amplifier, see ``dynmask.dam.AMPLIFIERS``.
        lam: Exponent of Box-Cox and Yeo-Johnson.
        eps: Floor of a probability.
        tau: Threshold on the amplified map.
        mu: Smallest similarity of a matched column or offset.
        support: Smallest share of L rows that a matched column or offset must reach.
        coverage: Target share of attention; heads that keep less run dense in mode "auto".
        coverage_length: Most tokens of a held-out window, several times ``L``; less is used where
            the model's limit or the held-out texts are shorter, and never less than ``L``.
        holdout: Share of the calibration tokens held back to measure coverage.
        seed: Seed of the split into calibration and held-out texts.
        batch_size: Windows that run at once.
        work_folder: Each finished layer is saved here. A calibration that was interrupted resumes
            from it if model, settings and texts are the same, and else starts over.
        progress: Called after each batch of each layer.

    Returns:
        The plan, on the CPU.

    Raises:
        ValueError: A setting is out of range; there are no texts, or they are too short;
            ``capture_length`` is over the model's limit; a map holds NaN; the model has no
            attention layer that dynmask knows, or all have windows of their own; the model is
            inside ``accelerate``, or its heads are split over processes.

    Source: DAM, arXiv 2506.11104, section 3.
    """
    settings = Settings(
        capture_length=capture_length,
        amplify=amplify,
        lam=lam,
        eps=eps,
        tau=tau,
        mu=mu,
        support=support,
        coverage=coverage,
        coverage_length=coverage_length,
        holdout=holdout,
        seed=seed,
    )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    limit = compat.context_limit(model)
    if limit is not None and capture_length > limit:
        raise ValueError(
            f"capture_length={capture_length} is over the model's limit of {limit} tokens "
            "(max_position_embeddings): lower it"
        )
    layers = [layer for layer in compat.attention_layers(model) if layer.own_window is None]
    if not layers:
        raise ValueError(
            f"every attention layer of {type(model).__name__} has a window of its own, so there is "
            "nothing to calibrate; if inputs are shorter than the window, build the model with "
            "sliding_window=None"
        )
    compat.refuse_attached(model)
    refuse_split(model, [layer.module for layer in layers])
    longest = max(capture_length, coverage_length)
    parts = make_windows(
        tokenizer,
        texts,
        capture_length=capture_length,
        coverage_length=longest if limit is None else min(longest, limit),
        holdout=holdout,
        seed=seed,
    )
    _check_ids(parts[0] + parts[1], compat.text_config(model).vocab_size)
    data = describe_data([w.tolist() for w in parts[0] + parts[1]], holdout=len(parts[1]))
    if data["holdout_length"] <= capture_length != limit:
        _log.warning(
            "no held-out text is longer than capture_length=%d tokens, so what the masks keep on "
            "longer inputs is not measured: give longer texts, raise coverage_length, or lower "
            "capture_length",
            capture_length,
        )
    work = _Work(work_folder, fingerprint(model), settings, data)
    done = work.finished([layer.index for layer in layers])
    if len(done) < len(layers):
        _run(model, [make_batches(part, batch_size) for part in parts], done, work, progress)
    return work.plan(done)


def _run(
    model: nn.Module,
    parts: list[list[Batch]],
    done: dict[int, LayerPlan],
    work: _Work,
    progress: Progress | None,
) -> None:
    """Stream the model and put each layer's plan into ``done``."""
    with LayerStream(model) as stream:
        wanted = {d: a for d, a in stream.attention.items() if a.own_window is None}
        depth = max(wanted) + 1
        total = depth * sum(len(part) for part in parts)
        hidden: list[list[Tensor | None]] = [[None] * len(part) for part in parts]
        ran = 0
        for at in range(depth):
            index = wanted[at].index if at in wanted and wanted[at].index not in done else None
            layer = None if index is None else _Layer(index, work.settings)
            for phase, part in enumerate(parts):
                consumer = None if layer is None else (layer.capture, layer.measure)[phase]
                most_rows = (None, _SAMPLED_ROWS)[phase]
                for place, batch in enumerate(part):
                    hidden[phase][place] = stream.step(
                        at, batch, hidden[phase][place], consumer, most_rows=most_rows
                    )
                    ran += 1
                    if progress is not None:
                        progress(ran, total, f"layer {at + 1} of {depth}")
                if layer is not None and phase == 0:
                    layer.make_masks()
            if layer is not None and index is not None:
                done[index] = layer.plan()
                if done[index].heads != wanted[at].heads:
                    raise ValueError(
                        f"layer {index} has {wanted[at].heads} heads, of which this process "
                        f"computes {done[index].heads}: calibrate the model without a tp_plan"
                    )
                work.save(index, done[index])


class _Layer:
    """One layer's way from maps to a plan, in groups of heads as the stream hands them out."""

    def __init__(self, index: int, settings: Settings):
        self._index = index
        self._settings = settings
        self._maps: dict[int, MapAccumulator] = {}
        self._stripes: dict[int, Stripes] = {}
        self._meters: dict[int, CoverageMeter] = {}
        self._previews: list[Tensor] = []

    def capture(self, first: int, probs: Tensor, rows: Tensor) -> None:
        self._check(probs)
        if first not in self._maps:
            self._maps[first] = MapAccumulator(
                len(probs),
                self._settings.capture_length,
                device=probs.device,
                eps=self._settings.eps,
            )
        self._maps[first].add(probs[None], torch.tensor([0]), torch.tensor([len(rows)]))

    def make_masks(self) -> None:
        """Turn the mean maps into stripes; the maps are freed group by group."""
        for first in sorted(self._maps):
            group = self._maps.pop(first)
            mean = group.mean()
            amplified = amplify_maps(
                mean, group.sum, self._settings, layer=self._index, first_head=first
            )
            corner = true_mask(amplified, self._settings.tau)
            self._previews.append(preview(mean, amplified))
            matched = match(corner, self._settings.mu, support=self._settings.support)
            self._stripes[first] = Stripes(
                columns=matched.columns,
                offsets=matched.offsets,
                full_heads=torch.zeros(len(corner), dtype=torch.bool),
                corner=corner.cpu(),
            )
            self._meters[first] = CoverageMeter(
                self._stripes[first],
                capture_length=self._settings.capture_length,
                device=mean.device,
            )

    def measure(self, first: int, probs: Tensor, rows: Tensor) -> None:
        self._check(probs)
        self._meters[first].add(probs, rows)

    def plan(self) -> LayerPlan:
        groups = [self._stripes[first] for first in sorted(self._stripes)]
        covered = [self._meters[first].result() for first in sorted(self._meters)]
        mean, tail, corner_mean = (torch.cat(parts) for parts in zip(*covered, strict=True))
        return LayerPlan(
            columns=tuple(c for group in groups for c in group.columns),
            offsets=tuple(o for group in groups for o in group.offsets),
            corner=torch.cat([group.corner for group in groups if group.corner is not None]),
            coverage=mean,
            tail_coverage=tail,
            corner_coverage=corner_mean,
            gate=gate_heads(mean, self._settings.coverage),
            previews=torch.cat(self._previews, 1),
        )

    def _check(self, probs: Tensor) -> None:
        if not bool(probs.sum().isfinite()):
            raise ValueError(
                f"layer {self._index}: the attention maps hold NaN; check the model's weights, and "
                "its dtype (float16 may overflow: try bfloat16)"
            )


class _Work:
    """The plan in the making, and the folder that keeps its finished layers.

    A layer is kept as a plan of that one layer: written whole or not at all, verified when read,
    and itself saying which model, settings and texts it belongs to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        fingerprint: dict[str, Any],
        settings: Settings,
        data: dict[str, Any],
    ):
        self._folder = None if folder is None else Path(folder)
        self._fingerprint = fingerprint
        self.settings = settings
        self._data = data

    def plan(self, layers: dict[int, LayerPlan]) -> MaskPlan:
        return MaskPlan(
            fingerprint=self._fingerprint, settings=self.settings, data=self._data, layers=layers
        )

    def save(self, index: int, layer: LayerPlan) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.plan({index: layer}).save(self._place(index))

    def finished(self, indices: list[int]) -> dict[int, LayerPlan]:
        """Return the layers that an earlier calibration finished: the first ones, without a gap.

        Raises:
            ValueError: The folder cannot be written.
        """
        done: dict[int, LayerPlan] = {}
        if self._folder is None:
            return done
        for index in indices:
            check_writable(self._place(index))
            if not self._place(index).exists():
                break
            try:
                kept = MaskPlan.load(self._place(index))
            except ValueError as error:
                _log.warning("layer %d is calibrated again: %s", index, error)
                break
            differs = self._differs(kept)
            if differs:
                _log.warning(
                    "%s holds a calibration with another %s: starting over", self._folder, differs
                )
                break
            done |= kept.layers
        return done

    def _differs(self, kept: MaskPlan) -> str:
        if compare(self._fingerprint, kept.fingerprint):
            return "model"
        if kept.settings != self.settings:
            return "set of settings"
        return "" if kept.data == self._data else "set of texts"

    def _place(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{index:04d}"


def _check_ids(windows: list[Tensor], vocab_size: int) -> None:
    low = min(int(window.min()) for window in windows)
    high = max(int(window.max()) for window in windows)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"texts hold token ids from {low} to {high}, but the model has {vocab_size}: use the "
            "model's own tokenizer"
        )
