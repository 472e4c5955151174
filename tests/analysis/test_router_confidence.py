"""Router confidence against scipy and numpy, token by token."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from equipoise.analysis.router_confidence import BINS, RouterConfidence
from equipoise.analysis.routing_trace import RoutedBatch


def windows(domains: list[str]) -> Dataset:
    return Dataset.from_list([{"domain": name} for name in domains])


def routed(logits: torch.Tensor, selected: torch.Tensor, mask: torch.Tensor, scoring_func: str) -> RoutedBatch:
    """`logits` [B*T, E], `selected` [B*T, K]: one layer."""
    return RoutedBatch(
        rows=torch.arange(len(mask)), input_ids=torch.zeros_like(mask).long(), mask=mask, router_logits=(logits,),
        selected_experts=(selected,), scoring_func=scoring_func,
    )  # fmt: skip


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 3), st.sampled_from(["softmax", "sigmoid"]))
def test_measures_match_numpy(seed: int, experts: int, chosen: int, scoring_func: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = min(chosen, experts)
    mask = torch.rand(4, 5, generator=generator) < 0.8
    mask[:, 0] = True
    logits = 2 * torch.randn(20, experts, generator=generator)
    # A bias that overrules the scores of some.
    selected = (logits + torch.randn(20, experts, generator=generator)).topk(chosen).indices
    confidence = RouterConfidence(windows(["x", "y", "x", "y"]), num_layers=1)
    confidence.observe(routed(logits, selected, mask, scoring_func))

    values = []
    for token in range(20):
        row = logits[token].double().numpy()
        scores = np.exp(row) if scoring_func == "softmax" else 1 / (1 + np.exp(-row))
        scores = scores / scores.sum()
        kept = scores[selected[token].numpy()]
        left = np.delete(scores, selected[token].numpy())
        margin = kept.min() - left.max() if len(left) else 0.0
        values.append([entropy(scores) / math.log(experts), kept.max() / kept.sum(), margin])
    values = np.array(values)
    real = mask.flatten().numpy()
    np.testing.assert_allclose(confidence.mean()[:, 0], values[real].mean(0), atol=1e-5)
    for place, rows in enumerate(([0, 2], [1, 3])):
        of_domain = np.isin(np.arange(20) // 5, rows) & real
        np.testing.assert_allclose(confidence.mean_by_domain()[:, 0, place], values[of_domain].mean(0), atol=1e-5)
    assert confidence.overruled_share().item() == pytest.approx((values[real, 2] < 0).mean())
    for share in (0.1, 0.5, 0.9):
        expected = np.quantile(values[real], share, axis=0, method="inverted_cdf")
        width = np.array([1, 1, 2]) / BINS
        assert (np.abs(confidence.quantile(share)[:, 0].numpy() - expected) <= width).all()


def test_the_ends_of_the_scales() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    alike = RouterConfidence(windows(["x"]), num_layers=1)
    alike.observe(routed(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]), mask, "softmax"))
    assert alike.mean()[:, 0].tolist() == pytest.approx([1, 0.5, 0])
    sure = RouterConfidence(windows(["x"]), num_layers=1)
    sure.observe(routed(torch.tensor([[1e4, 0.0, 0, 0]] * 2), torch.tensor([[0], [0]]), mask, "softmax"))
    assert sure.mean()[:, 0].tolist() == pytest.approx([0, 1, 1])
    assert sure.quantile(0.5)[:, 0].tolist() == pytest.approx([0, 1, 1], abs=2 / BINS)


def test_every_expert_selected_leaves_no_margin() -> None:
    confidence = RouterConfidence(windows(["x"]), num_layers=1)
    confidence.observe(routed(torch.randn(2, 2), torch.tensor([[0, 1], [1, 0]]), torch.ones(1, 2).bool(), "softmax"))
    assert confidence.mean()[2, 0] == 0
    assert confidence.overruled_share() == 0
