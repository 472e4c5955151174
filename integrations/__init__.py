"""Where others' objects are known: Accelerate's mesh, Transformers' expert parallelism and Trainer, optimizers."""

from .balance import StockBalancer, balance
from .expert_parallelism import clip_grad_norm_, shard_experts
from .optimizer_steps import follow
from .parallelism import data_parallel_group
from .sharding import shard, sharding_mesh, whole, whole_state_dict
from .stock_routers import RoutingRecorder, StockRouter, find_routers
from .trainer_callback import BalancingCallback
from .zero import configure_zero, zero_weights

__all__ = [
    "BalancingCallback",
    "RoutingRecorder",
    "StockBalancer",
    "StockRouter",
    "balance",
    "clip_grad_norm_",
    "configure_zero",
    "data_parallel_group",
    "find_routers",
    "follow",
    "shard",
    "shard_experts",
    "sharding_mesh",
    "whole",
    "whole_state_dict",
    "zero_weights",
]
