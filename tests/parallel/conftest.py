"""The small models of other folders' tests, where pytest runs this folder alone."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("dma", "hf")]
