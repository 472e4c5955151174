"""The model family: router, experts, decoder and causal language model, registered with the Auto classes."""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..configuration import MoEConfig
from .block_causal_attention import BLOCK_CAUSAL
from .experts import MoEExperts
from .modeling_moe import (
    MoECausalLMOutput,
    MoEForCausalLM,
    MoEForQuestionAnswering,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
    MoEPreTrainedModel,
)
from .router import MoERouter

# By this name `Trainer` knows that label smoothing has to shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoEConfig.model_type] = MoEForCausalLM.__name__
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(MoEConfig, MoEForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(MoEConfig, MoEForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MoEConfig, MoEForTokenClassification, exist_ok=True)

__all__ = [
    "BLOCK_CAUSAL",
    "MoECausalLMOutput",
    "MoEExperts",
    "MoEForCausalLM",
    "MoEForQuestionAnswering",
    "MoEForSequenceClassification",
    "MoEForTokenClassification",
    "MoEModel",
    "MoEPreTrainedModel",
    "MoERouter",
]
