"""RMSNorm whose backward pass on the CPU is written by hand: fewer passes over memory, and nothing kept but the input.

`D` hidden size, or head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm


class MoERMSNorm(Glm4MoeRMSNorm):
    """RMSNorm (arXiv 1910.07467), computed in at least fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`, in the wider of the types of `hidden_states` and the weight."""
        weight = self.weight
        if self.training:  # with gradient or, under reentrant checkpointing and in a prepass, without: the same digits
            plain = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
            if (
                plain
                and not is_traceable_wrapper_subclass(hidden_states)
                and not is_traceable_wrapper_subclass(weight)
            ):
                return _RMSNorm.apply(hidden_states, weight, self.variance_epsilon)
        elif type(hidden_states) is Tensor and hidden_states.dtype == weight.dtype and not torch.is_grad_enabled():
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        return super().forward(hidden_states)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast("cpu", enabled=False):
            squares = torch.linalg.vecdot(exact, exact)
        scale = squares.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()[..., None]
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).mul_(weight).to(torch.promote_types(hidden.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed, weight_exact = hidden * scale, weight.to(scale.dtype)
        product = gradient * normed
        of_weight = product.flatten(0, -2).sum(0)
        with torch.autocast("cpu", enabled=False):
            along = (product @ weight_exact).div_(hidden.shape[-1])[..., None]
        of_hidden = torch.mul(gradient, weight_exact, out=product).sub_(normed.mul_(along)).mul_(scale)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None
