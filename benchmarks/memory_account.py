"""The memory that work takes, to the byte.

On a CPU torch's profiler tells of every block that torch's allocator gives out and takes back, those inside kernels
too, and their sum is followed; on a GPU the allocator itself keeps the largest sum. What MKL, oneDNN and Python take
for themselves is in neither.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write lines among the bars


class MemoryAccount:
    """Bytes that are allocated inside of `with`, less those given back of them.

    Attributes:
        peak: once it is over, the largest sum while `measured` was open.
    """

    _MARK = "memory_account.measured"

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> "MemoryAccount":
        gc.collect()  # what is to be collected would be given back in the middle
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        return self

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Inside, the peak is looked for; once in an account."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self.before
        else:
            with record_function(self._MARK):
                yield

    def __exit__(self, *raised: Any) -> None:
        if self.device == "cuda":
            return
        self.profiler.__exit__(*raised)
        if raised[0] is not None:
            return
        profiler: Any = self.profiler.profiler
        events = profiler.kineto_results.events()
        (mark,) = [event for event in events if event.name() == self._MARK]
        allocated = 0
        for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()):
            before, allocated = allocated, allocated + event.nbytes()
            if event.start_ns() > mark.end_ns():
                break
            if event.start_ns() >= mark.start_ns():
                self.peak = max(self.peak, before, allocated)


def step_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batch: Callable[[], Any], device: str
) -> dict[str, int]:
    """Bytes of a training step at its fullest, on a micro-batch that finds gradients, as under accumulation.

    Args:
        model: that has made no step yet, so that all that steps leave behind is in the account.
        optimizer: likewise.
        micro_batch: one forward and backward pass.

    Returns:
        `peak`; of it `parameters` (with buffers), `gradients` and `optimizer`, which stay; and `activations`, the
        rest.
    """
    with MemoryAccount(device) as account:
        micro_batch()
        optimizer.step()
        with account.measured():
            micro_batch()
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        gradients = size(weight.grad for weight in model.parameters() if weight.grad is not None)
        moments = size(value for value in states if isinstance(value, Tensor))
        del states
    # The weights are no part of the account: threads that load them allocate what others give back.
    parameters = size([*model.parameters(), *model.buffers()])
    return {
        "peak": parameters + account.peak,
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": moments,
        "activations": account.peak - gradients - moments,
    }


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors' storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
