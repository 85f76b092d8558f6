"""DAM: from attention maps to a plan of masks, and masks from the input at hand. Tensors only."""

from dynmask.dam.amplify import AMPLIFIERS, amplify
from dynmask.dam.capture import MapAccumulator
from dynmask.dam.coverage import Coverage, CoverageMeter
from dynmask.dam.dynamic import Dynamic, dynamic_attention
from dynmask.dam.gate import gate_heads
from dynmask.dam.layer import LayerPlan, preview
from dynmask.dam.match import Matched, match, true_mask
from dynmask.dam.plan import MODES, MaskPlan, describe_data
from dynmask.dam.settings import Settings
from dynmask.dam.store import check_writable

__all__ = [
    "AMPLIFIERS",
    "MODES",
    "Coverage",
    "CoverageMeter",
    "Dynamic",
    "LayerPlan",
    "MapAccumulator",
    "MaskPlan",
    "Matched",
    "Settings",
    "amplify",
    "check_writable",
    "describe_data",
    "dynamic_attention",
    "gate_heads",
    "match",
    "preview",
    "true_mask",
]
