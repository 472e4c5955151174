"""BalancingCallback: the balance of the experts in the logs and checkpoints of `transformers.Trainer`, and TRL's.

`L` MoE layers.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..balancing import Balancer


class BalancingCallback(TrainerCallback, ExportableState):
    """Logs how balanced the experts are, and carries the balancer through the Trainer's checkpoints.

    A model that balances needs no callback to do so. With this one

    - training logs hold `max_vio_batch` and `max_vio_micro` (means over layers; `..._worst`, the worst layer's),
      `load_entropy`, `dead_experts` (of all layers), `load_balancing_loss` of the global batch and, where a bias
      moves, `bias_range` (the widest layer's). Trainer puts the callbacks it is given behind those that report to
      TensorBoard and others; to have these report the balance too, put this one first:
      `trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(BalancingCallback))`;
    - `resume_from_checkpoint` goes on where the run was: the state of the balancer is in `trainer_state.json` (the
      biases are among the weights);
    - steps are closed where torch tells nobody of them (see [`Balancer`]): under DeepSpeed, and where a gradient
      scaler passes over an unfused optimizer.

    Raises:
        ValueError: when the Trainer is made, or begins to train: its model does not balance.
    """

    def __init__(self) -> None:
        self._balancer: Balancer | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._balancer = find_balancer(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._balancer = find_balancer(model)
        name = type(self).__name__
        if state.global_step and name in state.stateful_callbacks:
            self._balancer.load_state_dict(state.stateful_callbacks[name]["attributes"]["balancer_state"])
        # A checkpoint of a run without this callback has no place for it, which Trainer then misses when it saves.
        state.stateful_callbacks[name] = self.state()

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
        balancer_state = None if self._balancer is None else self._balancer.state_dict()
        return {"args": {}, "attributes": {"balancer_state": balancer_state}}


def find_balancer(model: nn.Module) -> Balancer:
    """The balancer of the model that is somewhere inside `model`, whatever has wrapped it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        # Not by its class: a model loaded with `trust_remote_code` brings its own.
        balancer: Any = getattr(module, "balancer", None)
        if hasattr(balancer, "after_optimizer_step"):
            return balancer
    raise ValueError(f"model must have a balancer, as MoEForCausalLM has; got {type(model).__name__}")


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
