"""equipoise: Mixture-of-Experts language models whose experts specialise.

Importing the package registers `MoEConfig` with `AutoConfig`, and the models with `AutoModel` and
`AutoModelForCausalLM` as soon as torch is importable. Everything else is loaded on first use.
"""

from importlib import import_module
from importlib.util import find_spec

from transformers import AutoConfig

from .configuration import MoEConfig

__version__ = "0.1.0"

AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)

# name -> room that defines it; loaded on first use, so that `import equipoise` works without torch
_EXPORTS = {
    "MoEForCausalLM": "modeling",
    "MoEModel": "modeling",
    "MoEPreTrainedModel": "modeling",
    "Balancer": "balancing",
    "LoadCountSynchronizer": "balancing",
    "TrainingSettings": "configuration",
}

if find_spec("torch") is not None:
    from . import modeling as modeling  # registers the models

__all__ = ["MoEConfig", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
