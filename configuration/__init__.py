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
from .model_size import ModelSize, model_size
from .recipe import DomainSource, Recipe, parse_recipe
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
    "DomainSource",
    "LoadEstimate",
    "LossScope",
    "MoEConfig",
    "ModelSettings",
    "ModelSize",
    "Recipe",
    "RunSettings",
    "ScoringFunction",
    "TrainingSettings",
    "model_size",
    "parse_recipe",
    "parse_run_settings",
    "trained_block_size",
]
