"""How many parameters a model has, and how many act on one token, from its configuration alone."""

from dataclasses import dataclass

from .configuration_moe import MoEConfig


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model; the selection biases are buffers and do not count."""

    total: int
    """All of them."""
    active: int
    """Those that act on one token: all but the experts that it did not select. Embedding and output matrix count
    whole, as in the names that models are given."""
    embeddings: int
    """Embedding and output matrix, once where they are tied."""

    @property
    def active_without_embeddings(self) -> int:
        """`active` without `embeddings`."""
        return self.active - self.embeddings


def model_size(config: MoEConfig) -> ModelSize:
    """The size of the model that a configuration makes."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    width, head = config.hidden_size, config.head_dim
    query_width, key_value_width = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = 2 * width * (query_width + key_value_width)
    if config.attention_bias:
        attention += query_width + 2 * key_value_width + width
    norms = 2 * width + (2 * head if config.use_qk_norm else 0)
    expert = 3 * width * config.moe_intermediate_size
    shared = config.num_shared_experts * expert
    router = config.num_experts * width
    dense = 3 * width * config.intermediate_size

    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    outside_experts = (
        embeddings
        + width  # the last norm
        + config.num_hidden_layers * (attention + norms)
        + config.first_k_dense_replace * dense
        + config.num_moe_layers * (router + shared)
    )
    return ModelSize(
        total=outside_experts + config.num_moe_layers * config.num_experts * expert,
        active=outside_experts + config.num_moe_layers * config.num_experts_per_tok * expert,
        embeddings=embeddings,
    )


__all__ = ["ModelSize", "model_size"]
