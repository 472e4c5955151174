"""Rotary embeddings whose training on the CPU is written by hand: three passes over a sequence in the cache, and
nothing kept but the angles.

`B` sequences, `T` positions, `H` heads, `D` head width, `R` at most `D` of which are rotated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as apply_partial_rotary_pos_emb
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (RoFormer, arXiv 2104.09864, section 3.2.2) of queries and keys `[B, H, T, D]`; as in
    Transformers, it is the halves of a head that are paired.

    Args:
        cos: `[B or 1, T, R]`; what is beyond `R` in a head stays.
        sin: likewise.
        training: with gradient or without, the same digits. Under autocast the outcome is in its type, to which
            attention brings it anyway.

    Returns:
        Both, `[B, H, T, D]`.
    """
    inputs = query, key, cos, sin
    if (
        training
        and query.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not any(is_traceable_wrapper_subclass(tensor) for tensor in inputs)
    ):
        return _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)
    if cos.shape[-1] < query.shape[-1]:
        return apply_partial_rotary_pos_emb(query, key, cos, sin)
    return apply_rotary_pos_emb(query, key, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        dtype = torch.promote_types(states.dtype, cos.dtype)
        if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        return _rotated(states, cos, sin, dtype, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The transpose of x -> cos * x + sin * turned(x), where both halves have their own sines.
        half = sin.shape[-1] // 2
        return _rotated(gradient, cos, sin.roll(half, -1), ctx.dtype, 1), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
    """`cos * x + sin * turned(x)`, where the first half of `turned(x)` is the second of `x` times `sign`, and the
    second half is the first times `-sign`; in memory as the projections are, `[B, T, H, D]`."""
    rotated, exact = cos.shape[-1], torch.promote_types(torch.promote_types(states.dtype, cos.dtype), torch.float32)
    half, cos, sin = rotated // 2, cos.to(exact)[:, :, None], sin.to(exact)[:, :, None]
    states = states.transpose(1, 2)
    output = torch.empty(states.shape, dtype=dtype)
    unrounded = None if dtype == exact else torch.empty(states.shape[1:], dtype=exact)
    for sequence, part in enumerate(states):
        cosines, sines, part = cos[sequence % len(cos)], sin[sequence % len(sin)], part.to(exact)
        found = output[sequence] if unrounded is None else unrounded
        torch.mul(part[..., :rotated], cosines, out=found[..., :rotated])
        found[..., :half].addcmul_(part[..., half:rotated], sines[..., :half], value=sign)
        found[..., half:rotated].addcmul_(part[..., :half], sines[..., half:], value=-sign)
        if rotated < part.shape[-1]:
            found[..., rotated:] = part[..., rotated:]
        if unrounded is not None:
            output[sequence] = unrounded
    return output.transpose(1, 2)
