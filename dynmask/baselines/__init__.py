"""Other methods on the same engine, one file each.

Those that need no training are a `Policy`, for ``accelerate(model, policy=...)``; those that are
trained are layers.
"""

from dynmask.baselines.exact_topk import TopK
from dynmask.baselines.h2o import H2O
from dynmask.baselines.infllm import InfLLM
from dynmask.baselines.minference import VerticalSlash
from dynmask.baselines.moa import MoA
from dynmask.baselines.moba import MixtureOfBlockAttention
from dynmask.baselines.nsa import NativeSparseAttention
from dynmask.baselines.policy import Policy, Selector
from dynmask.baselines.quest import Quest
from dynmask.baselines.snapkv import SnapKV
from dynmask.baselines.streaming import SlidingWindow, StreamingLLM
from dynmask.baselines.twilight import TopP
from dynmask.baselines.xattention import XAttention

METHODS: dict[str, type[Policy]] = {
    method.name: method
    for method in (
        SlidingWindow,
        StreamingLLM,
        H2O,
        SnapKV,
        InfLLM,
        Quest,
        TopK,
        TopP,
        VerticalSlash,
        XAttention,
        MoA,
    )
}
"""Every method that needs no training, by name."""

__all__ = [
    "H2O",
    "METHODS",
    "InfLLM",
    "MixtureOfBlockAttention",
    "MoA",
    "NativeSparseAttention",
    "Policy",
    "Quest",
    "Selector",
    "SlidingWindow",
    "SnapKV",
    "StreamingLLM",
    "TopK",
    "TopP",
    "VerticalSlash",
    "XAttention",
]
