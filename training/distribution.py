"""How a model is spread over the processes, and what follows from it for the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..configuration import TrainingSettings
from ..integrations import (
    clip_grad_norm_,
    configure_zero,
    data_parallel_group,
    shard,
    shard_experts,
    sharding_mesh,
    whole,
    whole_state_dict,
    zero_weights,
)
from ..modeling import MoEForCausalLM
from .optimization import build_optimizer


@dataclass
class Distribution:
    """A model on all processes."""

    model: MoEForCausalLM
    """Where its Balancer and configuration are."""
    wrapped: Any
    """The same, as it is called."""
    optimizer: Any
    """Accelerate's, to step."""
    torch_optimizer: torch.optim.Optimizer
    """The one inside, to schedule and to save."""
    steps_in_backward: bool
    """DeepSpeed makes the optimizer step itself, inside the last backward pass: no step can be called off."""
    _clip: Callable[..., Any]

    def clip_gradient(self, max_norm: float) -> float:
        """Scale the whole gradient down to a norm; returns what it was before, the same on every process."""
        return float(whole(self._clip(self.wrapped.parameters(), max_norm)))

    def whole_weights(self) -> dict[str, Tensor]:
        """A copy of all weights, in fp32, on the first process; every process must call it."""
        return zero_weights(self.wrapped) if self.steps_in_backward else whole_state_dict(self.model)


def distribute(accelerator: Accelerator, model: MoEForCausalLM, training: TrainingSettings) -> Distribution:
    """Spread a model as the settings say, or as the launch does: DDP, FSDP or DeepSpeed by Accelerate.

    Its Balancer then counts over the processes whose tokens differ.

    Raises:
        ValueError: a size does not fit the processes, or a setting cannot be had under DeepSpeed.
    """
    bf16 = training.mixed_precision == "bf16"
    if training.expert_parallel_size > 1:
        model = shard_experts(model, training.expert_parallel_size, bf16=bf16)
        group = data_parallel_group(model)
        if group is not None and group.size() != accelerator.num_processes:
            raise ValueError(
                "expert_parallel_size must be 1 with a Transformers that gives all of its processes the same tokens "
                f"(before 5.23); got {training.expert_parallel_size}"
            )
    elif training.sharding != "none":
        shard_size = None
        if training.sharding == "hsdp":
            shard_size = training.shard_size or torch.accelerator.device_count() or accelerator.num_processes
        mesh = sharding_mesh(accelerator.device.type, shard_size)
        model = shard(model, mesh, bf16=bf16)
        group = data_parallel_group(mesh)
    else:
        steps_in_backward = configure_zero(
            accelerator, micro_batch_size=training.micro_batch_size, max_grad_norm=training.max_grad_norm
        )
        if steps_in_backward and (training.spike_sigma or training.log_expert_gradients):
            name = "spike_sigma" if training.spike_sigma else "log_expert_gradients"
            raise ValueError(
                f"{name} must be off under DeepSpeed, which makes the step before gradients can be looked at; "
                f"got {getattr(training, name)}"
            )
        torch_optimizer = build_optimizer(model, training)
        wrapped, optimizer = accelerator.prepare(model, torch_optimizer)
        model.balancer.synchronizer.process_group = data_parallel_group(accelerator)
        return Distribution(model, wrapped, optimizer, torch_optimizer, steps_in_backward, accelerator.clip_grad_norm_)
    model.balancer.synchronizer.process_group = group
    torch_optimizer = build_optimizer(model, training)
    return Distribution(model, model, accelerator.prepare(torch_optimizer), torch_optimizer, False, clip_grad_norm_)


__all__ = ["Distribution", "distribute"]
