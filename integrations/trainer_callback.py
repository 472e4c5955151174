"""BalancingCallback: the experts of a stock model balanced under `transformers.Trainer` and TRL's trainers, and the
balance of any model in their logs and checkpoints.

`L` MoE layers, `E` experts.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..balancing import Balancer
from ..configuration import BalancingFields, BalancingMode, BalancingSettings
from .balance import StockBalancer
from .stock_routers import resolve, unwrapped
from .trainer_balancer import TrainerBalancer, has_fused_head, trl_coefficient


class BalancingCallback(TrainerCallback, ExportableState):
    """Balances a stock model while it trains, logs how balanced the experts are, and carries the balancer through the
    Trainer's checkpoints.

    With a mode it balances a model of Transformers that does not balance itself, as [`balance`] does, from the
    beginning of the training to its end. What cannot be balanced so is refused when the Trainer is made. Without one,
    the model has a balancer: a `MoEForCausalLM`, or a stock model under [`balance`].

    - Training logs hold `max_vio_batch` and `max_vio_micro` (means over layers; `..._worst`, the worst layer's),
      `load_entropy`, `dead_experts` (of all layers), `load_balancing_loss` of the global batch and, where a bias
      moves, `bias_range` (the widest layer's). Trainer puts the callbacks it is given behind those that report to
      TensorBoard and others; to have these report the balance too, put this one first:
      `trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(BalancingCallback))`;
    - `resume_from_checkpoint` goes on where the run was: the state of the balancer is in `trainer_state.json`, and of
      a stock model the correction biases, which an adapter's checkpoint has not (otherwise they are among the
      weights);
    - steps are closed where torch tells nobody of them (see [`Balancer`]): under DeepSpeed, and where a gradient
      scaler passes over an unfused optimizer.

    Args:
        balancing_mode: as in `MoEConfig`; `None`: the model balances already.
        detach: take the balancing off when training ends.
        **settings: the other balancing fields of `MoEConfig`.

    Raises:
        ValueError: a setting that cannot be; when the Trainer is made, or begins to train, a model that cannot be
            balanced in this mode, or without a mode does not balance.
    """

    def __init__(self, balancing_mode: BalancingMode | None = None, *, detach: bool = True, **settings: Any) -> None:
        known = [field.name for field in fields(BalancingFields)]
        for name in settings:
            if name not in known:
                raise ValueError(f"settings must be balancing fields of MoEConfig ({', '.join(known)}); got {name}")
        if balancing_mode is not None:
            BalancingSettings(balancing_mode=balancing_mode, **settings)
        elif settings:
            raise ValueError(f"balancing_mode must be given with {', '.join(settings)}; got None")
        self.balancing_mode, self.detach, self.settings = balancing_mode, detach, settings
        self._balancer: Balancer | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._attach(model, args)
        if self.balancing_mode is not None:
            # The biases are fp32 now, before anything wraps or shards them. TRL is yet to give the model its forward.
            self._detach()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self.balancing_mode is not None:
            self._detach()  # a training that broke off
        self._attach(model, args)
        assert self._balancer is not None
        name = type(self).__name__
        if state.global_step and name in state.stateful_callbacks:
            attributes = state.stateful_callbacks[name]["attributes"]
            self._balancer.load_state_dict(attributes["balancer_state"])
            load_biases(self._balancer, attributes.get("biases"))
        # A checkpoint of a run without this callback has no place for it, which Trainer then misses when it saves.
        state.stateful_callbacks[name] = self.state()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.detach and self.balancing_mode is not None:
            self._detach()

    def _attach(self, model: nn.Module, args: TrainingArguments) -> None:
        if self.balancing_mode is None:
            self._balancer = find_balancer(model)
            if isinstance(self._balancer, StockBalancer) and has_fused_head(self._balancer.model):
                raise ValueError(
                    "balancing_mode must be given to BalancingCallback under TRL, whose fused head leaves the loss of "
                    "equipoise.balance out: detach() that balancer and give its settings here; got None"
                )
            return
        if _balancer_in(model) is not None:
            raise ValueError(
                "balancing_mode must not be given for a model with a balancer: set it in the model's configuration "
                "(from_pretrained takes the fields too), or detach the balancer, or give BalancingCallback no mode; "
                f"got {self.balancing_mode} for {type(model).__name__}"
            )
        self._balancer = TrainerBalancer(
            model, self.balancing_mode, trl_coefficient=trl_coefficient(args, model), **self.settings
        )

    def _detach(self) -> None:
        if isinstance(self._balancer, StockBalancer):
            self._balancer.detach()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        assert self._balancer is not None
        self._balancer.after_optimizer_step(skipped=getattr(optimizer, "step_was_skipped", False))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # Not in the logs of an evaluation, nor in the summary at the end.
        if self._balancer is not None and logs is not None and "loss" in logs:
            balance = balance_of(self._balancer)
            logs |= balance
            state.log_history[-1] |= balance

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        balancer = self._balancer
        return {
            "args": {"balancing_mode": self.balancing_mode, "detach": self.detach, **self.settings},
            "attributes": {
                "balancer_state": None if balancer is None else balancer.state_dict(),
                "biases": None if balancer is None else biases_of(balancer),
            },
        }


def biases_of(balancer: Balancer) -> list[list[float]] | None:
    """The correction biases of a stock model, by layer; `None` of others, and of sharded biases, which are parameters
    and which one rank cannot read."""
    biases = _biases(balancer)
    return [bias.flatten().tolist() for bias in biases] if biases else None


@torch.no_grad()
def load_biases(balancer: Balancer, values: list[list[float]] | None) -> None:
    """The inverse of `biases_of`, in place."""
    for bias, of_layer in zip(_biases(balancer), values or [], strict=False):
        bias.copy_(torch.tensor(of_layer).view(bias.shape))


def _biases(balancer: Balancer) -> list[Tensor]:
    if not isinstance(balancer, StockBalancer):
        return []
    places = [router.bias for router in balancer.recorder.routers if router.bias is not None]
    found = [getattr(unwrapped(resolve(balancer.model, path)), name) for path, name in places]
    return [] if any(isinstance(bias, DTensor) for bias in found) else found


def find_balancer(model: nn.Module) -> Balancer:
    """The balancer of the model that is somewhere inside `model`, whatever has wrapped it.

    Raises:
        ValueError: there is none.
    """
    balancer = _balancer_in(model)
    if balancer is None:
        raise ValueError(
            "model must have a balancer, as MoEForCausalLM has, or BalancingCallback a balancing_mode to give it one; "
            f"got {type(model).__name__}"
        )
    return balancer


def _balancer_in(model: nn.Module) -> Balancer | None:
    for module in model.modules():
        # Not by its class: a model loaded with `trust_remote_code` brings its own.
        balancer: Any = getattr(module, "balancer", None)
        if hasattr(balancer, "after_optimizer_step"):
            return balancer
    return None


def balance_of(balancer: Balancer) -> dict[str, float]:
    """The balance of the last global batch in numbers to log; waits for the device.

    Returns:
        Empty before the first optimizer step.
    """
    metrics = balancer.metrics()
    if not metrics:
        return {}
    numbers = {
        "max_vio_batch": metrics["max_vio_batch"].mean(),
        "max_vio_batch_worst": metrics["max_vio_batch"].max(),
        "max_vio_micro": metrics["max_vio_micro"].mean(),
        "max_vio_micro_worst": metrics["max_vio_micro"].max(),
        "load_entropy": metrics["load_entropy"].mean(),
        "dead_experts": metrics["dead_experts"].sum(),
        "load_balancing_loss": metrics["load_balancing_loss_batch"].mean(),
    }
    if "bias_range" in metrics:
        numbers["bias_range"] = metrics["bias_range"].max()
    values = torch.stack([number.to(torch.float64) for number in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))
