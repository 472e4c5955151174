"""Architecture: the shape of a model that routes, ours or any of Transformers, read off its modules.

`L` MoE layers, `E` experts, `K` experts per token, `F` expert width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..configuration import BalancingSettings, MoEConfig
from ..configuration.configuration_moe import ScoringFunction
from ..integrations.stock_routers import StockRouter, causal_language_model, find_routers, resolve, unwrapped


@dataclass(frozen=True)
class Architecture:
    """The shape of a model that routes."""

    family: str
    """Name of the model's class."""
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    num_moe_layers: int
    """L: one for each router."""
    num_experts: int
    """E: what a router selects from."""
    num_experts_per_tok: int
    """K"""
    num_shared_experts: int
    moe_intermediate_size: int | None
    """F; `None` where the configuration does not tell."""
    scoring_func: ScoringFunction
    parameters: int
    """All of them, tied ones once."""
    active_parameters: int | None
    """Those that act on one token: all but the experts that it did not select. `None` where experts cannot be told
    from the rest."""
    balancing: BalancingSettings | None
    """How it balances itself; `None` of stock models, whose configuration does not tell how they were trained."""

    @classmethod
    def of(cls, model: nn.Module) -> "Architecture":
        """The shape of a model, whatever wraps it.

        Raises:
            ValueError: it has no routers that can be read.
        """
        causal = causal_language_model(model)
        config = causal.config.get_text_config(decoder=True)
        routers = find_routers(causal)
        router = routers[0]
        ours = config.model_type == MoEConfig.model_type
        parameters = sum(weight.numel() for weight in causal.parameters())
        of_experts = [_expert_parameters(causal, each) for each in routers]
        selected = router.num_experts_per_tok / router.num_experts
        return cls(
            family=type(causal).__name__,
            num_hidden_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_moe_layers=len(routers),
            num_experts=router.num_experts,
            num_experts_per_tok=router.num_experts_per_tok,
            num_shared_experts=_first(config, "num_shared_experts", "n_shared_experts", "moe_num_shared_experts") or 0,
            moe_intermediate_size=_first(config, "moe_intermediate_size", "intermediate_size"),
            scoring_func=config.scoring_func if ours else router.scoring_func,
            parameters=parameters,
            active_parameters=parameters - round(sum(of_experts) * (1 - selected)) if all(of_experts) else None,
            balancing=BalancingSettings.of(config) if ours else None,
        )

    @classmethod
    def read(cls, folder: str | Path) -> "Architecture":
        """The shape of a saved model, from its configuration; no weight is read.

        Raises:
            ValueError: it has no routers that can be read.
        """
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return cls.of(new_model(config))


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A freshly initialised model of this configuration."""
    return _auto_class(config).from_config(config)


def load_model(folder: str | Path) -> PreTrainedModel:
    """A saved model."""
    return _auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def _auto_class(config: PreTrainedConfig) -> Any:
    """A language model by itself, or one with eyes where there is none without."""
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _expert_parameters(model: PreTrainedModel, router: StockRouter) -> int:
    """Parameters of the experts that a router selects from: those of its block with a first dimension of `E`, and
    three or, for biases, two; or lists of `E` modules."""
    block = unwrapped(resolve(model, router.path.rpartition(".")[0]))
    inside = unwrapped(resolve(model, router.path))
    own = {id(weight) for weight in inside.parameters()} if inside is not block else set()
    stacked = [
        weight
        for module in block.modules()
        if "expert" in type(module).__name__.lower()
        for weight in module.parameters(recurse=False)
        if weight.dim() >= 2 and len(weight) == router.num_experts and id(weight) not in own
    ]
    listed = [
        weight
        for module in block.modules()
        if isinstance(module, nn.ModuleList) and len(module) == router.num_experts
        for weight in module.parameters()
    ]
    return sum(weight.numel() for weight in stacked or listed)


__all__ = ["Architecture", "load_model", "new_model"]
