"""The experts implementation `equipoise`, for any model of Transformers that has an experts interface.

On the CPU, experts gated by SiLU, as most models have them, go through `gated_experts`; all others, and all on other
devices, through Transformers' `grouped_mm`, here in autocast's type.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .expert_products import fits_grouped_mm, gated_experts

NAME = "equipoise"


def equipoise_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Weighted sum of each token's experts, as the interface has it.

    Args:
        experts: the module; its matrices and what `use_experts_implementation` says of them are read.
        hidden_states: `[N, D]`.
        top_k_index: int64 `[N, K]`; expert `E` is held by another rank.
        top_k_weights: `[N, K]`.

    Returns:
        `[N, D]`, in the type of `hidden_states`.
    """
    device = hidden_states.device.type
    dtype = experts.down_proj.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and _gated_by_silu(experts):
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if experts.is_transposed:
            gate_up, down = gate_up.mT, down.mT
        return gated_experts(
            hidden_states, top_k_index, top_k_weights, gate_up, down, dtype=dtype, training=experts.training
        )
    if device == "cpu" and not fits_grouped_mm(experts.down_proj, dtype):
        eager = inspect.unwrap(type(experts).forward)
        return eager(experts, hidden_states, top_k_index, top_k_weights)
    forward = grouped_mm_experts_forward
    decoding = not experts.training and not torch.is_grad_enabled()
    if device != "cpu" and decoding and top_k_index.numel() <= experts.num_experts:
        # As `generate` does where it finds `grouped_mm`, and only where that copies no more than all matrices.
        forward = batched_mm_experts_forward
    return forward(Cast(experts, dtype), hidden_states, top_k_index, top_k_weights)


class Cast:
    """A module of experts as another type sees it: grouped products know nothing of autocast."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype):
        self.experts, self.dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.experts, name)
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _gated_by_silu(experts: Any) -> bool:
    return (
        experts.has_gate
        and experts.is_concatenated
        and not experts.has_bias
        and not getattr(experts, "has_post_expert_norm", False)  # Transformers 5.17 has none
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, equipoise_experts_forward)
