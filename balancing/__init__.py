"""Balancing the load of the experts: tensors in, tensors out; knows no model and no training loop."""

from .balancer import Balancer, BalancingLoss, Observation
from .bias_updates import BIAS_UPDATE_RULES
from .load import (
    LoadCounts,
    count_load,
    count_selections,
    dead_experts,
    load_entropy,
    load_fraction,
    max_vio,
    token_mask,
)
from .losses import load_balancing_loss, mean_scores, router_z_loss, routing_scores, sequence_load_balancing_loss
from .synchronizer import LoadCountSynchronizer

__all__ = [
    "BIAS_UPDATE_RULES",
    "Balancer",
    "BalancingLoss",
    "LoadCountSynchronizer",
    "LoadCounts",
    "Observation",
    "count_load",
    "count_selections",
    "dead_experts",
    "load_balancing_loss",
    "load_entropy",
    "load_fraction",
    "max_vio",
    "mean_scores",
    "router_z_loss",
    "routing_scores",
    "sequence_load_balancing_loss",
    "token_mask",
]
