"""Expert load: closed forms, scipy's entropy, direct sums, and the functions that watch training."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from equipoise.balancing import dead_experts, load_cv, load_entropy, max_vio

METRIC = Path(__file__).parents[2] / "evaluation" / "metrics" / "expert_load"
MEASURES = ("max_vio", "load_entropy", "gini", "load_cv", "largest_share", "dead_experts")


@pytest.fixture(scope="module")
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([5, 5, 5, 5], (0, 1, 0, 0, 1 / 4, 0)),
        ([0, 0, 9, 0], (3, 0, 3 / 4, math.sqrt(3), 1, 3)),  # K = 1: the ends of the ranges
        ([7, 0, 7, 0], (1, 1 / 2, 1 / 2, 1, 1 / 2, 2)),  # K = 2
        ([1, 2, 3, 4], (0.6, None, 1 / 4, math.sqrt(5) / 5, 0.4, 0)),
    ],
)
def test_closed_forms(metric: evaluate.EvaluationModule, load: list[int], expected: tuple) -> None:
    result = metric.compute(load=[[load]])
    for name, value in zip(MEASURES, expected, strict=True):
        if value is not None:
            assert result[name] == pytest.approx(value, abs=1e-15), name


def loads(items: int | None = None) -> st.SearchStrategy:
    form = st.tuples(st.just(items) if items else st.integers(1, 5), st.integers(1, 3), st.integers(2, 6))
    return form.flatmap(
        lambda sizes: st.lists(st.integers(0, 50), min_size=math.prod(sizes), max_size=math.prod(sizes)).map(
            lambda counts: np.array(counts).reshape(sizes)
        )
    ).filter(lambda load: (load.sum((0, 2)) > 0).all())


@given(loads())
def test_matches_scipy_direct_sums_and_the_measures_of_training(load: np.ndarray) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    layers = metric.compute(load=load)["layers"]
    total = load.sum(0)
    for layer, counts in enumerate(total):
        experts = len(counts)
        assert layers["load_entropy"][layer] == pytest.approx(entropy(counts) / math.log(experts), abs=1e-12)
        differences = np.abs(counts[:, None] - counts).sum()
        assert layers["gini"][layer] == pytest.approx(differences / (2 * experts * counts.sum()), abs=1e-14)
        assert layers["largest_share"][layer] == pytest.approx(counts.max() / counts.sum(), abs=1e-15)
    for name, function in (
        ("max_vio", max_vio),
        ("load_entropy", load_entropy),
        ("load_cv", load_cv),
        ("dead_experts", dead_experts),
    ):
        assert layers[name] == pytest.approx(function(torch.tensor(total)).tolist(), rel=1e-5, abs=1e-5), name


@settings(max_examples=10)
@given(loads())
def test_means_over_layers_and_items_alone(load: np.ndarray) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    result = metric.compute(load=load.tolist(), return_items=True)
    for name in MEASURES:
        assert result[name] == pytest.approx(np.mean(result["layers"][name]), abs=1e-14)
        for item, table in enumerate(load):
            for layer, counts in enumerate(table):
                of_item = result["items"][name][item][layer]
                if counts.sum():
                    assert [of_item] == metric.compute(load=[[counts]])["layers"][name]
                else:
                    assert math.isnan(of_item)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([[[1, 2], [3, 4]], [[1, 2]]], r"the same 2 layers and 2 experts in all items; got rows of \[2\] in item 1"),
        ([[[1, 2], [3, 4]], [[1, 2], [3]]], r"2 layers and 2 experts in all items; got rows of \[2, 1\] in item 1"),
        ([[[1]]], r"load must have at least one layer and two experts; got the form \(1, 1\) in item 0"),
        ([[]], r"got the form \(0, 0\) in item 0"),
        ([[[1, 2]], [[1, -2]]], r"load must be finite and at least 0; got \[\[1, -2\]\] in item 1"),
        ([[[1, 2], [0, 0]]], "load must count at least one token in each layer; got none in layer 1"),
        ([[[1, 2]], None], "load must be given for every item; got None in item 1"),
        ([], "load must hold at least one item; got none"),
    ],
)
def test_refuses(metric: evaluate.EvaluationModule, load: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(load=load)
