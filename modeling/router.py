"""The router: hidden states -> logits -> scores -> selected experts and their weights.

`N` tokens, `E` experts, `K` experts per token, `D` hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from ..configuration.configuration_moe import MoEConfig
from .linear import linear


class KeptSelection:
    """The experts that one forward pass through a layer selected, int64 `[N, K]`; `None` until it has.

    No list: FSDP2 and DeepSpeed rebuild the lists among a module's inputs, and what is put into those is lost.
    """

    experts: Tensor | None = None


class MoERouter(nn.Module):
    """Selects `K` experts for each token, from scores plus a selection bias, in groups where asked.

    The selection bias enters the selection and nowhere else: weights come from the scores alone (Loss-Free Balancing,
    arXiv 2408.15664). It is a buffer, in fp32 whatever the model's dtype: in bf16 a bias of 0.5 does not
    see an update of 0.001.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        # Names under which Transformers, and code that works on any of its MoE models, look for a router's sizes.
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoERouter":
        # `.to(dtype)`, `.bfloat16()` and wrappers that cast go through here: let them move the bias, not round it.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:
            kept = torch.empty_like(after, dtype=torch.float32) if before.is_meta else before.float().to(after.device)
            self.e_score_correction_bias = kept
        return self

    def forward(
        self, hidden_states: Tensor, kept_selection: KeptSelection | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route `[..., D]` hidden states.

        Args:
            hidden_states: `[..., D]`.
            kept_selection: empty in the forward pass, which puts the selected experts there; gradient checkpointing,
                which runs it again with the same object, then takes them instead of selecting anew. A rounding or a
                bias that has moved in between would otherwise send tokens elsewhere in the backward pass.

        Returns:
            Logits `[N, E]` in at least fp32, weights `[N, K]` of the same type, experts `[N, K]` int64.
        """
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        # Autocast would bring the product back to bf16, whose rounding changes selections.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits = linear(hidden_states.to(dtype), self.weight.to(dtype))
            scores = router_logits.softmax(dim=-1) if self.scoring_func == "softmax" else router_logits.sigmoid()
            if kept_selection is not None and kept_selection.experts is not None:
                selected_experts = kept_selection.experts
            else:
                # Detached, so that nothing is saved here that the second run would not save too.
                choice = self._limit_to_groups(scores.detach() + self.e_score_correction_bias)
                selected_experts = choice.topk(self.top_k).indices
                if kept_selection is not None:
                    kept_selection.experts = selected_experts
            weights = scores.gather(-1, selected_experts)
            if self.norm_topk_prob:
                # Sigmoids may all underflow: the same guard as in Transformers' routers.
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            if self.routed_scaling_factor != 1:
                weights = weights * self.routed_scaling_factor
            return router_logits, weights, selected_experts

    def _limit_to_groups(self, choice: Tensor) -> Tensor:
        """Biased scores `[N, E]` with `-inf` outside each token's `topk_group` groups of largest top-2 sum
        (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
        if self.n_group == 1:
            return choice
        grouped = choice.unflatten(-1, (self.n_group, -1))
        groups = grouped.topk(2).values.sum(dim=-1).topk(self.topk_group).indices
        kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter_(-1, groups, True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.hidden_dim} -> top {self.top_k} of {self.num_experts}, {self.scoring_func}"
