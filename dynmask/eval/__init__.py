"""Evaluation of a causal language model as it is: LongEval lines, needles, recall, perplexity."""

from __future__ import annotations

from dynmask.eval.longeval import longeval
from dynmask.eval.needle import needle
from dynmask.eval.perplexity import perplexity
from dynmask.eval.recall import recall
from dynmask.eval.result import TABLE_HEAD, Part, Result, wilson
from dynmask.eval.words import is_eval_word

__all__ = [
    "TABLE_HEAD",
    "Part",
    "Result",
    "is_eval_word",
    "longeval",
    "needle",
    "perplexity",
    "recall",
    "wilson",
]
