"""The guard: steps that would do harm are not made, and are put on record."""

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any

WINDOW = 128


class SpikeGuard:
    """Says of each step, before it is made, whether its loss or gradient norm is out of line.

    Not finite is always out of line. So is, once `WINDOW` steps have been seen, what exceeds their mean by more than
    `sigma` standard deviations (as OLMo-core's skip-step optimizers do, there with 6 over 128 steps). Skipped steps do
    not enter the mean. After `patience` of them in a row the run stops: a person shall look.

    It decides from numbers that every process has, and so every process decides alike.

    Args:
        sigma: standard deviations; 0 looks for numbers that are not finite only.
        patience: skipped steps in a row after which the run stops.
    """

    def __init__(self, sigma: float, patience: int) -> None:
        self.sigma, self.patience = sigma, patience
        self.skipped = 0
        """Steps skipped so far."""
        self._in_a_row = 0
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def objection(self, loss: float, gradient_norm: float) -> str | None:
        """Why the step must not be made; `None` where it may.

        Args:
            loss: mean over the global batch.
            gradient_norm: before clipping.
        """
        found = self._out_of_line("loss", loss, 0) or self._out_of_line("grad_norm", gradient_norm, 1)
        if found is None:
            self._in_a_row = 0
            self._window.append((loss, gradient_norm))
        else:
            self._in_a_row += 1
            self.skipped += 1
        return found

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that the run must stop."""
        return self._in_a_row >= self.patience

    def _out_of_line(self, name: str, value: float, column: int) -> str | None:
        if not math.isfinite(value):
            return f"{name} must be finite; got {value}"
        if self.sigma and len(self._window) == WINDOW:
            seen = [pair[column] for pair in self._window]
            limit = fmean(seen) + self.sigma * pstdev(seen)
            if value > limit:
                return f"{name} must be at most {limit:.4g}, {self.sigma:g} sigma above the mean; got {value:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to decide alike, as JSON holds it."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "window": [list(pair) for pair in self._window]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._window = deque(((loss, norm) for loss, norm in state["window"]), maxlen=WINDOW)


__all__ = ["SpikeGuard"]
