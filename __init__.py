"""equipoise: Mixture-of-Experts language models whose experts specialise.

Importing the package registers `MoEConfig` with `AutoConfig`, and the models with the other Auto classes
as soon as torch is importable. Everything else is loaded on first use.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from .configuration import MoEConfig

if TYPE_CHECKING:
    from .analysis import inspect
    from .balancing import Balancer, LoadCountSynchronizer
    from .integrations import BalancingCallback, balance
    from .modeling import (
        MoEForCausalLM,
        MoEForQuestionAnswering,
        MoEForSequenceClassification,
        MoEForTokenClassification,
        MoEModel,
        MoEPreTrainedModel,
    )

__version__ = "0.1.0"

__all__ = [
    "Balancer",
    "BalancingCallback",
    "LoadCountSynchronizer",
    "MoEConfig",
    "MoEForCausalLM",
    "MoEForQuestionAnswering",
    "MoEForSequenceClassification",
    "MoEForTokenClassification",
    "MoEModel",
    "MoEPreTrainedModel",
    "balance",
    "inspect",
]

# name -> room that defines it
_LAZY = {name: "modeling" for name in __all__ if name.startswith("MoE")} | {
    "Balancer": "balancing",
    "BalancingCallback": "integrations",
    "LoadCountSynchronizer": "balancing",
    "balance": "integrations",
    "inspect": "analysis",
}

AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
if find_spec("torch") is not None:
    import_module(".modeling", __name__)  # registers the models


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
