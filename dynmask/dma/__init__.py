"""Dynamic Mask Attention (arXiv 2508.02124): a layer, a model, and how to get one from others.

Importing it makes the model known to transformers: ``AutoConfig``, ``AutoModel`` and
``AutoModelForCausalLM`` then take a `DmaConfig` and what it was saved as.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dynmask.dma.cache import LifetimeCache
from dynmask.dma.configuration import DmaConfig
from dynmask.dma.convert import from_doge, from_pretrained_dense
from dynmask.dma.layer import DynamicMaskAttention
from dynmask.dma.modeling import DmaForCausalLM, DmaModel
from dynmask.dma.parallel import context_prefill

__all__ = [
    "DmaConfig",
    "DmaForCausalLM",
    "DmaModel",
    "DynamicMaskAttention",
    "LifetimeCache",
    "context_prefill",
    "from_doge",
    "from_pretrained_dense",
]

AutoConfig.register(DmaConfig.model_type, DmaConfig, exist_ok=True)
AutoModel.register(DmaConfig, DmaModel, exist_ok=True)
AutoModelForCausalLM.register(DmaConfig, DmaForCausalLM, exist_ok=True)
