"""Following an optimizer: the Balancer closes its global batch whenever a real step is made."""

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..balancing import Balancer


def follow(balancer: Balancer, optimizer: Any) -> RemovableHandle:
    """Call `balancer.after_optimizer_step()` after each step of an optimizer, so that the loop need not.

    For a Balancer that was made without `parameters`. With them, as `MoEForCausalLM` makes its own, it follows by
    itself.

    A step that a gradient scaler skips moves no bias. A *fused* optimizer is called on such a step too, and says so
    in its `found_inf`, which is then read. An *unfused* one is not called at all, so that nothing here can know: a
    loop with `torch.amp.GradScaler` and an unfused optimizer calls `balancer.after_optimizer_step(skipped=True)`
    itself when the scale has fallen; otherwise the skipped batch's counts merge into the next batch's.

    Args:
        balancer: of the model that is trained.
        optimizer: a torch optimizer, or the one that Accelerate made of it.

    Returns:
        A handle; `remove()` ends it.

    Raises:
        TypeError: DeepSpeed's optimizer, which steps inside the backward pass, or anything that is no optimizer.
    """
    unwrapped = optimizer
    while not isinstance(unwrapped, torch.optim.Optimizer) or hasattr(unwrapped, "accelerator_state"):
        # Accelerate's wrapper is an Optimizer by inheritance, with no hooks of its own.
        unwrapped = getattr(unwrapped, "optimizer", None)
        if unwrapped is None:
            raise TypeError(f"optimizer must be a torch optimizer; got {type(optimizer).__name__}")
    if "deepspeed" in type(optimizer).__module__ or "DeepSpeed" in type(optimizer).__name__:
        raise TypeError(
            "optimizer must not be DeepSpeed's, which may step in parts and inside the backward pass: call "
            "balancer.after_optimizer_step() under `accelerator.sync_gradients and not "
            f"accelerator.optimizer_step_was_skipped`; got {type(optimizer).__name__}"
        )

    def close(stepped: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(stepped, "found_inf", None)
        balancer.after_optimizer_step(skipped=False if found_inf is None else found_inf)

    return unwrapped.register_step_post_hook(close)
