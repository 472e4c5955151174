"""The metric module: its formula against exact arithmetic, and what it refuses."""

import math
from fractions import Fraction
from pathlib import Path

import evaluate
import pytest

METRIC = Path(__file__).parents[2] / "evaluation" / "metrics" / "bits_per_byte"


@pytest.fixture(scope="module")
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def test_loads_by_path_as_a_metric(metric: evaluate.EvaluationModule) -> None:
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "bits_per_byte"


def test_uniform_guess_over_bytes_is_eight_bits(metric: evaluate.EvaluationModule) -> None:
    result = metric.compute(nll=[10 * math.log(256)], num_tokens=[10], num_bytes=[10])
    assert result["bits_per_byte"] == pytest.approx(8, abs=1e-12)
    assert result["perplexity"] == pytest.approx(256, rel=1e-12)


def test_matches_exact_sums(metric: evaluate.EvaluationModule) -> None:
    nll, tokens, size = [0.1 * n for n in range(1, 50)], [n % 7 for n in range(1, 50)], [n % 5 for n in range(1, 50)]
    nats = float(sum(map(Fraction, nll)))
    assert metric.compute(nll=nll, num_tokens=tokens, num_bytes=size) == pytest.approx(
        {
            "bits_per_byte": nats / math.log(2) / sum(size),
            "perplexity": math.exp(nats / sum(tokens)),
            "nats_per_token": nats / sum(tokens),
            "num_tokens": sum(tokens),
            "num_bytes": sum(size),
        },
        rel=1e-14,
    )


def test_does_not_depend_on_how_items_are_cut_or_added(metric: evaluate.EvaluationModule) -> None:
    whole = metric.compute(nll=[7.5], num_tokens=[6], num_bytes=[11])
    metric.add(nll=2.5, num_tokens=2, num_bytes=11)
    metric.add_batch(nll=[4.0, 1.0], num_tokens=[3, 1], num_bytes=[0, 0])
    assert metric.compute() == whole


def test_perplexity_too_large_for_a_float_is_infinite(metric: evaluate.EvaluationModule) -> None:
    assert metric.compute(nll=[800.0], num_tokens=[1], num_bytes=[1])["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"nll": [1.0, -0.5]}, r"nll must be finite and at least 0; got -0.5 in item 1"),
        ({"nll": [math.nan, 1.0]}, r"nll must be finite and at least 0; got nan in item 0"),
        ({"nll": [1.0, math.inf]}, r"nll must be finite and at least 0; got inf in item 1"),
        ({"num_tokens": [-1, 4]}, r"num_tokens must be at least 0; got -1 in item 0"),
        ({"num_bytes": [3, -2]}, r"num_bytes must be at least 0; got -2 in item 1"),
        ({"num_tokens": [0, 0]}, r"num_tokens must sum to more than 0; got 0"),
        ({"num_bytes": [0, 0]}, r"num_bytes must sum to more than 0; got 0"),
    ],
)
def test_refuses(metric: evaluate.EvaluationModule, columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"nll": [1.0, 2.0], "num_tokens": [1, 2], "num_bytes": [1, 2], **columns})
