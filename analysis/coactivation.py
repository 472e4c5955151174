"""Co-activation: which experts are selected together.

Shapes: L MoE layers, E experts, K experts per token, N tokens.
"""

import torch
from torch import Tensor

from .routing_trace import RoutedBatch


class CoActivation:
    """Counts the pairs of experts that a token selects: an observer of `trace_windows`."""

    def __init__(self, *, num_layers: int, num_experts: int) -> None:
        self.count = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.int64)
        """`[L, E, E]`: tokens that selected both; the diagonal is the load."""

    def observe(self, batch: RoutedBatch) -> None:
        real = batch.mask.flatten()
        for layer, selected in enumerate(batch.selected_experts):
            chosen = torch.zeros(int(real.sum()), self.count.shape[-1], device=selected.device)
            chosen.scatter_(1, selected[real], 1.0)
            self.count[layer] += (chosen.T @ chosen).long().cpu()  # exact: a batch holds fewer than 2**24 tokens

    def conditional(self) -> Tensor:
        """`[L, E, E]` float64: of the tokens that selected i, the share that also selected j; 0 for i itself.

        OLMoE's expert co-activation (arXiv 2409.02060, section 5). Rows sum to K - 1; 0 where i is dead.
        """
        load = self.count.diagonal(dim1=1, dim2=2)[..., None]
        shares = self.count.double() / load.clamp_min(1)
        return shares * (1 - torch.eye(self.count.shape[-1], dtype=torch.float64))

    def lift(self) -> Tensor:
        """`[L, E, E]` float64: how many times as often a pair is selected as its loads alone would have it.

        `n_ij` over `(K - 1) n_i n_j / (sum of all loads - n_i)`, averaged over both orders: 1 where partners are taken
        as they are loaded, above where two experts belong together. NaN on the diagonal, for dead experts, and for
        K = 1.
        """
        load = self.count.diagonal(dim1=1, dim2=2).double()  # [L, E]
        pairs = self.count.double()
        rest = load.sum(-1, keepdim=True) - load
        partners = pairs.sum(-1) - load  # (K - 1) n_i
        expected = (partners / rest.clamp_min(1))[..., None] * load[:, None]
        expected = (expected + expected.mT) / 2
        lift = torch.where(expected > 0, pairs / expected, torch.nan)
        lift.diagonal(dim1=1, dim2=2).fill_(torch.nan)
        return lift


__all__ = ["CoActivation"]
