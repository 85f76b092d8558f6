"""Training of small retrieval models: data mixture, recipes and a run by transformers' Trainer.

``python -m dynmask.train embedded --data FOLDER --out FOLDER`` trains the model of
``dynmask.assets`` again. The parts: ``corpus`` reads text, ``mixture`` makes sequences of it,
``recipe`` writes a run down, ``run`` runs it.
"""

from __future__ import annotations

from importlib.util import find_spec

for _module in ("transformers", "accelerate", "yaml"):
    if find_spec(_module) is None:
        raise ImportError(
            f"dynmask.train needs {_module}, which is not installed: pip install 'dynmask[train]'"
        )
