"""What tests of stock models under balancing share: tiny models, and what they route, seen without our code.

`L` MoE layers, `N` tokens, `E` experts, `K` experts per token.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS, CHOSEN = 8, 2


def qwen3_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    """Softmax scores, no bias."""
    fields = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True}
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_key_value_heads": 2, "head_dim": 8} | fields | changes)


def olmoe(**changes: Any) -> OlmoeForCausalLM:
    """Softmax scores, no bias, weights that do not sum to 1."""
    fields = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "num_key_value_heads": 2, "intermediate_size": 16}
    return _build(OlmoeForCausalLM, OlmoeConfig, fields | changes)


def deepseek_v3(**changes: Any) -> DeepseekV3ForCausalLM:
    """Sigmoid scores, a correction bias, groups, a shared expert, a first dense layer."""
    fields = {
        "num_key_value_heads": 4,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return _build(DeepseekV3ForCausalLM, DeepseekV3Config, fields | changes)


FAMILIES = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3, "olmoe": olmoe}


def _build(kind: Any, config: Any, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        # Large enough that routers differ between tokens from the start.
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "use_cache": False,
    }
    return kind(config(**common | fields))


def routers_of(model: nn.Module) -> list[nn.Module]:
    """By the name of their class."""
    return [module for module in model.modules() if type(module).__name__.endswith("Router")]


def biases_of(model: nn.Module) -> Tensor:
    """`[L, E]`"""
    biases: list[Any] = [router.e_score_correction_bias for router in routers_of(model)]
    return torch.stack(biases)


class Seen(nn.Module):
    """A stock model that shows what it routes, for `plain_gradient`; `settings` are those of a balancing."""

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(
            **{
                "balancing_mode": "none",
                "router_aux_loss_coef": 0.01,
                "router_z_loss_coef": 0.0,
                "complementary_balancing_mode": "none",
                "complementary_aux_loss_coef": 1e-4,
                "num_experts": EXPERTS,
                "scoring_func": "sigmoid" if "Deepseek" in type(model).__name__ else "softmax",
            }
            | settings
        )

    def forward(self, output_router_logits: bool = True, **inputs: Any) -> Any:
        seen: list[Any] = []
        handles = [
            router.register_forward_hook(lambda router, args, output: seen.append(output))
            for router in routers_of(self.model)
        ]
        outputs = self.model(**inputs, output_router_logits=False)
        for handle in handles:
            handle.remove()
        return SimpleNamespace(
            logits=outputs.logits,
            router_logits=[logits for logits, _, _ in seen],
            selected_experts=[experts for _, _, experts in seen],
        )

    def gradient_names(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named as the model names its weights."""
        return {name.removeprefix("model."): value for name, value in gradients.items()}
