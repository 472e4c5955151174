"""Makes a process of `run_processes` look as `torchrun` would have made it, to what reads the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState


@contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """Inside, Accelerate (and so Trainer) finds the process group that is there; afterwards it has forgotten it."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        # One for each pool of processes of each test run: a store that was opened stays.
        "MASTER_PORT": 20_000 + (8 * os.getppid() + world_size) % 20_000,
        "ACCELERATE_USE_CPU": "true",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
