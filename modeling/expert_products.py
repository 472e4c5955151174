"""Experts gated by SiLU on the CPU, forward and backward: one expert's tokens after another's, a block at a time.

All that autograd keeps of a layer, beside its inputs, is the gate and up projections: the rest is computed again from
them, a block at a time in the cache. `E` experts, `N` tokens, `K` experts per token, `S = N*K` selections, `D` hidden
size, `F` expert width.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix_products import FEWEST_ROWS as ROWS
from .matrix_products import product

BLOCK = 1024
"""Most tokens that go through an expert at once."""
FEW = 32
"""Tokens for an expert, on average, up to which they go through whole layers rather than blocks; in fp32, whose blocks
go by the faster library."""
FILLED = 4
"""Rows of one product for all experts for each that holds a token, at most."""
# A process may hold this file several times: the package's own, and copies that travelled with weights.
NAMESPACE = re.sub(r"\W", "_", __name__)
silu, silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


class Block(NamedTuple):
    """Tokens that go through an expert at once."""

    expert: int
    first: bool
    last: bool
    """Whether this expert has no more before it, or after it."""
    start: int
    """Where they start among the selections by expert."""
    rows: int
    padded: int
    """`rows` rounded up, so that few shapes recur; the next block overwrites what is written beyond `rows`."""


def _sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The selections by expert, int64 `[S]`, and how many each expert has, `[E]`.

    Args:
        experts: int64 `[N, K]`; selections of expert `E`, which another rank holds, go to the end.
    """
    flat = experts.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)[:num_experts]


def blocks(loads: list[int]) -> Iterator[Block]:
    """The selections by expert, block by block, an expert's of one size or nearly."""
    start = 0
    for expert, load in enumerate(loads):
        parts = -(-load // BLOCK)
        for part in range(parts):
            begin, end = load * part // parts, load * (part + 1) // parts
            rows = end - begin
            yield Block(expert, part == 0, part == parts - 1, start + begin, rows, _padded(rows))
        start += load


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


class Matrices:
    """The experts' matrices `[E, n, m]` in the type that is computed in, one expert's after another's."""

    def __init__(self, matrices: Tensor, dtype: torch.dtype):
        self.matrices = matrices
        self.cast = None if matrices.dtype == dtype else torch.empty_like(matrices[0], dtype=dtype)

    def of(self, block: Block) -> Tensor:
        if self.cast is None:
            return self.matrices[block.expert]
        return self.cast.copy_(self.matrices[block.expert]) if block.first else self.cast


class MatrixGradients:
    """The gradient of the experts' matrices `[E, n, m]`, in one tensor; an expert's blocks are added up in fp32.

    Args:
        loads: tokens of each expert.
    """

    def __init__(self, matrices: Tensor, loads: list[int]):
        self.gradient = torch.empty_like(matrices)
        self.sum = torch.empty(0)
        for expert, load in enumerate(loads):
            if load == 0:
                self.gradient[expert] = 0

    def add(self, block: Block, output_gradient: Tensor, inputs: Tensor) -> None:
        """Add the product of two matrices, of `padded` rows each."""
        part = product(output_gradient.T, inputs)
        if not block.first:
            self.sum += part
        elif block.last:
            self.sum = part
        else:
            self.sum = part.to(torch.promote_types(part.dtype, torch.float32))
        if block.last:
            self.gradient[block.expert] = self.sum


def gated_experts(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    dtype: torch.dtype,
    training: bool,
) -> Tensor:
    """Weighted sum of each token's experts, `down(silu(gate(x)) * up(x))`; the same bits at each call.

    Args:
        hidden: `[N, D]`.
        experts: int64 `[N, K]`; `E` marks what another rank computes.
        weights: `[N, K]`.
        gate_up: the experts' matrices `[E, 2F, D]`, gate before up.
        down: the experts' matrices `[E, D, F]`.
        dtype: the type to compute in.
        training: give the same bits with gradients and without, as checkpointing and the balancer's prepass need.

    Returns:
        `[N, D]`, in the type of `hidden`.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _operator(hidden, experts, weights, gate_up, down, dtype)[0]
    gate_up, down = gate_up.detach(), down.detach()  # whose views cost less
    if not training and len(hidden) == 1:
        return _one_token(hidden, experts, weights, gate_up, down, dtype)
    order, loads = _sort_by_expert(experts, len(gate_up))
    if not training and len(order) <= (FEW if dtype == torch.float32 else 2 * FEW) * len(gate_up):
        return _few(hidden, weights, gate_up, down, dtype, order, loads)
    return _blockwise(hidden, weights, gate_up, down, dtype, order, loads.tolist())


def _blockwise(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    dtype: torch.dtype,
    order: Tensor,
    loads: list[int],
    kept: Tensor | None = None,
) -> Tensor:
    """Args as of `gated_experts`; `kept` `[at least S + ROWS, 2F]` receives the gate and up projections by expert."""
    inputs, tokens, weights_by_expert = hidden.to(dtype), order // weights.shape[-1], weights.flatten()[order, None]
    longest = _padded(min(BLOCK, max(loads)))
    block_inputs, block_projected, block_hidden = (
        inputs.new_empty(longest, width) for width in (inputs.shape[-1], gate_up.shape[1], down.shape[-1])
    )
    output = torch.zeros_like(inputs, dtype=torch.promote_types(dtype, torch.float32))
    gate_ups, downs = Matrices(gate_up, dtype), Matrices(down, dtype)
    for block in blocks(loads):
        rows, padded, here = block.rows, block.padded, slice(block.start, block.start + block.rows)
        torch.index_select(inputs, 0, tokens[here], out=block_inputs[:rows])
        projected = block_projected[:padded] if kept is None else kept[block.start : block.start + padded]
        product(block_inputs[:padded], gate_ups.of(block).T, out=projected)
        gate, up = projected[:rows].chunk(2, dim=-1)
        silu(gate, out=block_hidden[:rows]).mul_(up).mul_(weights_by_expert[here])
        found = product(block_hidden[:padded], downs.of(block).T)[:rows]
        output.index_add_(0, tokens[here], found.to(output.dtype))
    return output.to(hidden.dtype)


def _few(
    hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype, order: Tensor, loads: Tensor
) -> Tensor:
    """As `_blockwise`, where experts have so few tokens that the number of operators counts, as in decoding."""
    ends = loads.cumsum(0, dtype=torch.int32)
    held = order[: int(ends[-1])]
    tokens = held // weights.shape[-1]
    if dtype == down.dtype == torch.bfloat16 and len(loads) <= len(order):
        most = int(loads.max())
        if most * len(loads) <= FILLED * len(order):
            return _side_by_side(hidden, weights, gate_up, down, held, loads, ends, most)
    if 8 * len(order) > len(loads) and down.dtype == dtype and fits_grouped_mm(down, dtype):
        multiply = partial(F.grouped_mm, offs=ends)
    else:
        multiply = partial(_one_by_one, loads=loads.tolist())
    gate, up = multiply(hidden.to(dtype)[tokens], gate_up.mT).chunk(2, dim=-1)
    found = multiply(F.silu(gate).mul_(up).mul_(weights.flatten()[held, None]), down.mT)
    output = torch.zeros_like(hidden, dtype=torch.promote_types(dtype, torch.float32))
    return output.index_add_(0, tokens, found.to(output.dtype)).to(hidden.dtype)


def _side_by_side(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    held: Tensor,
    loads: Tensor,
    ends: Tensor,
    most: int,
) -> Tensor:
    """As `_few`, by one product for all experts, each with room for the tokens of the busiest: oneDNN's bf16 products
    take longer to begin than to multiply so little."""
    experts = len(loads)
    shift = torch.arange(experts, device=loads.device) * most - (ends - loads)
    places = torch.arange(len(held), device=loads.device) + shift.repeat_interleave(loads)
    tokens = held // weights.shape[-1]
    inputs = gate_up.new_zeros(experts * most, hidden.shape[-1])
    inputs[places] = hidden.to(gate_up.dtype)[tokens]
    gate, up = torch.bmm(inputs.view(experts, most, -1), gate_up.mT).chunk(2, dim=-1)
    found = torch.bmm(F.silu(gate).mul_(up), down.mT).flatten(0, 1)[places].float()
    found.mul_(weights.flatten()[held, None])
    return torch.zeros_like(hidden, dtype=torch.float32).index_add_(0, tokens, found).to(hidden.dtype)


def _one_token(
    hidden: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype
) -> Tensor:
    """As `_blockwise`, for one token: nothing is to be sorted."""
    held = [(place, expert) for place, expert in enumerate(experts[0].tolist()) if expert < len(gate_up)]
    output = torch.zeros_like(hidden, dtype=torch.promote_types(dtype, torch.float32))
    if not held:
        return output.to(hidden.dtype)
    inputs = hidden.to(dtype)
    projected = torch.cat([F.linear(inputs, gate_up[expert].to(dtype)) for _, expert in held])
    gate, up = projected.chunk(2, dim=-1)
    weights = weights[0, [place for place, _ in held], None] if len(held) < len(weights[0]) else weights[0, :, None]
    activated = F.silu(gate).mul_(up).mul_(weights)
    for row, (_, expert) in zip(activated.split(1), held, strict=True):
        output += F.linear(row, down[expert].to(dtype))
    return output.to(hidden.dtype)


def _one_by_one(rows: Tensor, matrices: Tensor, loads: list[int]) -> Tensor:
    """The product of each expert's rows with its matrix, one operator each."""
    found = rows.new_empty(len(rows), matrices.shape[-1])
    chosen = [expert for expert, load in enumerate(loads) if load]
    sizes = [loads[expert] for expert in chosen]
    for expert, a, out in zip(chosen, rows.split(sizes), found.split(sizes), strict=True):
        torch.mm(a, matrices[expert].to(rows.dtype), out=out)
    return found


def fits_grouped_mm(matrices: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product takes them: no double, and rows of 16 bytes or a multiple."""
    return dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in matrices.shape[1:])


@torch.library.custom_op(f"{NAMESPACE}::gated_experts", mutates_args=(), device_types="cpu")
def _operator(
    hidden: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gated_experts`, and what its backward pass needs: `kept`, `order` and `loads`."""
    order, loads = _sort_by_expert(experts, len(gate_up))
    kept = hidden.new_empty(len(order) + ROWS, gate_up.shape[1], dtype=dtype)
    return _blockwise(hidden, weights, gate_up, down, dtype, order, loads.tolist(), kept), kept, order, loads


@_operator.register_fake
def _(
    hidden: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = hidden.new_empty(experts.numel() + ROWS, gate_up.shape[1], dtype=dtype)
    return torch.empty_like(hidden), kept, experts.new_empty(experts.numel()), experts.new_empty(len(gate_up))


@torch.library.custom_op(f"{NAMESPACE}::gated_experts_backward", mutates_args=(), device_types="cpu")
def _backward_operator(
    gradient: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    kept: Tensor,
    order: Tensor,
    loads: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of `hidden`, `weights`, `gate_up` and `down`: those needed, one after another."""
    of_hidden, of_weights, of_gate_up, of_down = needed
    dtype, counts = kept.dtype, loads.tolist()
    inputs, output_gradient = hidden.to(dtype), gradient.to(dtype)
    tokens, weights_by_expert = order // weights.shape[-1], weights.flatten()[order, None]
    longest, width = _padded(min(BLOCK, max(counts))), inputs.shape[-1]
    block_inputs, block_gradient = (inputs.new_empty(longest, width) for _ in range(2))
    block_silu, block_activated, block_inner = (inputs.new_empty(longest, down.shape[-1]) for _ in range(3))
    block_projected = inputs.new_empty(longest, gate_up.shape[1])
    gate_ups, downs = Matrices(gate_up, dtype), Matrices(down, dtype)
    hidden_gradient = torch.zeros_like(inputs, dtype=torch.promote_types(dtype, torch.float32)) if of_hidden else None
    weights_gradient = torch.zeros_like(weights).flatten() if of_weights else None
    gate_up_gradient = MatrixGradients(gate_up, counts) if of_gate_up else None
    down_gradient = MatrixGradients(down, counts) if of_down else None
    for block in blocks(counts):
        rows, padded, here = block.rows, block.padded, slice(block.start, block.start + block.rows)
        weight = weights_by_expert[here]
        gate, up = kept[here].chunk(2, dim=-1)
        torch.index_select(output_gradient, 0, tokens[here], out=block_gradient[:rows])
        silued = silu(gate, out=block_silu[:rows])
        activated, inner = block_activated[:rows], block_inner[:rows]
        if of_weights or of_down:
            torch.mul(silued, up, out=activated)
        if of_hidden or of_weights or of_gate_up:
            product(block_gradient[:padded], downs.of(block), out=block_inner[:padded])
        if weights_gradient is not None:
            weights_gradient[order[here]] = torch.linalg.vecdot(activated, inner).to(weights.dtype)
        if down_gradient is not None:
            activated.mul_(weight)
            block_gradient[rows:padded] = 0
            block_activated[rows:padded] = 0
            down_gradient.add(block, block_gradient[:padded], block_activated[:padded])
        if not (of_hidden or of_gate_up):
            continue
        of_gate, of_up = block_projected[:rows].chunk(2, dim=-1)
        torch.mul(inner.mul_(weight), silued, out=of_up)
        silu_backward(inner.mul_(up), gate, grad_input=of_gate)
        if gate_up_gradient is not None:
            torch.index_select(inputs, 0, tokens[here], out=block_inputs[:rows])
            block_inputs[rows:padded] = 0
            block_projected[rows:padded] = 0
            gate_up_gradient.add(block, block_projected[:padded], block_inputs[:padded])
        if hidden_gradient is not None:
            found = product(block_projected[:padded], gate_ups.of(block))[:rows]
            hidden_gradient.index_add_(0, tokens[here], found.to(hidden_gradient.dtype))
    return [
        *([] if hidden_gradient is None else [hidden_gradient.to(hidden.dtype)]),
        *([] if weights_gradient is None else [weights_gradient.view_as(weights)]),
        *([] if gate_up_gradient is None else [gate_up_gradient.gradient]),
        *([] if down_gradient is None else [down_gradient.gradient]),
    ]


@_backward_operator.register_fake
def _(
    gradient: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    kept: Tensor,
    order: Tensor,
    loads: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    inputs = hidden, weights, gate_up, down
    return [torch.empty_like(tensor) for tensor, wanted in zip(inputs, needed, strict=True) if wanted]


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("experts_implementation equipoise can be differentiated once; take eager for more")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _, weights, gate_up, down, _ = inputs
    ctx.save_for_backward(hidden, weights, gate_up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    of_hidden, _, *of_rest, _ = ctx.needs_input_grad
    needed = [of_hidden, *of_rest] if gradient is not None else [False] * 4
    found = iter(_backward_operator(gradient, *ctx.saved_tensors, needed) if any(needed) else [])
    of_hidden, *of_rest = (next(found) if wanted else None for wanted in needed)
    return of_hidden, None, *of_rest, None


_backward_operator.register_autograd(_refuse)
_operator.register_autograd(_backward, setup_context=_setup)
