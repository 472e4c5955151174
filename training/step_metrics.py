"""What the steps since the last logging step came to, summed on the device and read once.

`L` MoE layers, `E` experts.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from ..balancing import Balancer
from ..modeling import MoECausalLMOutput


class StepMetrics:
    """Adds up losses without waiting for the device; `read` reduces them over the processes."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._steps = 0

    def add_micro_batch(self, outputs: MoECausalLMOutput) -> None:
        """Take in one forward pass of this process."""
        assert outputs.lm_loss is not None
        values = {"lm_loss": outputs.lm_loss, **(outputs.aux_losses or {})}
        if outputs.aux_loss is not None:
            values["aux_loss"] = outputs.aux_loss.detach()
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._micro_batches += 1

    def end_step(self) -> None:
        """One optimizer step is complete."""
        self._steps += 1

    def read(self, accelerator: Accelerator, balancer: Balancer) -> tuple[dict[str, float | list], list[list[int]]]:
        """Mean losses since the last call, and the balance of the last global batch. Every process must call it.

        Returns:
            Numbers by name, those of a layer as lists: `lm_loss` (nats per token over the global batch), `aux_loss`
            (what balancing added to it), each balancing term by itself, and `Balancer.metrics`; and the load `[L][E]`.
        """
        names = sorted(self._sums)
        sums = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
        # Losses are shares of the global batch's; terms are values of a micro-batch.
        per_micro_batch = self._micro_batches * accelerator.num_processes
        record: dict[str, float | list] = {
            name: total / (self._steps if name in ("lm_loss", "aux_loss") else per_micro_batch)
            for name, total in zip(names, sums, strict=True)
        }
        metrics = balancer.metrics()
        load: list[list[int]] = []
        if metrics:
            load = metrics.pop("load").tolist()
            record |= {name: value.tolist() for name, value in metrics.items() if name != "tokens"}
        self._clear()
        return record, load
