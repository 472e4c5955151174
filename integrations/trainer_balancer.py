"""TrainerBalancer: the balancer of a stock model under Trainer, and TRL's trainers, whose forward is their own."""

from typing import Any

from .balance import StockBalancer


class TrainerBalancer(StockBalancer):
    """A `StockBalancer` whose loss survives TRL's fused LM head.

    TRL's trainers put a forward of their own in the place of the model's, past it to a fused head. They minimise what
    they make of its `log_probs`, and add its `aux_loss` times the configuration's `router_aux_loss_coef`, averaged
    over ranks and accumulation steps; `loss` they leave alone. So `aux_loss` is there the balancing loss over that
    coefficient, and 0 outside training.

    Args: as for `balance`.

    Raises:
        ValueError: in the forward pass, when TRL would leave the balancing loss out.
    """

    _fused = False
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
        config = self.model.config.get_text_config()
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        added = getattr(config, "output_router_logits", False) and coefficient > 0
        if not balancing:
            outputs.aux_loss = outputs.log_probs.new_zeros(()) if added else None
        elif added:
            outputs.aux_loss = outputs.aux_loss / coefficient
        elif outputs.aux_losses:
            name = type(self.model).__name__
            raise ValueError(
                f"the configuration of {name} must have output_router_logits True and a router_aux_loss_coef above 0 "
                f"before TRL's trainer is made, or it leaves out {', '.join(outputs.aux_losses)}; got "
                f"{getattr(config, 'output_router_logits', None)} and {coefficient}. Any coefficient will do: the one "
                "of the callback counts"
            )
        return outputs


__all__ = ["TrainerBalancer"]
