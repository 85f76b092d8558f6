"""Training of language models, dense or DMA, from recipes, by transformers' Trainer.

``dynmask train`` is the command. The parts: ``recipe`` writes a run down (``fields`` reads it,
``sections`` are its parts, ``recipes/`` holds those of the package); ``texts`` and ``corpus`` read
and tokenise text, ``prepare`` does so for a run; ``mixture``, ``windows`` and ``mqar`` are sources
of batches; ``models`` makes the model; ``run`` runs it, with ``arguments``, ``batches``,
``trainer`` (the loss) and ``callbacks`` for the Trainer.
"""

from __future__ import annotations

from importlib.util import find_spec

for _module in ("transformers", "accelerate", "yaml"):
    if find_spec(_module) is None:
        raise ImportError(
            f"dynmask.train needs {_module}, which is not installed: pip install 'dynmask[train]'"
        )
