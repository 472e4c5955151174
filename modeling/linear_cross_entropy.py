"""Cross-entropy of a linear head, without the logits of all tokens at once.

A chunk of tokens at a time goes through the head, to its loss and straight on to its gradients, so that what the
backward pass would need is not kept but is there already: gradients of hidden states and of the head.

`N` tokens, `D` hidden size, `V` vocabulary.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .matrix_products import product

CHUNK = 256
"""Tokens whose logits are there at once: enough for fast products, few enough for a processor's cache."""


@torch.compiler.disable
def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: Tensor | float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits `hidden_states @ weight.T`, and of each token.

    Products are in the weight's type, or autocast's where it is on; logarithms, and the sum that is the weight's
    gradient, in at least fp32. It can be differentiated once.

    Args:
        hidden_states: `[N, D]`.
        weight: of the head, `[V, D]`.
        targets: int64 `[N]`.
        num_items: what the sum over tokens is divided by.
        ignore_index: the target of tokens that bear no loss; on the CPU they are not computed.
        z_loss: coefficient of the squared logarithm of the softmax's denominator, which is added to each token's loss
            (PaLM, arXiv 2204.02311, section 5).

    Returns:
        The loss, a scalar; and without gradient each token's cross-entropy `[N]`, 0 where it bears none: both in at
        least fp32.
    """
    device, dtype = hidden_states.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    divisor = torch.as_tensor(num_items, device=hidden_states.device)
    return _LinearCrossEntropy.apply(hidden_states, weight, targets, divisor, ignore_index, z_loss, dtype)


def liger_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor) -> Tensor:
    """The loss alone, by Liger's kernel."""
    fused = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    summed = fused(hidden_states.to(weight.dtype), weight, targets, reduction="sum")
    return summed.float() / num_items


def liger_is_there(device: torch.device) -> bool:
    """Whether Liger's kernels are installed, and made for such a device."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None


def plain_weight(head: nn.Module) -> Tensor | None:
    """The weight `[V, D]` of a head that is a product with it and nothing else.

    Returns:
        `None` where an adapter wraps it, it is sharded, quantized or elsewhere, or has been given another forward.
    """
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return None
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features) and not is_traceable_wrapper_subclass(weight)
    return weight if whole and weight.device.type != "meta" else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: Tensor,
        ignore_index: int,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(dtype, torch.float32)
        multiply = product if hidden_states.device.type == "cpu" else torch.mm
        narrow = dtype != exact
        if narrow:  # Chunks share the memory of their products: fresh pages would cost more than the products.
            shape = min(CHUNK, len(targets)), len(weight)
            rounded, logits_exact = (weight.new_empty(shape, dtype=kind) for kind in (dtype, exact))
            turned = tuple(weight.shape[::-1]) if wants_weight else (0, 0)
            of_weight, of_weight_exact = (weight.new_empty(turned, dtype=kind) for kind in (dtype, exact))
        head, share = weight.to(dtype), divisor.to(exact).reciprocal()
        losses = torch.zeros(targets.shape, dtype=exact, device=targets.device)
        loss = losses.new_zeros(())
        hidden_gradient = weight_gradient = None
        if wants_hidden:
            hidden_gradient = torch.zeros_like(hidden_states)
        if wants_weight:
            # Transposed: what is turned round for the product are a chunk's hidden states, not its logits.
            weight_gradient = weight.new_zeros(weight.shape[::-1], dtype=torch.promote_types(weight.dtype, exact))
        with torch.autocast(hidden_states.device.type, enabled=False):
            for rows in _chunks(targets, ignore_index):
                states, target = hidden_states[rows].to(dtype), targets[rows]
                bears_loss = target.ne(ignore_index)[:, None]
                target = target[:, None].where(bears_loss, 0)
                if narrow:
                    of_chunk = rounded[: len(states)]
                    logits = logits_exact[: len(states)].copy_(torch.mm(states, head.mT, out=of_chunk))
                else:
                    logits = multiply(states, head.mT)
                of_target = logits.gather(1, target)
                largest = logits.amax(-1, keepdim=True)
                probabilities = torch._softmax(logits, -1, False, out=logits)
                log_denominator = largest - probabilities.amax(-1, keepdim=True).log()
                token_losses = (log_denominator - of_target) * bears_loss
                losses[rows] = token_losses.squeeze(1)
                loss += token_losses.sum()
                if z_loss:
                    loss += z_loss * (log_denominator.square() * bears_loss).sum()
                    probabilities.mul_(1 + 2 * z_loss * log_denominator)
                if not (wants_hidden or wants_weight):
                    continue
                gradient = probabilities.scatter_add_(1, target, torch.full_like(of_target, -1))
                if narrow:
                    gradient = of_chunk.copy_(gradient)
                if hidden_gradient is not None:
                    of_states = multiply(gradient, head).to(exact) * (bears_loss * share)
                    hidden_gradient[rows] = of_states.to(hidden_gradient.dtype)
                if weight_gradient is not None:
                    # The share comes after the product: before, fp16 might lose it.
                    inputs = (states * bears_loss).mT.contiguous()
                    if narrow:
                        found = of_weight_exact.copy_(torch.mm(inputs, gradient, out=of_weight))
                    else:
                        found = multiply(inputs, gradient)
                    weight_gradient.addcmul_(found.to(weight_gradient.dtype), share.to(weight_gradient.dtype))
                    del found
                del logits, probabilities, gradient  # before there are the next chunk's
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mT.to(weight.dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.mark_non_differentiable(losses)
        return loss * share, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # Mostly 1, and then a pass over them is saved; on other devices the question would wait for them.
        if gradient.device.type != "cpu" or gradient != 1:
            gradients = tuple(None if saved is None else saved * gradient.to(saved.dtype) for saved in gradients)
        return *gradients, None, None, None, None, None


def _chunks(targets: Tensor, ignore_index: int) -> list[Any]:
    """What picks the tokens of each chunk. On devices that work ahead all tokens: to know which would be to wait."""
    if targets.device.type != "cpu":
        return [slice(start, start + CHUNK) for start in range(0, len(targets), CHUNK)]
    return list(targets.ne(ignore_index).nonzero().squeeze(1).split(CHUNK))
