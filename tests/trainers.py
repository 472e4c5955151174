"""What tests of Trainer share: its arguments on a CPU, batches in their order, and texts of uneven length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments


class InOrder(Trainer):
    """Takes the examples as they come: a process has each second one of two, micro-batch by micro-batch."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def fields(folder: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | changes


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**fields(folder, **changes))


def examples(number: int, lengths: list[int], prompts: list[int], seed: int = 1) -> list[dict[str, Tensor]]:
    """Padded to the longest; the labels leave padding and the prompt out. `lengths` and `prompts` are gone round."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length, prompt = lengths[index % len(lengths)], prompts[index % len(prompts)]
        ids = torch.randint(2, 64, (max(lengths),), generator=generator)
        positions = torch.arange(max(lengths))
        mask = (positions < length).long()
        labels = ids.masked_fill((positions >= length) | (positions < prompt), -100)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, averaged over the processes as the optimizer gets them."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            weights = model.named_parameters()
            self.first = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


class Recorder(TrainerCallback):
    """What a callback that reports would have reported."""

    def __init__(self, also: Callable[[Any], Any] = lambda model: None) -> None:
        self.logs: list[dict[str, Any]] = []
        self.seen: list[Any] = []
        self._also = also

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(self._also(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))
