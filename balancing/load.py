"""Load: how many tokens selected each expert.

`B` sequences, `T` positions, `N = B*T` tokens, `L` MoE layers, `E` experts, `K` experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FIXED_POINT = 2**24
"""Sums of real numbers travel as integers in units of 2**-24: integers add up alike in any order and on any rank."""


@dataclass
class LoadCounts:
    """Integer counts of one micro-batch, of a micro-step over all ranks, or of a whole global batch.

    All are int64: a bf16 counter loses increments above 256, and an fp32 one above 2**24.
    """

    load: Tensor
    """`[L, E]`: tokens that selected each expert."""
    score_sum: Tensor
    """`[L, E]`: scores summed over the tokens, in units of 1 / `FIXED_POINT`. For metrics only."""
    uneven: Tensor
    """`[L, M]`: measures of each micro-batch's imbalance summed over micro-batches, in the same units. For metrics."""
    tokens: Tensor
    """Scalar: routed tokens, padding left out."""
    labels: Tensor
    """Scalar: positions that bear loss."""
    sequences: Tensor
    """Scalar: sequences with at least one token."""
    micro_batches: Tensor
    """Scalar: forward passes."""

    def pack(self) -> Tensor:
        """One int64 vector `[L * (2E + M) + 4]`, so that one all-reduce carries everything."""
        layers = torch.cat([self.load, self.score_sum, self.uneven], dim=-1)
        scalars = torch.stack([self.tokens, self.labels, self.sequences, self.micro_batches])
        return torch.cat([layers.flatten(), scalars])

    @classmethod
    def unpack(cls, packed: Tensor, num_layers: int, num_experts: int) -> "LoadCounts":
        """The inverse of `pack`."""
        layers = packed[:-4].view(num_layers, -1)
        measures = layers.shape[-1] - 2 * num_experts
        return cls(*layers.split([num_experts, num_experts, measures], dim=-1), *packed[-4:].unbind())

    def __add__(self, other: "LoadCounts") -> "LoadCounts":
        num_layers, num_experts = self.load.shape
        return LoadCounts.unpack(self.pack().to(other.load.device) + other.pack(), num_layers, num_experts)

    def to(self, device: torch.device) -> "LoadCounts":
        """These counts on another device: those of a resumed run begin on the CPU."""
        return LoadCounts.unpack(self.pack().to(device), *self.load.shape)

    def score_mean(self) -> Tensor:
        """`P` `[L, E]`, fp64: mean score over the tokens."""
        return self.score_sum.double() / FIXED_POINT / self.tokens.clamp(min=1)

    def uneven_mean(self) -> Tensor:
        """`[L, M]`, fp64: `uneven` as a mean over micro-batches."""
        return self.uneven.double() / FIXED_POINT / self.micro_batches.clamp(min=1)


def to_fixed_point(values: Tensor) -> Tensor:
    """Real numbers as int64, in units of 1 / `FIXED_POINT`."""
    return (values.detach().double() * FIXED_POINT).round().long()


def token_mask(attention_mask: object, batch_size: int, length: int) -> Tensor | None:
    """Which of the `[B, T]` positions are tokens, from any mask a Transformers model takes.

    Args:
        attention_mask: `None`; 2-D `[B, S]` with `S >= T`, non-zero for tokens (with a cache, the last `T` columns are
            this forward's); or 4-D `[B, 1, T, S]`, boolean or additive, where a token is a position that attends to
            itself. Anything else (a flex-attention block mask) says nothing about padding.

    Returns:
        Boolean `[B, T]`, or `None` when every position is a token.
    """
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool().expand(batch_size, length)
    if attention_mask.dim() == 4:
        diagonal = attention_mask[:, 0].diagonal(offset=attention_mask.shape[-1] - length, dim1=-2, dim2=-1)
        if diagonal.dtype.is_floating_point:
            # An additive mask holds 0 where a query may attend, and -inf or the type's minimum where not.
            diagonal = diagonal > torch.finfo(diagonal.dtype).min / 2
        return diagonal.bool().expand(batch_size, length)
    raise ValueError(f"attention_mask must have 2 or 4 dimensions; got shape {tuple(attention_mask.shape)}")


def count_selections(selected_experts: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many tokens selected each expert, from the selection itself (bias, groups and all).

    Args:
        selected_experts: int64 `[..., N, K]`, the experts each token really went to.
        num_experts: `E`.
        mask: boolean `[N]`, true for tokens; `None` counts every row.

    Returns:
        int64 `[..., E]`.
    """
    # scatter_add_, not bincount: bincount waits for the device to learn its output's size.
    ones = torch.ones_like(selected_experts) if mask is None else mask.long()[:, None].expand_as(selected_experts)
    load = torch.zeros(*selected_experts.shape[:-2], num_experts, dtype=torch.long, device=selected_experts.device)
    return load.scatter_add_(-1, selected_experts.flatten(-2), ones.flatten(-2))


def load_fraction(load: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Load divided by its own sum, so that the last dimension sums to 1 whatever `K` is (0 where nothing was counted).

    Args:
        load: integer counts `[..., E]`.
        dtype: floating-point type of the result.
    """
    total = load.sum(dim=-1, keepdim=True).clamp(min=1)
    return load.to(dtype) / total.to(dtype)
