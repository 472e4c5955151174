"""Stock models with the weights of one of ours: what ours does, they must do too."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from equipoise import MoEConfig, MoEForCausalLM


def biased(model: MoEForCausalLM) -> MoEForCausalLM:
    """Selection biases away from zero, so that a path that forgets them shows."""
    for bias in model.selection_biases():
        bias.copy_(torch.randn_like(bias) * 0.3)
    return model


def shared_fields(config: MoEConfig, stock: type) -> dict[str, object]:
    """The fields that a stock configuration has too."""
    names = set(stock().to_dict()) - {"model_type", "architectures", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name in names}


def glm4_moe(ours: MoEForCausalLM) -> Glm4MoeForCausalLM:
    """GLM-4-MoE, in evaluation, with the weights of a model that routes by sigmoids."""
    experts = {"n_routed_experts": ours.config.num_experts, "n_shared_experts": ours.config.num_shared_experts}
    stock = Glm4MoeForCausalLM(Glm4MoeConfig(**shared_fields(ours.config, Glm4MoeConfig) | experts))
    stock.load_state_dict(ours.state_dict())
    return stock.eval()


def qwen3_moe(ours: PreTrainedModel, stock_class: type) -> nn.Module:
    """A model of Qwen3-MoE, in evaluation, with the weights of one that routes by softmax without shared experts."""
    config = Qwen3MoeConfig(**shared_fields(ours.config, Qwen3MoeConfig), num_experts=ours.config.num_experts)
    stock = stock_class(config)
    # Its span classifier calls the decoder `transformer`.
    weights = {
        name.replace("model.", f"{stock.base_model_prefix}.", 1): value
        for name, value in ours.state_dict().items()
        if "correction_bias" not in name
    }
    stock.load_state_dict(weights)
    return stock.eval()
