"""What the steps since the last logging step came to, summed on the device and read once.

`B` sequences, `T` positions, `L` MoE layers, `E` experts.
"""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..balancing import Balancer
from ..data import IGNORE_INDEX
from ..modeling import MoECausalLMOutput


class StepMetrics:
    """Adds up losses without waiting for the device; `read` reduces them over the processes.

    Args:
        domains: names, in the order of the indices that micro-batches bring.
    """

    def __init__(self, domains: list[str], device: torch.device) -> None:
        self._domains, self._device = domains, device
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._this_step: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        # Loss and positions of each domain, in float64: counts must stay exact.
        self._by_domain = torch.zeros(2, len(self._domains), dtype=torch.float64, device=self._device)
        self._micro_batches = 0
        self._steps = 0

    def add_micro_batch(self, outputs: MoECausalLMOutput, labels: Tensor, domain: Tensor) -> None:
        """Take in one forward pass of this process.

        Args:
            outputs: with `token_losses`.
            labels: int64 `[B, T]`.
            domain: int64 `[B]`, each sequence's.
        """
        assert outputs.lm_loss is not None
        assert outputs.token_losses is not None
        values = {"lm_loss": outputs.lm_loss, **(outputs.aux_losses or {})}
        if outputs.aux_loss is not None:
            values["aux_loss"] = outputs.aux_loss.detach()
        losses, counts = outputs.token_losses.double().sum(-1), labels[:, 1:].ne(IGNORE_INDEX).sum(-1)
        self._this_step.append((values, torch.stack([losses, counts]), domain))

    def step_loss(self) -> Tensor:
        """This process' share of the language-model loss of the step so far."""
        return torch.stack([values["lm_loss"] for values, _, _ in self._this_step]).sum()

    def end_step(self, *, made: bool) -> None:
        """The step's micro-batches are complete; what they came to counts if the optimizer step was made."""
        for values, by_domain, domain in self._this_step if made else ():
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._by_domain.index_add_(1, domain, by_domain)
            self._micro_batches += 1
        self._steps += made
        self._this_step.clear()

    def read(self, accelerator: Accelerator, balancer: Balancer) -> tuple[dict[str, Any], list[list[int]]]:
        """Mean losses over the steps made since the last call, and the balance of the last global batch. Every process
        must call it.

        Returns:
            Numbers by name, those of a layer as lists: `lm_loss` (nats per token over the global batch), `aux_loss`
            (what balancing added to it), each balancing term by itself, `Balancer.metrics`, and `domain_loss` (nats
            per token, of the domains that were seen); and the load `[L][E]`.
        """
        names = sorted(self._sums)
        own = torch.stack([self._sums[name] for name in names]) if names else torch.zeros(0, device=self._device)
        sums = accelerator.reduce(own, "sum").tolist()
        # Losses are shares of the global batch's; terms are values of a micro-batch.
        per_micro_batch = self._micro_batches * accelerator.num_processes
        record: dict[str, Any] = {
            name: total / (self._steps if name in ("lm_loss", "aux_loss") else per_micro_batch)
            for name, total in zip(names, sums, strict=True)
        }
        losses, counts = accelerator.reduce(self._by_domain, "sum").tolist()
        record["domain_loss"] = {
            name: loss / count for name, loss, count in zip(self._domains, losses, counts, strict=True) if count
        }
        metrics = balancer.metrics()
        load: list[list[int]] = []
        if metrics:
            load = metrics.pop("load").tolist()
            record |= {name: value.tolist() for name, value in metrics.items() if name != "tokens"}
        self._clear()
        return record, load

    def state_dict(self) -> dict[str, Any]:
        """This process' sums, as JSON holds them to the bit."""
        return {
            "sums": {name: value.item() for name, value in self._sums.items()},
            "by_domain": self._by_domain.tolist(),
            "micro_batches": self._micro_batches,
            "steps": self._steps,
        }

    def load_state_dict(self, states: list[dict[str, Any]], rank: int, world_size: int) -> None:
        """Go on from the sums of all processes; on another number of processes the first takes them all."""
        if len(states) != world_size:
            total = {
                "sums": {name: sum(state["sums"][name] for state in states) for name in states[0]["sums"]},
                "by_domain": np.sum([state["by_domain"] for state in states], axis=0).tolist(),
            }
            zero = {
                "sums": dict.fromkeys(total["sums"], 0.0),
                "by_domain": torch.zeros_like(self._by_domain).tolist(),
            }
            micro_batches = sum(state["micro_batches"] for state in states)
            counts = {"micro_batches": micro_batches // world_size, "steps": states[0]["steps"]}
            states = [(zero if other else total) | counts for other in range(world_size)]
        state = states[rank]
        self._sums = {name: torch.tensor(value, device=self._device) for name, value in state["sums"].items()}
        self._by_domain = torch.tensor(state["by_domain"], dtype=torch.float64, device=self._device)
        self._micro_batches, self._steps = state["micro_batches"], state["steps"]


__all__ = ["StepMetrics"]
