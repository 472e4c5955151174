"""Counts and the figures drawn from them, against counting by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.balancing import (
    LoadCounts,
    count_selections,
    load_fraction,
    token_mask,
)

shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(2, 9), st.integers(0, 2**31)
)  # B, T, L, E, seed


@settings(max_examples=60)
@given(shapes)
def test_counts_equal_counting_by_hand(shape: tuple[int, int, int, int, int]) -> None:
    batch, length, layers, experts, seed = shape
    generator = torch.Generator().manual_seed(seed)
    per_token = int(torch.randint(1, experts + 1, (), generator=generator))
    selected = torch.rand(layers, batch * length, experts, generator=generator).topk(per_token).indices
    mask = torch.rand(batch * length, generator=generator) < 0.7

    by_hand = [[0] * experts for _ in range(layers)]
    for layer in range(layers):
        for token, choice in enumerate(selected[layer].tolist()):
            if mask[token]:
                for expert in choice:
                    by_hand[layer][expert] += 1
    load = count_selections(selected, experts, mask)
    assert load.tolist() == by_hand
    assert load.dtype == torch.long
    everything = count_selections(selected, experts, torch.ones_like(mask))
    assert torch.equal(count_selections(selected, experts), everything)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_packing_loses_nothing_and_sums_like_its_parts(layers: int, experts: int, measures: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> LoadCounts:
        shapes = [(layers, experts)] * 2 + [(layers, measures)] + [()] * 4
        return LoadCounts(*(torch.randint(0, 2**40, shape, generator=generator) for shape in shapes))

    one, other = draw(), draw()
    assert vars(LoadCounts.unpack(one.pack(), layers, experts)).keys() == vars(one).keys()
    total = LoadCounts.unpack(one.pack() + other.pack(), layers, experts)
    for name, value in vars(total).items():
        assert torch.equal(value, getattr(one, name) + getattr(other, name)), name
        assert torch.equal(value, getattr(one + other, name)), name


def test_counts_do_not_lose_increments() -> None:
    # In bf16, 256 + 1 is 256: an expert would stop counting there.
    selected = torch.zeros(70_001, 1, dtype=torch.long)
    assert count_selections(selected, 2).tolist() == [70_001, 0]


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=64))
def test_load_fraction_sums_to_one_whatever_k_is(load: list[int]) -> None:
    total = load_fraction(torch.tensor(load), torch.float64).sum().item()
    assert total == pytest.approx(1.0 if any(load) else 0.0)


def test_token_mask_from_every_kind_of_attention_mask() -> None:
    tokens = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    causal = torch.ones(4, 4).tril().bool()
    allowed = causal & tokens[:, None, :] & tokens[:, :, None]
    minimum, infinite = (
        torch.zeros(2, 1, 4, 4).masked_fill(~allowed[:, None], value)
        for value in (torch.finfo(torch.float32).min, -torch.inf)
    )
    for mask in (tokens, tokens.long(), tokens.float(), allowed[:, None], minimum, infinite):
        assert torch.equal(token_mask(mask, 2, 4), tokens)
    assert token_mask(None, 2, 4) is None
    # With a cache the mask also covers the past; this forward holds the last positions.
    assert torch.equal(token_mask(tokens, 2, 2), tokens[:, -2:])
    assert torch.equal(token_mask(allowed[:, None, -2:], 2, 2), tokens[:, -2:])
    with pytest.raises(ValueError, match=r"attention_mask must have 2 or 4 dimensions; got shape \(2, 4, 4\)"):
        token_mask(allowed, 2, 4)
