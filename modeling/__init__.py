"""The model family: router, experts, decoder and causal language model, registered with the Auto classes."""

from transformers import AutoModel, AutoModelForCausalLM

from ..configuration import MoEConfig
from .experts import MoEExperts
from .modeling_moe import MoECausalLMOutput, MoEForCausalLM, MoEModel, MoEPreTrainedModel
from .router import MoERouter

AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)

__all__ = [
    "MoECausalLMOutput",
    "MoEExperts",
    "MoEForCausalLM",
    "MoEModel",
    "MoEPreTrainedModel",
    "MoERouter",
]
