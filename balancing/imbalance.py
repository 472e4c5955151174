"""Imbalance: how unevenly a load falls on the experts, and what that costs.

`L` MoE layers, `E` experts.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .load import load_fraction


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
    return entropy / math.log(max(load.shape[-1], 2))


def dead_experts(load: Tensor) -> Tensor:
    """How many experts no token selected.

    Args:
        load: counts `[..., E]`.

    Returns:
        int64 `[...]`, between 0 and `E`.
    """
    return (load == 0).sum(dim=-1)


def load_cv(load: Tensor) -> Tensor:
    """Coefficient of variation: standard deviation of the load over its mean. 0 is balance.

    Args:
        load: counts `[..., E]`.

    Returns:
        float32 `[...]`, between 0 and `sqrt(E - 1)`; 0 where nothing was counted.
    """
    return load_fraction(load).std(dim=-1, correction=0) * load.shape[-1]


def check_expert_parallel_sizes(sizes: Sequence[int], num_experts: int) -> None:
    """Raises ValueError for the size of a simulated expert-parallel group, in ranks, that does not divide `E`."""
    for size in sizes:
        if size < 1 or num_experts % size:
            raise ValueError(f"expert_parallel_sizes must divide num_experts ({num_experts}); got {size}")


def expert_parallel_slowdown(load: Tensor, group_size: int) -> Tensor:
    """How much longer a layer's experts take on a group of ranks than if the load were even.

    The experts are dealt out in order to `group_size` simulated ranks, and the slowest decides: the largest over the
    mean load of a rank, `1` at best and `group_size` at worst. 1 where nothing was counted.

    Args:
        load: counts `[..., E]` of what goes through the experts at one time, a micro-batch.
        group_size: ranks; must divide `E`.

    Returns:
        float32 `[...]`, a factor.

    Raises:
        ValueError: `group_size` does not divide `E`.
    """
    if group_size < 1 or load.shape[-1] % group_size:
        raise ValueError(f"group_size must divide the number of experts ({load.shape[-1]}); got {group_size}")
    return max_vio(load.unflatten(-1, (group_size, -1)).sum(dim=-1)) + 1


def expert_gradient_norms(*gradients: Tensor) -> Tensor:
    """Norm of each expert's gradient: an expert that gets few tokens learns little.

    Args:
        gradients: of the experts' parameters in a layer, `[E, ...]` each.

    Returns:
        `[E]`.
    """
    return torch.stack([gradient.flatten(1).norm(dim=-1) for gradient in gradients]).norm(dim=0)
