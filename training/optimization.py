"""AdamW, and the learning rate's warm-up and cosine."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ..configuration import TrainingSettings


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves norms and biases alone."""
    decayed = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() >= 2]
    others = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> LRScheduler:
    """Linear warm-up, then a cosine from `learning_rate` down to `min_learning_rate_ratio` of it."""
    return get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.max_steps,
        scheduler_specific_kwargs={"min_lr_rate": settings.min_learning_rate_ratio},
    )
