"""Other methods on the same engine: one file each, behind one interface."""

from dynmask.baselines.policy import Policy, Selector
from dynmask.baselines.streaming import SlidingWindow, StreamingLLM

METHODS: dict[str, type[Policy]] = {method.name: method for method in (SlidingWindow, StreamingLLM)}
"""Every training-free method by name."""

__all__ = ["METHODS", "Policy", "Selector", "SlidingWindow", "StreamingLLM"]
