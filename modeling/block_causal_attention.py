"""Causal attention on the CPU, in blocks of queries: `attn_implementation="block_causal"`, for any decoder.

A block of queries meets the keys that come before its end and no others: half the products of a full square, and with
packed documents none of another document's blocks. Nothing of the size `T x T` is kept: the backward pass computes a
block's probabilities again. What this does not do goes to Transformers' `sdpa`: dropout, padding, steps of decoding,
other devices, compiled graphs.

`B` sequences, `T` positions, `H` query heads, `G` query heads per key head, `D` head width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .matrix_products import product

BLOCK_CAUSAL = "block_causal"

_ROWS = 256
"""Rows of a block, positions times `G`: a block and its keys should stay in a processor's cache."""
_FEWEST_POSITIONS = 64


def block_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As an attention function of Transformers: `query` `[B, H, T, D]`, `key` and `value` with `H / G` heads.

    Args:
        attention_mask: `None` where attention is causal and no more; from `block_causal_mask`, int64 `[B, T]`; or any
            mask that `sdpa` takes.

    Returns:
        `[B, T, H, D]`, and `None`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    starts = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    if (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16, torch.float64)
        and query.dtype == key.dtype == value.dtype
        and 1 < query.shape[2] == key.shape[2]
        and causal
        and (attention_mask is None or starts is not None)
        and not dropout
        and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        and not torch.compiler.is_compiling()
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _BlockCausalAttention.apply(query, key, value, starts, scale), None
    if starts is not None:
        attention_mask = _dense(starts)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def block_causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """As a mask function of Transformers.

    Returns:
        int64 `[B, T]` on the CPU where documents are packed and nothing else is masked: the position at which each
        position's document starts. Otherwise what `sdpa` takes.
    """
    if (
        not allow_is_causal_skip  # or there are no documents
        and attention_mask is None
        and local_size is None
        and not use_vmap  # or it is a function of somebody's own
        and q_length == kv_length > 1
        and torch.device(device).type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        starts = _document_starts(mask_function, batch_size, q_length)
        if starts is not None:
            return starts
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _document_starts(mask_function: Callable, batch_size: int, length: int) -> Tensor | None:
    """Where documents start `[B, T]`, if the mask is causal within them; `None` if it is another, or there is one."""
    sequence, position = torch.arange(batch_size)[:, None], torch.arange(length)[None]

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(sequence, torch.tensor(0), query, key).expand(batch_size, -1)

    before, after = position[:, :-1], position[:, 1:]
    starts = torch.where(sees(after, before), 0, after)
    starts = torch.nn.functional.pad(starts, (1, 0)).cummax(-1).values
    other = sees(before, after).any() or not sees(position, starts).all()
    return None if other or not starts.any() else starts


def _dense(starts: Tensor) -> Tensor:
    """The boolean mask `[B, 1, T, T]`, true where a query sees a key."""
    position = torch.arange(starts.shape[1], device=starts.device)
    causal = position <= position[:, None]
    return (causal & (position >= starts[..., None]))[:, None]


class _BlockCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, starts)
        ctx.scale = scale
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1])
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(query, key, value, starts, scale):
                block.of(output.transpose(1, 2)).copy_(
                    block.ungrouped(block.multiply(block.probabilities(), block.value))
                )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, starts = ctx.saved_tensors
        # As the projections before them lie in memory: [B, T, heads, D].
        query_gradient = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        exact = torch.promote_types(query.dtype, torch.float32)
        # Transposed: what is turned round for the products are a block's queries, not its probabilities.
        key_gradient = key.new_zeros(*key.shape[:2], key.shape[3], key.shape[2], dtype=exact)
        value_gradient = value.new_zeros(*value.shape[:2], value.shape[3], value.shape[2], dtype=exact)
        gradient = gradient.transpose(1, 2)
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(query, key, value, starts, ctx.scale):
                multiply, keys = block.multiply, block.keys
                probabilities, of_output = block.probabilities(), block.grouped(block.of(gradient))
                value_gradient[block.key_heads][..., keys] += multiply(of_output.mT.contiguous(), probabilities)
                of_scores = multiply(of_output, block.value.mT)
                torch._softmax_backward_data(of_scores, probabilities, -1, query.dtype, grad_input=of_scores)
                of_query = block.ungrouped(multiply(of_scores, block.key))
                torch.mul(of_query, ctx.scale, out=block.of(query_gradient))
                key_gradient[block.key_heads][..., keys] += multiply(block.query.mT.contiguous(), of_scores)
        return query_gradient, key_gradient.mT.to(key.dtype), value_gradient.mT.to(value.dtype), None, None


class _Block:
    """Some positions' queries of one sequence, and the keys that they see.

    Of one key head with its `G` query heads, and all there is has two dimensions: so fp32 goes to the faster product.
    Of all heads in the other types, with the key heads as first dimension: fewer and larger calls.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sequence: int,
        heads: slice | int,
        positions: slice,
        keys: slice,
        hidden: Tensor,
        scale: float,
    ) -> None:
        self.groups = query.shape[1] // key.shape[1]
        self.multiply = product if isinstance(heads, int) else torch.bmm
        self.key_heads = (sequence, heads)
        self.sequence, self.heads, self.positions, self.keys, self.hidden = sequence, heads, positions, keys, hidden
        self.query = self.grouped(self.of(query) * scale)
        self.key, self.value = key[self.key_heads][..., keys, :], value[self.key_heads][..., keys, :]

    def of(self, tensor: Tensor) -> Tensor:
        """This block's part of `[B, H, T, D]`: `[G, positions, D]`, or `[heads, G, positions, D]`."""
        by_key_head = tensor[self.sequence].unflatten(0, (-1, self.groups))
        return by_key_head[self.heads][..., self.positions, :]

    def grouped(self, part: Tensor) -> Tensor:
        """`[..., G * positions, D]`: the query heads of a key head side by side, so that keys are not repeated."""
        return part.flatten(-3, -2)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """`[..., G, positions, D]`."""
        return rows.unflatten(-2, (self.groups, -1))

    def probabilities(self) -> Tensor:
        """`[..., G * positions, keys]`"""
        scores = self.multiply(self.query, self.key.mT)
        width = self.hidden.shape[-1]
        self.ungrouped(scores)[..., scores.shape[-1] - width :].add_(self.hidden)
        return torch._softmax(scores, -1, False, out=scores)


def _blocks(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, scale: float) -> Iterator[_Block]:
    batch, heads, length, _ = query.shape
    key_heads = key.shape[1]
    size = max(_FEWEST_POSITIONS, _ROWS * key_heads // heads)
    key, value = key.contiguous(), value.contiguous()
    future = torch.full((size, size), -torch.inf, dtype=query.dtype).triu(1)
    units = range(key_heads) if query.dtype == torch.float32 else [slice(None)]
    firsts = range(0, length, size)
    # A few of the positions say all: a block's first for the keys it needs, its last for whether one document has all.
    limits: list[list[list[int]]] = []
    if starts is not None:
        lasts = [min(first + size, length) - 1 for first in firsts]
        limits = torch.stack([starts[:, list(firsts)], starts[:, lasts]], dim=-1).tolist()
    for sequence in range(batch):
        for number, first in enumerate(firsts):
            end = min(first + size, length)
            first_key, hidden = 0, future[: end - first, : end - first]
            if starts is not None:
                first_start, last_start = limits[sequence][number]
                first_key = first_start // size * size  # few different sizes, for which there is code already
                if last_start > first_key:
                    own = starts[sequence, first:end, None]
                    position = torch.arange(first_key, end)
                    seen = (position >= own) & (position <= torch.arange(first, end)[:, None])
                    hidden = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
            for unit in units:
                yield _Block(
                    query,
                    key,
                    value,
                    sequence=sequence,
                    heads=unit,
                    positions=slice(first, end),
                    keys=slice(first_key, end),
                    hidden=hidden,
                    scale=scale,
                )


ALL_ATTENTION_FUNCTIONS.register(BLOCK_CAUSAL, block_causal_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCK_CAUSAL, block_causal_mask)
