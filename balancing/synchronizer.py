"""LoadCountSynchronizer: from the counts of one micro-batch to the load of the global batch.

`L` MoE layers, `E` experts.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .load import LoadCounts


@dataclass
class PendingCounts:
    """An all-reduce under way; only `LoadCountSynchronizer.wait` reads it."""

    packed: Tensor
    num_layers: int
    num_experts: int
    work: dist.Work | None


class LoadCountSynchronizer:
    """Sums load counts over the ranks, and over the micro-steps since the last optimizer step.

    One packed all-reduce per call of `start`, asynchronous: launch it when the last layer has routed, `wait` after the
    language-model loss, and it hides under the output projection. Every rank of the group must take part in every
    micro-step, one without a valid token with zeros. Without a process group it is a plain sum.

    Source: "Demons in the Detail", arXiv 2501.11873 (synchronisation and the accumulation buffer).

    Args:
        process_group: the data-parallel group; `None` is the default group. Tensor- and expert-parallel peers hold the
            same tokens and must not be in it (`equipoise.integrations.data_parallel_group` finds it).
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.running: LoadCounts | None = None
        """Counts over all ranks since the last optimizer step, or `None` when nothing was counted."""
        self.previous: LoadCounts | None = None
        """Counts of the last whole global batch, or `None` before the first."""
        self.accumulated = False
        """Whether the last whole global batch was counted in more than one micro-step."""
        self._micro_steps = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadCountSynchronizer":
        """A copy in the same group: copying a model must not stumble over what no one can copy."""
        twin = LoadCountSynchronizer(self.process_group)
        for name, value in vars(self).items():
            if name != "process_group":
                setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the group, which means nothing in another process."""
        return vars(self) | {"process_group": None}

    @property
    def in_group(self) -> bool:
        """Whether there is a process group to sum over, if only of one rank."""
        return dist.is_available() and dist.is_initialized()

    @property
    def world_size(self) -> int:
        """Ranks that take part; 1 without a process group."""
        return dist.get_world_size(self.process_group) if self.in_group else 1

    def start(self, counts: LoadCounts) -> PendingCounts:
        """Launch the all-reduce of this rank's counts; returns at once."""
        packed = counts.pack()
        work = None
        if self.in_group:
            work = dist.all_reduce(packed, group=self.process_group, async_op=True)
        num_layers, num_experts = counts.load.shape
        return PendingCounts(packed, num_layers, num_experts, work)

    def wait(self, pending: PendingCounts) -> LoadCounts:
        """The counts of this micro-step over all ranks; adds them to `running`."""
        if pending.work is not None:
            pending.work.wait()
        counts = LoadCounts.unpack(pending.packed, pending.num_layers, pending.num_experts)
        self.add(counts)
        return counts

    def add(self, counts: LoadCounts) -> None:
        """Add counts that are summed over the ranks already."""
        self._micro_steps += 1
        self.running = counts if self.running is None else self.running + counts

    def sum_over_ranks(self, *integers: Tensor) -> list[Tensor]:
        """Integer tensors summed over the ranks in one all-reduce, which is waited for."""
        packed = torch.cat([tensor.flatten() for tensor in integers])
        if self.in_group:
            dist.all_reduce(packed, group=self.process_group)
        parts = packed.split([tensor.numel() for tensor in integers])
        return [part.view(tensor.shape) for part, tensor in zip(parts, integers, strict=True)]

    def completed_load(self) -> Tensor:
        """`running`, with the previous global batch's load for the part of this one not yet seen.

        `C + max(0, 1 - T / T_previous) * C_previous`, with `C` and `T` the selections and tokens so far. Where
        micro-batches differ from one another, the first ones then meet the load of all of them, not their own alone.
        A batch that follows one without accumulation is taken to have none either: nothing of it is unseen.

        Returns:
            Selections `[L, E]`, float64; those of `running` before the first global batch is whole.
        """
        assert self.running is not None
        load = self.running.load.double()
        if self.previous is None or not self.accumulated:
            return load
        previous = self.previous.to(load.device)
        unseen = (1 - self.running.tokens / previous.tokens.clamp(min=1).double()).clamp(min=0)
        return load + unseen * previous.load

    def close(self, *, skipped: bool = False) -> LoadCounts | None:
        """End the global batch: an optimizer step has been made, or `skipped`.

        Returns:
            The counts of the global batch, which become `previous`; `None` if it was skipped or held nothing.
        """
        counts, self.running = self.running, None
        accumulated, self._micro_steps = self._micro_steps > 1, 0
        if skipped or counts is None:
            return None
        self.previous, self.accumulated = counts, accumulated
        return counts
