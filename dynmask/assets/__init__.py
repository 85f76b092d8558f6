"""The embedded model, its tokenizer and sample texts: the demo needs no network."""

from __future__ import annotations

import json
import lzma
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = ("calibration", "perplexity", "haystack")
"""The names that `load_texts` takes."""

__all__ = ["TEXTS", "load_model", "load_texts", "load_tokenizer", "model_folder"]

_FOLDER = Path(str(resources.files("dynmask.assets")))


def model_folder() -> Path:
    """The folder of the embedded model, as ``from_pretrained`` takes it; its README is the card."""
    return _FOLDER / "model"


def load_model(dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The embedded model in evaluation mode: 11.3M parameters, Llama shape, 8K context.

    Args:
        dtype: of the weights; float32 by default, which is fastest on most CPUs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype or torch.float32)
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's byte-level BPE of 4,096 entries, with single digits."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def load_texts(name: str) -> list[str]:
    """Excerpts of public-domain novels that the embedded model was not trained on.

    Args:
        name: ``"calibration"`` (10 excerpts of 16,000 characters), ``"perplexity"`` (6 of 32,000)
            or ``"haystack"`` (4 of 60,000); no book is in two of them, no author in training.

    Raises:
        ValueError: no such set.
    """
    if name not in TEXTS:
        raise ValueError(f"name={name!r} is no set of texts; choose one of {', '.join(TEXTS)}")
    with lzma.open(_FOLDER / "text" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as rows:
        return [json.loads(row)["text"] for row in rows]
