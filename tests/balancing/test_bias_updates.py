"""The sign rule against its one line in the paper."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.balancing import SignUpdate


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=32), st.integers(0, 2**31))
def test_sign_rule(load: list[int], seed: int) -> None:
    bias = torch.randn(len(load), generator=torch.Generator().manual_seed(seed))
    bias -= bias.mean()
    updated = SignUpdate().update(bias, torch.tensor(load), 0.01, None)
    mean = sum(load) / len(load)
    paper = torch.tensor([b + 0.01 * ((mean > n) - (mean < n)) for b, n in zip(bias.tolist(), load, strict=True)])
    # Only differences between biases select; the common part is taken away so that it cannot drift.
    torch.testing.assert_close(updated, paper - paper.mean(), atol=1e-6, rtol=0)
    assert updated.dtype == torch.float32


def test_small_updates_are_not_lost() -> None:
    # In bf16, 0.5 + 0.001 is 0.5.
    bias = torch.tensor([0.5, -0.5])
    assert SignUpdate().update(bias, torch.tensor([0, 2]), 1e-3, None)[0].item() > 0.5
