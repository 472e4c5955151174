"""Floating-point operations of a model, and what share of a device's peak they come to."""

import torch
from torch import nn

from ..configuration import MoEConfig
from ..modeling import MoEExperts

# Dense peaks of one device in bf16, in FLOP/s, from the makers' data sheets.
_PEAKS = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "MI300X": 1.307e15,
}


def training_flops_per_token(model: nn.Module, config: MoEConfig, block_size: int) -> float:
    """Of a forward and a backward pass, `6 N + 12 L H Q T` as in PaLM (arXiv 2204.02311, appendix B): `N` are the
    weights that multiply one token (of the experts only those selected; embeddings only where they are the output
    matrix), `T` is `block_size`, attention is counted without its causal mask.

    Recomputation under gradient checkpointing is not counted: it is no progress.

    Args:
        model: with whole weights, not yet sharded.
    """
    weights = 0.0
    for module in model.modules():
        if isinstance(module, MoEExperts):
            share = config.num_experts_per_tok / config.num_experts
            weights += share * sum(weight.numel() for weight in module.parameters())
        elif not isinstance(module, nn.Embedding):
            weights += sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() == 2)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * block_size
    return 6 * weights + attention


def peak_flops(device: torch.device, peak_teraflops: float | None, mixed_precision: str) -> float | None:
    """The peak of one device in FLOP/s: what was given, or what is known of the device; `None` if it is not."""
    if peak_teraflops is not None:
        return 1e12 * peak_teraflops
    if device.type != "cuda" or mixed_precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


__all__ = ["peak_flops", "training_flops_per_token"]
