"""MoEConfig: the architecture and the balancing of a Mixture-of-Experts language model."""

import math
import os
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig

from .balancing_settings import BalancingFields
from .remote_code import copy_remote_code

ScoringFunction = Literal["softmax", "sigmoid"]


@strict
class MoEConfig(BalancingFields, PreTrainedConfig):
    """Configuration of [`MoEForCausalLM`]; field names are Transformers' own wherever it has one.

    Any field can be given by keyword and is saved in `config.json`. An impossible combination raises an error that
    names the field, what it must be and what it got. The fields of balancing are those of [`BalancingFields`].
    """

    model_type = "equipoise_moe"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - PreTrainedConfig declares it as a plain list
        "past_key_values",
        "router_logits",
        "selected_experts",
        "lm_loss",
        "aux_loss",
        "aux_losses",
        "token_losses",
    ]
    # Names under which Transformers' own code looks for the number of routed and shared experts.
    attribute_map = {  # noqa: RUF012
        "num_local_experts": "num_experts",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }

    # How Transformers splits the model over tensor-parallel ranks, expert-parallel ranks and the stages of a pipeline.
    # Modules are named as in GLM-4-MoE, so its plans serve, in the styles of whichever version is installed.
    base_model_tp_plan = {  # noqa: RUF012
        **Glm4MoeConfig.base_model_tp_plan,
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }
    base_model_ep_plan = Glm4MoeConfig.base_model_ep_plan
    base_model_pp_plan = Glm4MoeConfig.base_model_pp_plan

    # --- Decoder ---
    vocab_size: int = 32000
    """Number of rows of the embedding, `V`."""
    hidden_size: int = 1024
    """Width of the residual stream, `D`."""
    intermediate_size: int = 2816
    """Width of the dense MLP in the first `first_k_dense_replace` layers."""
    num_hidden_layers: int = 12
    """Number of decoder layers, dense ones included."""
    num_attention_heads: int = 16
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (grouped-query attention); `None` means one per query head."""
    head_dim: int | None = None
    """Width of one head; `None` means `hidden_size // num_attention_heads`."""
    use_qk_norm: bool = False
    """Whether queries and keys go through an RMSNorm over each head before the rotary embedding."""
    attention_bias: bool = False
    """Whether the query, key, value and output projections have a bias."""
    attention_dropout: float | int = 0.0
    """Dropout on the attention weights, in training only."""
    hidden_act: str = "silu"
    """Activation of the gated MLPs and of the experts."""
    max_position_embeddings: int = 4096
    """Longest sequence the model is meant for; RoPE scaling starts from it."""
    rope_parameters: RopeParameters | dict | None = None
    """`rope_type`, `rope_theta`, `partial_rotary_factor` and the scaling's own parameters, as in Transformers."""
    rms_norm_eps: float | int = 1e-6
    """Added to the variance in every RMSNorm."""
    initializer_range: float | int = 0.02
    """Standard deviation of the normal initialisation."""
    use_cache: bool = True
    """Whether the forward pass returns its key-value cache."""
    tie_word_embeddings: bool = False
    """Whether the output projection shares the embedding's weight."""
    pad_token_id: int | None = None
    """Id of the padding token."""
    bos_token_id: int | None = None
    """Id of the token a document begins with."""
    eos_token_id: int | list[int] | None = None
    """Id, or ids, that end generation."""

    # --- Experts and router ---
    first_k_dense_replace: int = 0
    """How many of the first layers have a dense MLP instead of experts."""
    num_experts: int = 64
    """Routed experts per MoE layer, `E`."""
    num_experts_per_tok: int = 8
    """Experts selected for each token, `K`."""
    num_shared_experts: int = 0
    """Experts every token goes through, fused into one MLP of `num_shared_experts * moe_intermediate_size`."""
    moe_intermediate_size: int = 512
    """Width of one expert, `F`."""
    scoring_func: ScoringFunction = "softmax"
    """How router logits become scores: `softmax` over the experts, or `sigmoid` for each expert alone."""
    norm_topk_prob: bool = True
    """Whether the weights of the selected experts are divided by their sum. With one expert per token that makes every
    weight 1, and the language-model loss no longer reaches the router."""
    routed_scaling_factor: float | int = 1.0
    """Factor on the weights of the selected experts, after the division."""
    n_group: int = 1
    """Groups the experts are divided into (group-limited routing, DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    topk_group: int = 1
    """Groups a token may select experts from."""
    output_router_logits: bool = False
    """Whether the forward pass returns `router_logits` and `selected_experts`."""
    skip_logits_in_training: bool = False
    """Whether the forward pass in training, given labels, returns no logits: the loss is then computed a few tokens at
    a time, and the logits of all tokens are never in memory. For loops that read the loss alone."""

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in Transformers. With an `auto_map`, as the models save it, the code goes to the folder too."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if getattr(self, "auto_map", None):
            copy_remote_code(Path(save_directory))

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts, `L`."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def validate_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "num_experts",
            "moe_intermediate_size",
        ):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")

    def validate_scales(self):
        for name in ("rms_norm_eps", "initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite; got {getattr(self, name)}")
        if not 0 < self.routed_scaling_factor < math.inf:
            raise ValueError(f"routed_scaling_factor must be above 0 and finite; got {self.routed_scaling_factor}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and below 1; got {self.attention_dropout}")

    def validate_rope_type(self):
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        known = {"default", *ROPE_INIT_FUNCTIONS}
        if rope_type not in known:
            raise ValueError(f"rope_parameters' rope_type must be one of {', '.join(sorted(known))}; got {rope_type}")

    def validate_attention(self):
        self.validate_sizes()  # validators run in no set order, and the divisions below need sizes
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}); "
                f"got {self.num_key_value_heads}"
            )
        rotary_share = (self.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if not isinstance(rotary_share, float | int) or not 0 < rotary_share <= 1:
            raise ValueError(f"partial_rotary_factor must be above 0 and at most 1; got {rotary_share}")
        rotary_dim = int(self.head_dim * rotary_share)
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(
                f"head_dim times partial_rotary_factor must be even and at least 2; "
                f"got head_dim={self.head_dim}, of which {rotary_dim} rotate"
            )

    def validate_experts(self):
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts ({self.num_experts}); "
                f"got {self.num_experts_per_tok}"
            )
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0; got {self.num_shared_experts}")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace must be between 0 and num_hidden_layers ({self.num_hidden_layers}); "
                f"got {self.first_k_dense_replace}"
            )

    def validate_groups(self):
        if self.n_group < 1 or self.num_experts % self.n_group:
            raise ValueError(f"n_group must divide num_experts ({self.num_experts}); got {self.n_group}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group must be between 1 and n_group ({self.n_group}); got {self.topk_group}")
        experts_per_group = self.num_experts // self.n_group
        if self.n_group > 1 and experts_per_group < 2:
            raise ValueError(
                f"n_group must leave at least 2 experts in each group, whose two best scores rank it; "
                f"got {self.n_group} for num_experts={self.num_experts}"
            )
        if self.num_experts_per_tok > self.topk_group * experts_per_group:
            raise ValueError(
                f"num_experts_per_tok must be at most the experts in topk_group groups "
                f"({self.topk_group * experts_per_group}); got {self.num_experts_per_tok}"
            )

    def validate_quantile(self):
        if self.bias_update_rule != "quantile":
            return
        if self.n_group > 1:
            raise ValueError(
                f"bias_update_rule quantile must go without groups: within n_group ({self.n_group}) another cutoff "
                f"decides; got {self.bias_update_rule}"
            )
        if self.num_experts_per_tok >= self.num_experts:
            raise ValueError(
                f"bias_update_rule quantile needs num_experts_per_tok below num_experts ({self.num_experts}); "
                f"got {self.num_experts_per_tok}"
            )


__all__ = ["MoEConfig"]
