"""Settings without torch: the model's configuration and the settings of a training run."""

from .configuration_moe import BalancingMode, BiasUpdateRule, LoadEstimate, LossScope, MoEConfig, ScoringFunction
from .training_settings import (
    DataSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    parse_run_settings,
    trained_block_size,
)

__all__ = [
    "BalancingMode",
    "BiasUpdateRule",
    "DataSettings",
    "LoadEstimate",
    "LossScope",
    "MoEConfig",
    "ModelSettings",
    "RunSettings",
    "ScoringFunction",
    "TrainingSettings",
    "parse_run_settings",
    "trained_block_size",
]
