"""Attention in causal blocks, against Transformers' own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.modeling import BLOCK_CAUSAL
from equipoise.modeling.block_causal_attention import block_causal_attention, block_causal_mask

Make = Callable[..., MoEConfig]


def layer(groups: int) -> nn.Module:
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, groups
    return module


def attended(
    attend: Callable, inputs: list[Tensor], mask: Tensor | None, dtype: torch.dtype, gradient: Tensor
) -> list[Tensor]:
    """Output, and the gradients of query, key and value."""
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in inputs]
    groups = inputs[0].shape[1] // inputs[1].shape[1]
    output, _ = attend(layer(groups), *leaves, mask, scaling=0.3)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(dtype))]


def problem(
    batch: int, heads: int, key_heads: int, length: int, widths: tuple[int, int], seed: int
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, laid out as projections leave them, and a gradient, in float64."""
    random = torch.Generator().manual_seed(seed)

    def normal(count: int, width: int) -> Tensor:
        return torch.randn(batch, length, count, width, generator=random, dtype=torch.float64)

    width, value_width = widths
    inputs = [normal(heads, width), normal(key_heads, width), normal(key_heads, value_width)]
    return [tensor.transpose(1, 2) for tensor in inputs], normal(heads, value_width)


def packed(batch: int, length: int, lengths: list[int]) -> Tensor:
    """Position ids of documents of such lengths, over and over, each sequence's beginning one later."""
    flat = torch.cat([torch.arange(number) for number in lengths * (length + batch)])
    return torch.stack([flat[row : row + length] for row in range(batch)])


def masks(position_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Ours and the stock one."""
    config = LlamaConfig(hidden_size=8, num_attention_heads=1)
    made = []
    for name in (BLOCK_CAUSAL, "sdpa"):
        config._attn_implementation = name
        embedded = torch.zeros(*position_ids.shape, 8)
        made.append(create_causal_mask(config, embedded, None, None, position_ids=position_ids))
    return made[0], made[1]


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([2, 63, 64, 130, 257, 300]),
    widths=st.sampled_from([(4, 4), (6, 3), (1, 9)]),
    documents=st.none() | st.lists(st.integers(1, 200), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 100),
)
def test_it_is_what_the_stock_attention_computes(
    batch: int,
    key_heads: int,
    groups: int,
    length: int,
    widths: tuple[int, int],
    documents: list[int] | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    inputs, gradient = problem(batch, key_heads * groups, key_heads, length, widths, seed)
    ours, stock = (None, None) if documents is None else masks(packed(batch, length, documents))
    expected = attended(sdpa_attention_forward, inputs, stock, torch.float64, gradient)
    found = attended(block_causal_attention, inputs, ours, dtype, gradient)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == theirs.shape
        torch.testing.assert_close(
            mine.double(), theirs, rtol=tolerance, atol=tolerance * (1 + theirs.abs().max().item())
        )


def test_in_bf16_it_is_as_near_to_the_truth_as_attention_by_hand() -> None:
    """Scores are rounded to bf16, as eager attention's are and those of a fused kernel are not."""
    inputs, gradient = problem(2, 4, 2, 300, (32, 32), 0)
    exact = attended(sdpa_attention_forward, inputs, None, torch.float64, gradient)

    def eager(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float
    ) -> tuple[Tensor, None]:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        future = torch.full((300, 300), -torch.inf, dtype=query.dtype).triu(1)
        weights = ((query @ key.mT) * scaling + future).float().softmax(-1).to(query.dtype)
        return (weights @ value).transpose(1, 2), None

    by_hand = attended(eager, inputs, None, torch.bfloat16, gradient)
    mine = attended(block_causal_attention, inputs, None, torch.bfloat16, gradient)
    for found, other, truth in zip(mine, by_hand, exact, strict=True):
        error, allowed = ((tensor.double() - truth).norm() / truth.norm() for tensor in (found, other))
        assert error < 1.1 * allowed
        assert error < 0.02


def test_autocast_is_obeyed() -> None:
    inputs, gradient = problem(1, 2, 1, 70, (8, 8), 0)
    rounded = attended(block_causal_attention, inputs, None, torch.bfloat16, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        single = [tensor.float() for tensor in inputs]
        output, _ = block_causal_attention(layer(2), *single, None, scaling=0.3)
        exact, _ = block_causal_attention(layer(2), *inputs, None, scaling=0.3)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, rounded[0])
    assert exact.dtype == torch.float64


def test_extreme_scores_stay_finite() -> None:
    inputs, gradient = problem(1, 2, 2, 130, (8, 8), 0)
    large = [1e4 * inputs[0], *inputs[1:]]
    for tensor in attended(block_causal_attention, large, None, torch.float32, gradient):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("change", ["dropout", "padding", "step of decoding", "not causal", "float16"])
def test_what_it_does_not_do_is_sdpas(change: str) -> None:
    inputs, _ = problem(2, 4, 2, 70, (8, 8), 0)
    query, key, value = (tensor.float() for tensor in inputs)
    mask, arguments = None, {}
    if change == "dropout":
        arguments = {"dropout": 0.5}
    elif change == "padding":
        real = torch.arange(70) < torch.tensor([[70], [40]])
        mask = block_causal_mask(2, 70, 70, attention_mask=real)
        assert mask is not None
        assert mask.shape == (2, 1, 70, 70)
    elif change == "step of decoding":
        query = query[:, :, -1:]
    elif change == "not causal":
        arguments = {"is_causal": False}
    else:
        query, key, value = query.half(), key.half(), value.half()
    results = []
    for attend in (block_causal_attention, sdpa_attention_forward):
        torch.manual_seed(0)
        results.append(attend(layer(2), query, key, value, mask, **arguments)[0])
    assert torch.equal(*results)


def test_dropout_keeps_documents_apart() -> None:
    """It goes to another function, which must not take the starts of documents for a mask of its own."""
    inputs, _ = problem(1, 1, 1, 90, (4, 4), 0)
    starts, dense = masks(packed(1, 90, [40]))
    torch.manual_seed(0)
    mine, _ = block_causal_attention(layer(1), *inputs, starts, dropout=0.5)
    torch.manual_seed(0)
    stock, _ = sdpa_attention_forward(layer(1), *inputs, dense, dropout=0.5)
    assert torch.equal(mine, stock)


def test_where_documents_start_is_told_from_every_other_mask() -> None:
    starts, _ = masks(torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]))
    assert starts is not None
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6]
    assert masks(torch.arange(6)[None]) == (None, None)  # one document: nothing but causal
    shapes = {"batch_size": 1, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False}
    window = block_causal_mask(**shapes, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 3))
    both_ways = block_causal_mask(**shapes, mask_function=lambda b, h, q, k: (k <= q) | ((q < 2) & (k < 2)))
    for mask in (window, both_ways, block_causal_mask(**shapes)):
        assert mask is not None
        assert mask.dim() == 4


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["ours", "Llama", "Qwen3-MoE"])
def test_models_train_alike_under_both(tiny_config: Make, family: str, checkpointing: bool | None) -> None:
    """Packed documents too: a model hands a mask from its decoder to its layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0}
    if family == "ours":
        model: Any = MoEForCausalLM(tiny_config())
    elif family == "Llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids = torch.randint(2, 64, (2, 100))
    losses, gradients = [], []
    for name in ("sdpa", BLOCK_CAUSAL):
        model.set_attn_implementation(name)
        model.train().zero_grad()
        loss = model(ids, position_ids=packed(2, 100, [30, 7, 50]), labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_generation_is_the_same(tiny_config: Make) -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config()).eval()
    ids = torch.randint(2, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    generated = []
    for name in ("sdpa", BLOCK_CAUSAL):
        model.set_attn_implementation(name)
        generated.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(*generated)


class Kept(TorchDispatchMode):
    """The largest tensor that anything makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in tensors]
        self.elements = max([self.elements, *made])
        return result


def test_no_square_of_the_length_is_ever_there() -> None:
    length = 1024
    inputs, gradient = problem(1, 2, 2, length, (4, 4), 0)
    with Kept() as kept:
        attended(block_causal_attention, inputs, None, torch.float32, gradient)
    assert kept.elements <= 256 * length
