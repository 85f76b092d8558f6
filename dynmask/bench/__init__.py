"""How fast the engine is: measured against the fastest dense kernel, after a correctness gate."""

from dynmask.bench.inputs import BENCHMARKS, SCORES, Settings, settings_for
from dynmask.bench.run import run_benchmark

__all__ = ["BENCHMARKS", "SCORES", "Settings", "run_benchmark", "settings_for"]
