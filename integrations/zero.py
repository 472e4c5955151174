"""DeepSpeed ZeRO through Accelerate: what a loop must say before, and whole weights afterwards."""

from accelerate import Accelerator
from torch import Tensor, nn


def configure_zero(accelerator: Accelerator, *, micro_batch_size: int, max_grad_norm: float | None) -> bool:
    """Tell DeepSpeed what a loop would do itself without it; call it before `accelerator.prepare`.

    The step, and clipping with it, happens inside `accelerator.backward` of the last micro-batch. Left to itself
    Accelerate clips at 1.0 whatever the loop says, and DeepSpeed adds micro-batches' gradients up in bf16 under bf16.

    Args:
        accelerator: as launched; nothing happens unless it was launched with DeepSpeed.
        micro_batch_size: sequences of one rank in one forward pass.
        max_grad_norm: largest norm of the whole gradient; `None` or 0 clips nothing.

    Returns:
        Whether DeepSpeed is there.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return False
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["gradient_clipping"] = max_grad_norm or 0.0
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    return True


def zero_weights(model: nn.Module) -> dict[str, Tensor]:
    """The fp32 weights that DeepSpeed keeps, whole, and the model's buffers, by name; every rank must call it.

    For `save_pretrained(folder, state_dict=...)`: the model's own weights are rounded under bf16, and under ZeRO-3
    they are not there. Nothing is pickled on the way, as it would be in DeepSpeed's own checkpoints.

    Args:
        model: prepared by Accelerate, or what is inside.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    model = getattr(model, "module", model)
    weights = {name: safe_get_full_fp32_param(weight) for name, weight in model.named_parameters()}
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: value.detach().clone() for name, value in (weights | buffers).items()}
