"""Load: how many tokens selected each expert, and how unevenly.

`B` sequences, `T` positions, `N = B*T` tokens, `L` MoE layers, `E` experts, `K` experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LoadCounts:
    """Integer counts of one micro-batch, of a micro-step over all ranks, or of a whole global batch.

    All are int64: a bf16 counter loses increments above 256, and an fp32 one above 2**24.
    """

    load: Tensor
    """`[L, E]`: tokens that selected each expert."""
    tokens: Tensor
    """Scalar: routed tokens, padding left out."""
    labels: Tensor
    """Scalar: positions that bear loss."""
    sequences: Tensor
    """Scalar: sequences with at least one token."""

    def pack(self) -> Tensor:
        """One int64 vector `[L*E + 3]`, so that one all-reduce carries everything."""
        return torch.cat([self.load.flatten(), torch.stack([self.tokens, self.labels, self.sequences])])

    @classmethod
    def unpack(cls, packed: Tensor, num_experts: int) -> "LoadCounts":
        """The inverse of `pack`."""
        tokens, labels, sequences = packed[-3:].unbind()
        return cls(packed[:-3].view(-1, num_experts), tokens, labels, sequences)

    def __add__(self, other: "LoadCounts") -> "LoadCounts":
        return LoadCounts(
            self.load + other.load,
            self.tokens + other.tokens,
            self.labels + other.labels,
            self.sequences + other.sequences,
        )


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
        selected_experts: int64 `[N, K]`, the experts each token really went to.
        num_experts: `E`.
        mask: boolean `[N]`, true for tokens; `None` counts every row.

    Returns:
        int64 `[E]`.
    """
    # scatter_add_, not bincount: bincount waits for the device to learn its output's size.
    ones = torch.ones_like(selected_experts) if mask is None else mask.long()[:, None].expand_as(selected_experts)
    load = torch.zeros(num_experts, dtype=torch.long, device=selected_experts.device)
    return load.scatter_add_(0, selected_experts.flatten(), ones.flatten())


def count_load(
    selected_experts: Sequence[Tensor], num_experts: int, mask: Tensor | None, batch_size: int, labels: Tensor
) -> LoadCounts:
    """The counts of one micro-batch.

    Args:
        selected_experts: one int64 `[N, K]` per MoE layer.
        num_experts: `E`.
        mask: boolean `[B, T]`, true for tokens; `None` counts every position.
        batch_size: `B`.
        labels: int64 scalar, the number of positions that bear loss.
    """
    device = selected_experts[0].device
    flat = None if mask is None else mask.reshape(-1)
    load = [
        count_selections(experts, num_experts, flat if flat is None else flat.to(experts.device)).to(device)
        for experts in selected_experts
    ]
    if mask is None:
        tokens = torch.full((), selected_experts[0].shape[0], dtype=torch.long, device=device)
        sequences = torch.full((), batch_size, dtype=torch.long, device=device)
    else:
        tokens, sequences = mask.sum().to(device), mask.any(dim=-1).sum().to(device)
    return LoadCounts(torch.stack(load), tokens, labels.to(device), sequences)


def load_fraction(load: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Load divided by its own sum, so that the last dimension sums to 1 whatever `K` is (0 where nothing was counted).

    Args:
        load: integer counts `[..., E]`.
        dtype: floating-point type of the result.
    """
    total = load.sum(dim=-1, keepdim=True).clamp(min=1)
    return load.to(dtype) / total.to(dtype)


def max_vio(load: Tensor) -> Tensor:
    """Maximal violation `(max_i load_i - mean load) / mean load` (Loss-Free Balancing, arXiv 2408.15664).

    0 is perfect balance; `E / K - 1` is the most there can be. 0 where nothing was counted.

    Args:
        load: counts `[..., E]`, over an evaluation set (*global*), a global batch (*batch*) or one micro-batch
            (*micro*).

    Returns:
        float32 `[...]`, without unit.
    """
    largest = load_fraction(load).amax(dim=-1) * load.shape[-1] - 1
    return torch.where(load.sum(dim=-1) > 0, largest, torch.zeros_like(largest))


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the load over `log E`: 1 is perfect balance, 0 is one expert taking everything.

    Args:
        load: counts `[..., E]`.

    Returns:
        float32 `[...]`, between 0 and 1.
    """
    entropy = torch.special.entr(load_fraction(load)).sum(dim=-1)
    return entropy / torch.log(torch.tensor(float(max(load.shape[-1], 2)), device=load.device))


def dead_experts(load: Tensor) -> Tensor:
    """How many experts no token selected.

    Args:
        load: counts `[..., E]`.

    Returns:
        int64 `[...]`, between 0 and `E`.
    """
    return (load == 0).sum(dim=-1)
