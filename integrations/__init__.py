"""Where others' objects are known: Accelerate's parallelism, optimizers to follow."""

from .optimizer_steps import follow
from .parallelism import data_parallel_group

__all__ = ["data_parallel_group", "follow"]
