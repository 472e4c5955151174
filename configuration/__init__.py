"""Settings without torch: the model's configuration and the settings of a training run."""

from .balancing_settings import (
    BalancingFields,
    BalancingMode,
    BalancingSettings,
    BiasUpdateRule,
    LoadEstimate,
    LossScope,
)
from .configuration_moe import MoEConfig, ScoringFunction
from .training_settings import (
    DataSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    parse_run_settings,
    trained_block_size,
)

__all__ = [
    "BalancingFields",
    "BalancingMode",
    "BalancingSettings",
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
