"""Balancing the load of the experts: tensors in, tensors out; knows no model and no training loop."""

from .balancer import Balancer, BalancingLoss, Observation
from .bias_updates import (
    BiasUpdate,
    CentredSignUpdate,
    ProportionalUpdate,
    SignUpdate,
    TanhMomentumUpdate,
)
from .imbalance import (
    check_expert_parallel_sizes,
    dead_experts,
    expert_gradient_norms,
    expert_parallel_slowdown,
    load_cv,
    load_entropy,
    max_vio,
)
from .load import LoadCounts, count_selections, load_fraction, token_mask
from .losses import (
    load_balancing_loss,
    mean_scores,
    router_scores,
    router_z_loss,
    routing_scores,
    sequence_load_balancing_loss,
)
from .quantile import QuantileUpdate
from .synchronizer import LoadCountSynchronizer

__all__ = [
    "Balancer",
    "BalancingLoss",
    "BiasUpdate",
    "CentredSignUpdate",
    "LoadCountSynchronizer",
    "LoadCounts",
    "Observation",
    "ProportionalUpdate",
    "QuantileUpdate",
    "SignUpdate",
    "TanhMomentumUpdate",
    "check_expert_parallel_sizes",
    "count_selections",
    "dead_experts",
    "expert_gradient_norms",
    "expert_parallel_slowdown",
    "load_balancing_loss",
    "load_cv",
    "load_entropy",
    "load_fraction",
    "max_vio",
    "mean_scores",
    "router_scores",
    "router_z_loss",
    "routing_scores",
    "sequence_load_balancing_loss",
    "token_mask",
]
