"""The experts: 3-D parameters behind Transformers' experts interface.

`N` tokens, `E` experts, `K` experts per token, `D` hidden size, `F` expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from ..configuration.configuration_moe import MoEConfig


@use_experts_implementation
class MoEExperts(nn.Module):
    """All experts of a layer; `config._experts_implementation` picks how they are computed (`equipoise`, `grouped_mm`,
    ...), the forward pass below being `eager`."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: `[N, D]`.
            top_k_index: int64 `[N, K]`.
            top_k_weights: `[N, K]`.

        Returns:
            `[N, D]`, in the type of `hidden_states`.
        """
        output = torch.zeros_like(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)
        tokens = order // top_k_index.shape[-1]
        # Expert parallelism marks selections held elsewhere with the index E: they sort to the end and are left out.
        loads = torch.bincount(top_k_index.flatten(), minlength=self.num_experts)[: self.num_experts].tolist()
        start = 0
        for expert, load in enumerate(loads):
            if load == 0:
                continue
            chosen = slice(start, start + load)
            start += load
            gate, up = F.linear(hidden_states[tokens[chosen]], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weights = top_k_weights.flatten()[order[chosen], None]
            output.index_add_(0, tokens[chosen], (expert_output * weights).to(output.dtype))
        return output
