"""LoadCountSynchronizer: from the counts of one micro-batch to the load of the global batch.

`L` MoE layers, `E` experts.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from .load import LoadCounts


@dataclass
class PendingCounts:
    """An all-reduce under way; only `LoadCountSynchronizer.wait` reads it."""

    packed: Tensor
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
            same tokens and must not be in it.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.running: LoadCounts | None = None
        """Counts over all ranks since the last `reset`, or `None` when nothing was counted."""

    @property
    def world_size(self) -> int:
        """Ranks that take part; 1 without a process group."""
        return dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1

    def start(self, counts: LoadCounts) -> PendingCounts:
        """Launch the all-reduce of this rank's counts; returns at once."""
        packed = counts.pack()
        work = None
        if self.world_size > 1:
            work = dist.all_reduce(packed, group=self.process_group, async_op=True)
        return PendingCounts(packed, counts.load.shape[-1], work)

    def wait(self, pending: PendingCounts) -> LoadCounts:
        """The counts of this micro-step over all ranks; adds them to `running`."""
        if pending.work is not None:
            pending.work.wait()
        counts = LoadCounts.unpack(pending.packed, pending.num_experts)
        self.running = counts if self.running is None else self.running + counts
        return counts

    def reset(self) -> None:
        """Forget what was accumulated: an optimizer step has been made, or skipped."""
        self.running = None
