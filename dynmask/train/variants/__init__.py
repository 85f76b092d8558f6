"""Llama decoders with the trainable baselines in place of their attention: NSA and MoBA.

Importing it makes the models known to transformers: ``AutoConfig``, ``AutoModel`` and
``AutoModelForCausalLM`` then take a `NsaConfig` or `MobaConfig` and what it was saved as.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dynmask.train.variants.configuration import MobaConfig, NsaConfig
from dynmask.train.variants.modeling import MobaForCausalLM, MobaModel, NsaForCausalLM, NsaModel

__all__ = [
    "MobaConfig",
    "MobaForCausalLM",
    "MobaModel",
    "NsaConfig",
    "NsaForCausalLM",
    "NsaModel",
]

AutoConfig.register(NsaConfig.model_type, NsaConfig, exist_ok=True)
AutoModel.register(NsaConfig, NsaModel, exist_ok=True)
AutoModelForCausalLM.register(NsaConfig, NsaForCausalLM, exist_ok=True)
AutoConfig.register(MobaConfig.model_type, MobaConfig, exist_ok=True)
AutoModel.register(MobaConfig, MobaModel, exist_ok=True)
AutoModelForCausalLM.register(MobaConfig, MobaForCausalLM, exist_ok=True)
