"""When to stop before the end: signals, a time limit, a launcher that is gone."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# What a scheduler reads: EX_TEMPFAIL of sysexits.h, "try again".
RESUME_ME = 75
# Of the process that imports this: later the launcher may be gone already.
_PARENT = os.getppid()
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1 is what Slurm is usually asked to send ahead


class Interruption:
    """Turns a request to stop into a word that the loop asks for between steps: nothing is torn apart half-way.

    A context manager; inside it the signals SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 are requests.

    Args:
        max_hours: the time limit of this launch; `None` has none.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._signal: int | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "Interruption":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        self._signal = number  # a second one changes nothing: launchers send them twice

    def reason(self) -> str | None:
        """Why to stop now; `None` to go on. Of this process alone: the others must be told."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "max_hours"
        if os.getppid() != _PARENT:
            return "the launcher is gone"  # killed: nobody would restart, or stop, this process
        return None


__all__ = ["RESUME_ME", "Interruption"]
