"""How sure a score is, and whether two models differ: bootstrap intervals and paired tests over independent clusters.

A score is a ratio of sums over items, `sum(values) / sum(weights)`: of right answers to items, of bits to bytes. Items
of one cluster (windows of one document, questions on one passage) are not independent, so clusters are resampled, and
signs are flipped, whole.

Shapes: N items, C clusters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 5_000
_MOST_DRAWS = 2_000_000  # in memory at a time
_EXACT_CLUSTERS = 14  # whose signs are flipped in all 2^C ways


@dataclass(frozen=True)
class Scores:
    """What a measure found in one domain, item by item."""

    values: Sequence[float]
    """[N]: 1 for a right answer; the bits that a document took."""
    weights: Sequence[float]
    """[N]: 1 for an answer; the document's bytes."""
    clusters: Sequence[str]
    """[N]."""

    @property
    def score(self) -> float:
        """`sum(values) / sum(weights)`, each sum rounded once."""
        return math.fsum(self.values) / math.fsum(self.weights)

    def by_cluster(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums of values and of weights of each cluster, float64 [C]."""
        names: dict[str, list[int]] = {}
        for item, cluster in enumerate(self.clusters):
            names.setdefault(cluster, []).append(item)
        return (
            np.array([math.fsum(self.values[item] for item in items) for items in names.values()]),
            np.array([math.fsum(self.weights[item] for item in items) for items in names.values()]),
        )

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95% confidence interval of the score: see `bootstrap_interval`."""
        low, high = bootstrap_interval(*self.by_cluster(), seed=seed)
        values = np.array(self.values)
        if low == high and (values == values[0]).all() and values[0] in (0, 1):
            # All right or all wrong: every resample is, too. Clopper and Pearson's interval, exact for answers that
            # are independent; clusters are counted once.
            least = ((1 - CONFIDENCE) / 2) ** (1 / len(set(self.clusters)))
            return (least, 1.0) if values[0] == 1 else (0.0, 1 - least)
        return low, high


def bootstrap_interval(
    values: np.ndarray,
    weights: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The BCa bootstrap interval of `sum(values) / sum(weights)`.

    Clusters are drawn with replacement; the percentiles that are taken of the resampled scores are corrected for the
    score's bias and for its variance changing with it (Efron 1987, Better Bootstrap Confidence Intervals, section 2;
    the acceleration from leaving out one cluster at a time).

    Args:
        values, weights: By cluster, [C].
        confidence: Of the two-sided interval, between 0 and 1.
        resamples: How many times clusters are drawn.
        seed: Of the draws: the same gives the same interval.

    Returns:
        Its ends. Both nan for fewer than two clusters, of whose spread nothing is known.
    """
    clusters = len(values)
    if clusters < 2:
        return math.nan, math.nan
    score = values.sum() / weights.sum()
    generator = np.random.default_rng(seed)
    at_once = max(1, _MOST_DRAWS // clusters)
    drawn = []
    for first in range(0, resamples, at_once):
        rows = generator.integers(0, clusters, (min(at_once, resamples - first), clusters))
        drawn.append(values[rows].sum(1) / weights[rows].sum(1))
    resampled = np.sort(np.concatenate(drawn))
    if resampled[0] == resampled[-1]:
        return float(score), float(score)

    normal = NormalDist()
    # A resample that gives the score itself, as many do of a few answers, counts half. Rounding must not decide.
    near = 1e-12 * max(1.0, abs(score))
    below = ((resampled < score - near).sum() + (resampled <= score + near).sum()) / 2
    bias = normal.inv_cdf(float(np.clip(below, 0.5, resamples - 0.5)) / resamples)
    left_out = (values.sum() - values) / (weights.sum() - weights)
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(tail)
        level = normal.cdf(bias + z / (1 - acceleration * z))
        ends.append(float(np.quantile(resampled, level)))
    return ends[0], ends[1]


def interval_record(low: float, high: float) -> dict[str, float | None]:
    """An interval as JSON can hold it, which knows no nan."""
    return {"low": None, "high": None} if math.isnan(low) else {"low": low, "high": high}


def paired_p_value(differences: np.ndarray, *, flips: int = 20_000, seed: int = 0) -> float:
    """The probability of a difference as large as this between two models that are equally good.

    Were they, each cluster's difference might as well have had the other sign: the two-sided p-value is the share of
    all ways to choose signs that give a sum as far from 0. Where all differences that are not 0 have one size, as of
    answers that are right or wrong, this is the exact test of McNemar (1947); up to 14 clusters all ways are tried;
    else `flips` are drawn, with 1 added to both counts (Phipson and Smyth 2010), so that it is never below
    1 / (flips + 1).

    Args:
        differences: One model's value less the other's, summed by cluster, [C].
    """
    sizes = np.abs(differences[differences != 0])
    if not len(sizes):
        return 1.0
    if np.allclose(sizes, sizes[0], rtol=1e-12, atol=0):
        return _binomial_p_value(int((differences > 0).sum()), len(sizes))
    differences = differences[differences != 0]
    observed = abs(math.fsum(differences)) * (1 - 1e-12)  # rounding must not decide
    clusters = len(differences)
    if clusters <= _EXACT_CLUSTERS:
        signs = (np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1) * 2 - 1
        return float((np.abs(signs @ differences) >= observed).mean())
    generator = np.random.default_rng(seed)
    at_once = max(1, _MOST_DRAWS // clusters)
    as_far = 0
    for first in range(0, flips, at_once):
        signs = generator.integers(0, 2, (min(at_once, flips - first), clusters)) * 2 - 1
        as_far += int((np.abs(signs @ differences) >= observed).sum())
    return (as_far + 1) / (flips + 1)


def _binomial_p_value(heads: int, tosses: int) -> float:
    """Two-sided, for a fair coin."""
    tail = sum(math.comb(tosses, count) for count in range(min(heads, tosses - heads) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**tosses)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): rejecting those below alpha, the chance of any false rejection
    is at most alpha."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(first: Mapping[str, Scores], second: Mapping[str, Scores], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Two models on the same items, domain by domain.

    Args:
        first, second: Domain -> what the measure found of the one model and of the other.

    Returns:
        For each domain: `difference` (second less first), its 95% interval `low` and `high` (None for one cluster,
        of whose spread nothing is known), `p_value` of each domain by itself, and `p_value_holm`, adjusted for the
        number of domains.

    Raises:
        ValueError: the models were not measured on the same items.
    """
    for domain in [*first, *second]:
        same = domain in first and domain in second
        if (
            not same
            or first[domain].clusters != second[domain].clusters
            or not np.array_equal(first[domain].weights, second[domain].weights)
        ):
            raise ValueError(f"models must be measured on the same items to be compared; got others in {domain}")
    found: dict[str, dict[str, Any]] = {}
    for domain in first:
        values = np.subtract(second[domain].values, first[domain].values)
        difference = Scores(values.tolist(), first[domain].weights, first[domain].clusters)
        sums, weights = difference.by_cluster()
        low, high = bootstrap_interval(sums, weights, seed=seed)
        found[domain] = {
            "difference": difference.score,
            **interval_record(low, high),
            "p_value": paired_p_value(sums, seed=seed),
        }
    adjusted = holm([entry["p_value"] for entry in found.values()])
    return {domain: {**entry, "p_value_holm": p} for (domain, entry), p in zip(found.items(), adjusted, strict=True)}
