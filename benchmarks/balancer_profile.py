"""What a Balancer's own calls take of a step: part by part, and operator by operator."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from equipoise.balancing import Balancer

PARTS = ("observe", "loss", "loss_backward", "after_optimizer_step", "exchange")
"""Three calls, the backward pass from the loss to the router logits, and `exchange`, contained in the calls: packing
the counts, sending them and waiting for the other ranks."""

PROFILED_STEPS = 3


def profile_balancer(
    balancer: Balancer, step: Callable[[], Any], synchronize: Callable[[], None], steps: int
) -> dict[str, dict[str, float]]:
    """Measures a Balancer in steps made for it. Every rank must take part.

    Args:
        balancer: its methods are replaced by ones that take the time.
        step: makes one optimizer step with it.
        synchronize: waits for the device, before and after each part; so a part that would be hidden is not.
        steps: how many to measure, after a first that has no batch before it.

    Returns:
        `parts_ms`: median over the steps of this rank's milliseconds in each of `PARTS`. `operators_ms`: the
        same for each operator inside the parts, on the CPU, largest first, over `PROFILED_STEPS` more steps under
        torch's profiler, which slows them. What lies between operators is there as `exchange` (the waiting) and
        `python`.
    """
    seconds = _watch(balancer, synchronize)
    measured: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(steps + 1):
        seconds.clear()
        step()
        if number > 0:
            for part in PARTS:
                measured[part].append(1000 * seconds[part])
    profiled = [_operators(step) for _ in range(PROFILED_STEPS)]
    operators = {what: float(np.median([found[what] for found in profiled])) for what in set().union(*profiled)}
    return {
        "parts_ms": {part: float(np.median(values)) for part, values in measured.items()},
        "operators_ms": dict(sorted(operators.items(), key=lambda item: -item[1])),
    }


def _operators(step: Callable[[], Any]) -> Counter[str]:
    """Milliseconds of CPU of each operator inside the parts, in one step under torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    operators: Counter[str] = Counter()
    for event in profiler.events() or ():
        part = event
        while part is not None and not part.name.startswith("balancer."):
            part = part.cpu_parent
        if part is not None:
            between = "exchange" if part.name == "balancer.exchange" else "python"
            operators[between if event is part else event.name] += event.self_cpu_time_total / 1000
    return operators


def _watch(balancer: Balancer, synchronize: Callable[[], None]) -> dict[str, float]:
    """Replaces a Balancer's methods; the seconds spent in each part then add up in what is returned."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            with record_function(f"balancer.{part}"):
                result = call(*args, **kwargs)
                synchronize()
            seconds[part] += time.perf_counter() - start
            return result

        return wrapper

    loss, backward = timed("loss", balancer.loss), timed("loss_backward", torch.autograd.grad)

    def loss_and_backward(observed: Any, *args: Any) -> Any:
        result = loss(observed, *args)
        if result.total.requires_grad:
            # Once more, and by itself: within the model's backward pass nothing tells it from the rest.
            backward(result.total, observed.router_logits, retain_graph=True)
        return result

    methods = {
        balancer: {
            "observe": timed("observe", balancer.observe),
            "loss": loss_and_backward,
            "after_optimizer_step": timed("after_optimizer_step", balancer.after_optimizer_step),
        },
        balancer.synchronizer: {
            name: timed("exchange", getattr(balancer.synchronizer, name))
            for name in ("start", "wait", "sum_over_ranks")
        },
    }
    for owner, replacements in methods.items():
        for name, method in replacements.items():
            setattr(owner, name, method)
    return seconds
