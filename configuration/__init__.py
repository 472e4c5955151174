"""Settings without torch: the model's configuration and the settings of a training run."""

from .configuration_moe import MoEConfig
from .training_settings import (
    DataSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    parse_run_settings,
    run_block_size,
)

__all__ = [
    "DataSettings",
    "MoEConfig",
    "ModelSettings",
    "RunSettings",
    "TrainingSettings",
    "parse_run_settings",
    "run_block_size",
]
