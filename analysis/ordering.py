"""The order in which domains and experts are shown, so that structure is seen: one rule for every run.

Shapes: G domains, L MoE layers, E experts; R runs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from .specialisation import domain_divergence


def domain_order(shares: Sequence[Tensor]) -> list[int]:
    """Order of the domains in which those that use the experts alike are neighbours.

    Domains are joined by average linkage on the root of their Jensen-Shannon divergence, averaged over layers and
    runs, and the leaves laid out so that neighbours are as near as the tree allows (optimal leaf ordering, Bar-Joseph
    et al. 2001). The first domain in the alphabet is in the first half.

    Args:
        shares: `[G, L, E]` of each run, of the same domains; rows sum to 1.
    """
    distance = torch.stack([domain_divergence(of_run).sqrt().mean(0) for of_run in shares]).mean(0).numpy()
    if len(distance) < 3:
        return list(range(len(distance)))
    tree = linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)
    order = leaves_list(tree).tolist()
    return order if order.index(0) < len(order) / 2 else order[::-1]


def expert_order(shares: Tensor) -> Tensor:
    """Order of one layer's experts: by the domain that uses each most, then by that share; unused experts last.

    Args:
        shares: `[G, E]`.

    Returns:
        `[E]` int64, expert numbers.
    """
    largest, domain = shares.max(0)
    domain = domain.masked_fill(largest == 0, len(shares))
    return torch.from_numpy(np.lexsort((-largest.numpy(), domain.numpy())))


__all__ = ["domain_order", "expert_order"]
