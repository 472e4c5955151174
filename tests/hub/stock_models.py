"""Stock models of random shapes and weights, saved to disk, and how to compare two models."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

CONFIGS = {
    config.model_type: config
    for config in (Qwen3MoeConfig, MixtralConfig, Glm4MoeConfig, LlamaConfig, Qwen2Config, Qwen3Config)
}
DECODER = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "attention_bias": True,
        "mlp_only_layers": [0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "glm4_moe": {
        "head_dim": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "attention_bias": True},
}


def stock_config(model_type: str, **changes: Any) -> Any:
    return CONFIGS[model_type](**DECODER | SHAPES[model_type] | changes)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every parameter and bias away from where it starts: one that is forgotten shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" not in name:
            around = 1.0 if name.endswith("norm.weight") else 0.0
            value.copy_(around + 0.3 * torch.randn(value.shape, generator=generator))
    return model.eval()


def stock_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    config = stock_config(model_type, **changes)
    return randomise(AutoModelForCausalLM.from_config(config, experts_implementation="eager"), seed)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def assert_same_logits(one: PreTrainedModel, other: PreTrainedModel, tolerance: float = 1e-5) -> None:
    """On a batch with padding on the left, and in greedy generation from its cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, one.config.vocab_size, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    ids[mask == 0] = 0
    with torch.no_grad():
        mine, theirs = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (one, other))
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
        mine, theirs = (
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
            for model in (one, other)
        )
    assert torch.equal(mine, theirs)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    """The same names, types, shapes and bits."""
    mine, theirs = saved_tensors(one), saved_tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
