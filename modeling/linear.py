"""Linear layers whose fp32 products on the CPU go to the faster library, in the backward pass too.

`D` hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import ACT2FN

from ..configuration.configuration_moe import MoEConfig
from .matrix_products import FEWEST_ROWS, product


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by `matrix_products` where they can take it: `[..., n]`, `[m, n]` and `[m]` to
    `[..., m]`."""
    if input.numel() < FEWEST_ROWS * weight.shape[-1]:  # asked first: in decoding every question counts
        return F.linear(input, weight, bias)
    plain = (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not is_traceable_wrapper_subclass(input)
        and not is_traceable_wrapper_subclass(weight)
    )
    return _Linear.apply(input, weight, bias) if plain else F.linear(input, weight, bias)


class MoELinear(nn.Linear):
    """`nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return linear(input, self.weight, self.bias)


class MoEMLP(nn.Module):
    """A gated MLP: what every token goes through."""

    def __init__(self, config: MoEConfig, intermediate_size: int | None = None):
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = MoELinear(config.hidden_size, width, bias=False)
        self.up_proj = MoELinear(config.hidden_size, width, bias=False)
        self.down_proj = MoELinear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        output = product(input.reshape(-1, input.shape[-1]), weight.mT)
        if bias is not None:
            output += bias
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = product(rows, weight).view(input.shape)
        if ctx.needs_input_grad[1]:
            of_weight = product(rows.mT, input.reshape(-1, input.shape[-1]))
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_input, of_weight, of_bias
