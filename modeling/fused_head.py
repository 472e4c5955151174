"""Balancing under TRL, whose trainers give the model a forward of their own.

It goes from the decoder to a fused LM head past the model's forward, and adds the auxiliary loss of Transformers:
pooled over layers, counted over one micro-batch. Here it gets this model's loss in that place.

`B` sequences, `T` positions.
"""

import functools
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing.balancer import Observation


class DecoderRouting:
    """Observes what the decoder routes in the middle of another's forward: the all-reduce then hides under the head.

    Args:
        model: the causal language model; its decoder gets two hooks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batch: tuple[Tensor | None, Tensor] | None = None
        """Attention mask and positions with loss of the forward under way; `None`: nothing is to be observed."""
        self.observed: Observation | None = None
        model.model.register_forward_pre_hook(self._ask, with_kwargs=True)
        model.model.register_forward_hook(self._observe)

    def _ask(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if self.batch is None else kwargs | {"output_routing": True}

    def _observe(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if self.batch is not None:
            self.observed = self.model.observe(output, *self.batch)


def balanced(model: Any, replacement: Any) -> Any:
    """What takes the place of the model's forward where `replacement` was to take it: the same, but balanced.

    The output's `aux_loss` is then the balancing loss over `router_aux_loss_coef`, by which TRL multiplies it, scaled
    for a loop that averages over ranks and accumulation steps, as TRL does with this loss. Outside training it is 0.

    Args:
        model: the causal language model.
        replacement: returned as it is unless it has a fused LM head.

    Raises:
        ValueError: in its forward pass, when another coefficient than the model's own was put into its configuration.
    """
    if (
        not isinstance(replacement, MethodType)
        or "fused_lm_head" not in inspect.signature(replacement, follow_wrapped=False).parameters
    ):
        return replacement
    function, coefficient = replacement.__func__, model.config.router_aux_loss_coef
    if model.decoder_routing is None:
        model.decoder_routing = DecoderRouting(model)

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return function(self, *args, **kwargs)
        wanted = kwargs.get("output_router_logits", self.config.output_router_logits)
        kwargs["output_router_logits"] = False  # or Transformers' auxiliary loss would be in the output already
        routing = self.decoder_routing
        if self.training and torch.is_grad_enabled():
            bears_loss = self.positions_with_loss(kwargs.get("labels"), kwargs.get("shift_labels"))
            routing.batch = kwargs.get("attention_mask"), bears_loss
        try:
            outputs = function(self, *args, **kwargs)
        finally:
            routing.batch = None
        observed, routing.observed = routing.observed, None
        if observed is None:
            outputs.aux_loss = outputs.log_probs.new_zeros(()) if wanted else None
            return outputs
        loss = self.balancer.loss(observed, kwargs.get("num_items_in_batch"))
        if loss.terms and not (wanted and self.config.router_aux_loss_coef == coefficient):
            raise ValueError(
                f"router_aux_loss_coef must be the one that the model was made with ({coefficient}), and above 0, or "
                f"TRL leaves out {', '.join(loss.terms)}; got {self.config.router_aux_loss_coef}"
            )
        if wanted:
            outputs.aux_loss = loss.total / coefficient
        outputs.loss = outputs.loss + loss.total
        return outputs

    return MethodType(forward, model)
