"""TrainerBalancer: the balancer of a stock model under Trainer, and TRL's trainers, whose forward is their own."""

import inspect
from typing import Any

from torch import nn

from ..configuration import BalancingMode
from .balance import StockBalancer
from .stock_routers import causal_language_model


class TrainerBalancer(StockBalancer):
    """A `StockBalancer` whose loss survives TRL's fused LM head.

    TRL's trainers put a forward of their own in the place of the model's, past it to a fused head. They minimise what
    they make of its `log_probs`, and add its `aux_loss` times a coefficient, averaged over ranks and accumulation
    steps; `loss` they leave alone. So `aux_loss` is there the balancing loss over that coefficient, and 0 outside
    training.

    Args:
        trl_coefficient: what TRL multiplies `aux_loss` with; 0: it adds none.
        **settings: as for `balance`.

    Raises:
        ValueError: in the forward pass, when TRL would leave the balancing loss out.
    """

    def __init__(
        self, model: nn.Module, balancing_mode: BalancingMode, *, trl_coefficient: float, **settings: Any
    ) -> None:
        super().__init__(model, balancing_mode, **settings)
        self._trl_coefficient = trl_coefficient
        self._fused = False
        """Whether the forward pass under way goes to the fused head."""

    def begin(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._fused = bool(kwargs.get("fused_lm_head"))
        if self._fused:
            kwargs = kwargs | {"output_router_logits": False}  # or TRL would compute Transformers' loss
        return super().begin(args, kwargs)

    def end(self, outputs: Any) -> Any:
        balancing = self._forward is not None and self._forward.balancing
        outputs = super().end(outputs)
        if not self._fused:
            return outputs
        coefficient = self._trl_coefficient
        if not balancing:
            outputs.aux_loss = outputs.log_probs.new_zeros(()) if coefficient else None
        elif coefficient:
            outputs.aux_loss = outputs.aux_loss / coefficient
        elif outputs.aux_losses:
            raise ValueError(
                f"router_aux_loss_coef of TRL's configuration must be above 0, or it leaves out "
                f"{', '.join(outputs.aux_losses)} (any will do: the callback's own counts); got {coefficient}"
            )
        return outputs


def trl_coefficient(args: Any, model: nn.Module) -> float:
    """What TRL's trainers multiply an auxiliary loss with, by their arguments or else by the model's configuration."""
    config = causal_language_model(model).config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return 0.0
    given = getattr(args, "router_aux_loss_coef", None)
    return getattr(config, "router_aux_loss_coef", 0.0) if given is None else given


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has given the model a forward of its own."""
    return "fused_lm_head" in inspect.signature(model.forward, follow_wrapped=False).parameters


__all__ = ["TrainerBalancer", "has_fused_head", "trl_coefficient"]
