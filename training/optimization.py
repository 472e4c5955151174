"""AdamW, and the learning rate over the steps."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..configuration import TrainingSettings
from ..modeling import MoERouter


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves norms, biases and embeddings alone (an output matrix tied to them, too)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    routers = {id(module.weight) for module in model.modules() if isinstance(module, MoERouter)}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "routers": [], "others": []}
    for weight in model.parameters():
        if weight.requires_grad:
            plain = weight.dim() < 2 or id(weight) in embeddings
            groups["others" if plain else "routers" if id(weight) in routers else "matrices"].append(weight)
    router_decay = settings.weight_decay if settings.router_weight_decay is None else settings.router_weight_decay
    decay = {"matrices": settings.weight_decay, "routers": router_decay, "others": 0.0}
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay[kind]} for kind, weights in groups.items() if weights],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps_made: int = 0) -> LambdaLR:
    """Linear warm-up, then what `learning_rate_schedule` says.

    The rate of a step is a function of the settings and the step alone, so a run that is resumed with more
    `max_steps` goes on along the longer curve.

    Args:
        steps_made: where a resumed run stands.
    """
    name, specific = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": settings.min_learning_rate_ratio}),
        "constant": ("constant_with_warmup", {}),
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": settings.wsd_decay_steps,
                "decay_type": "linear",
                "min_lr_ratio": settings.min_learning_rate_ratio,
            },
        ),
    }[settings.learning_rate_schedule]
    schedule = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.max_steps,
        scheduler_specific_kwargs=specific,
    )
    if steps_made:
        schedule.last_epoch = steps_made
        for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * rate(steps_made)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return schedule


__all__ = ["build_optimizer", "build_schedule"]
