"""Where a step's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "backward", "synchronisation", "optimizer")


class PhaseTimes:
    """Seconds of the phases of one optimizer step, on this process.

    An accelerator works behind the host's back, so a phase ends when the device is done: that costs time, and only
    steps that are logged are measured. `backward` holds what of the gradients' reduction does not hide behind it;
    `synchronisation` is what the processes wait for one another beside that.

    Args:
        measuring: whether this step is measured.
    """

    def __init__(self, measuring: bool) -> None:
        self._measuring = measuring
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of a `with` block to a phase."""
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start

    def _now(self) -> float:
        if self._measuring and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


__all__ = ["PHASES", "PhaseTimes"]
