"""Evaluation of a causal language model as it is: tasks of finding things, and perplexity."""

from __future__ import annotations

from dynmask.eval.keyvalue import keyvalue
from dynmask.eval.longeval import longeval
from dynmask.eval.needle import needle
from dynmask.eval.perplexity import perplexity
from dynmask.eval.recall import recall
from dynmask.eval.result import TABLE_HEAD, Part, Result, wilson
from dynmask.eval.ruler import ruler
from dynmask.eval.words import is_eval_word

__all__ = [
    "TABLE_HEAD",
    "Part",
    "Result",
    "is_eval_word",
    "keyvalue",
    "longeval",
    "needle",
    "perplexity",
    "recall",
    "ruler",
    "wilson",
]
