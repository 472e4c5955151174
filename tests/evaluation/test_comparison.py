"""Intervals and p-values against closed forms, and against how often they hold in simulations of fixed seed."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.evaluation import Scores, bootstrap_interval, compare, holm, paired_p_value


def answers(values: list[float], clusters: list[str] | None = None) -> Scores:
    return Scores(values, [1] * len(values), clusters or [str(number) for number in range(len(values))])


def test_score_is_a_ratio_of_sums() -> None:
    scores = Scores([3.0, 1.0, 4.0], [10, 5, 5], ["a", "b", "a"])
    assert scores.score == 8 / 20
    values, weights = scores.by_cluster()
    assert (values.tolist(), weights.tolist()) == ([7.0, 1.0], [15.0, 5.0])


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """Of many independent values: mean +- 1.96 s / sqrt(n), whichever way the interval is found."""
    values = np.random.default_rng(1).normal(5, 2, 2000)
    low, high = bootstrap_interval(values, np.ones(2000))
    error = 1.959964 * values.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.06 * error)


def test_interval_of_a_skewed_mean_leans_as_the_edgeworth_expansion_says() -> None:
    """The percentile interval of an exponential's mean leans too little: BCa's ends are both further to the right.

    By Johnson's correction (1978) the exact ends are moved by (1 + 2 z^2) * skewness * s / (6 n) from the normal ones.
    """
    values = np.random.default_rng(2).exponential(1, 400)
    low, high = bootstrap_interval(values, np.ones(400), resamples=40_000)
    skewness = ((values - values.mean()) ** 3).mean() / values.std() ** 3
    moved = skewness * values.std() * (1 + 2 * 1.96**2) / (6 * 400)
    centre = (low + high) / 2 - values.mean()
    assert centre == pytest.approx(moved, rel=0.25)
    assert moved > 0.005


def test_interval_of_a_ratio_has_the_delta_methods_width() -> None:
    generator = np.random.default_rng(3)
    weights = generator.integers(50, 500, 1500).astype(float)
    values = weights * 2 + generator.normal(0, 1, 1500) * np.sqrt(weights)
    low, high = bootstrap_interval(values, weights)
    ratio = values.sum() / weights.sum()
    error = 1.959964 * math.sqrt(((values - ratio * weights) ** 2).sum()) / weights.sum()
    assert (high - low) / 2 == pytest.approx(error, rel=0.06)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Coverage over 300 simulated test sets of 6 questions on each of 20 passages, in which passages differ.

    With a correlation of 1/2 within a passage, the interval of 120 independent questions is 1 / sqrt(3.5) as wide
    as it must be, and holds 70% of the time: that is what clusters are for.
    """
    generator = np.random.default_rng(4)
    held = alone = 0
    for _ in range(300):
        difficulty = generator.beta(0.5, 0.5, 20)  # mean 1/2
        right = (generator.random((20, 6)) < difficulty[:, None]).astype(float)
        low, high = bootstrap_interval(right.sum(1), np.full(20, 6.0), resamples=1000)
        held += low <= 0.5 <= high
        low, high = bootstrap_interval(right.ravel(), np.ones(120), resamples=1000)
        alone += low <= 0.5 <= high
    assert 0.9 <= held / 300 <= 0.98
    assert 0.6 < alone / 300 < 0.8


def test_all_right_or_all_wrong_has_the_exact_interval() -> None:
    """Clopper and Pearson: p^n = 0.025. Every resample of 20 right answers is 20 right answers."""
    low, high = answers([1.0] * 20).interval()
    assert high == 1
    assert low**20 == pytest.approx(0.025)
    assert answers([0.0] * 20).interval() == pytest.approx((0, 1 - low))
    # Three passages are three observations, however many questions are asked on them.
    low, _ = answers([1.0] * 20, [str(number % 3) for number in range(20)]).interval()
    assert low**3 == pytest.approx(0.025)


def test_of_one_cluster_nothing_is_said() -> None:
    assert all(map(math.isnan, answers([1.0, 0.0], ["a", "a"]).interval()))


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = answers([1.0, 0, 0, 1, 1, 0, 1])
    assert scores.interval(seed=5) == scores.interval(seed=5)


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(9, 1, 2 * 11 / 2**10), (5, 5, 1.0), (0, 0, 1.0), (6, 0, 2 / 2**6), (600, 500, 0.0028)],
)
def test_answers_give_mcnemars_exact_p_value(better: int, worse: int, expected: float) -> None:
    """A two-sided binomial test of the items on which exactly one model is right; the others say nothing.

    The last by the normal approximation with continuity correction: erfc((100 - 1) / sqrt(1100) / sqrt(2)).
    """
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 7)
    assert paired_p_value(differences) == pytest.approx(expected, rel=0.03)


@given(st.lists(st.floats(-3, 3).map(lambda value: round(value, 2)), min_size=1, max_size=9))
def test_few_differences_are_tried_in_all_ways(differences: list[float]) -> None:
    sums = [
        abs(math.fsum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    expected = sum(value >= abs(math.fsum(differences)) - 1e-9 for value in sums) / len(sums)
    assert paired_p_value(np.array(differences)) == pytest.approx(expected)


def test_many_differences_give_the_normal_p_value() -> None:
    differences = np.random.default_rng(6).normal(0.12, 1, 400)
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert paired_p_value(differences) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)
    assert paired_p_value(differences + 1) == pytest.approx(1 / 20_001)  # never 0: not all ways were tried


def test_equal_models_are_told_apart_as_rarely_as_alpha_says() -> None:
    generator = np.random.default_rng(7)
    p_values = [paired_p_value(generator.standard_t(3, 30), flips=999) for _ in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08
    assert 0.42 <= np.mean(np.array(p_values) <= 0.5) <= 0.58


def test_holm_is_the_textbooks() -> None:
    """0.01 * 4, 0.013 * 3, 0.02 * 2, then none below the one before: 0.04 and 0.04."""
    assert holm([0.02, 0.01, 0.03, 0.013]) == pytest.approx([0.04, 0.04, 0.04, 0.04])
    assert holm([0.04, 0.001, 0.9]) == pytest.approx([0.08, 0.003, 0.9])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1, p * len(p_values)) + 1e-12


def test_compares_domain_by_domain() -> None:
    generator = np.random.default_rng(8)
    bytes_of = generator.integers(100, 900, 40).tolist()
    clusters = [str(number // 2) for number in range(40)]
    bits = generator.normal(2, 0.3, 40) * bytes_of
    first = {
        "law": Scores(bits.tolist(), bytes_of, clusters),
        "code": answers([1.0, 0, 1, 0, 1, 1, 0, 1]),
    }
    second = {
        "law": Scores((bits - 0.1 * np.array(bytes_of) + generator.normal(0, 9, 40)).tolist(), bytes_of, clusters),
        "code": answers([1.0, 0, 1, 1, 0, 1, 0, 1]),
    }
    found = compare(first, second)
    assert found["law"]["difference"] == pytest.approx(second["law"].score - first["law"].score)
    # Paired: the models differ by 0.1 on every document, though documents differ by 0.3 among themselves.
    assert found["law"]["low"] < -0.1 < found["law"]["high"] < -0.09
    assert found["law"]["p_value"] < 0.001
    assert found["law"]["p_value_holm"] == pytest.approx(2 * found["law"]["p_value"])
    assert found["code"] == {"difference": 0, "low": pytest.approx(-0.375), "high": pytest.approx(0.375),
                             "p_value": 1, "p_value_holm": 1}  # fmt: skip
    turned = compare(second, first)["law"]
    assert turned["difference"] == -found["law"]["difference"]
    assert turned["p_value"] == found["law"]["p_value"]


def test_other_items_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="models must be measured on the same items to be compared; got others in a"):
        compare({"a": answers([1.0, 0.0])}, {"a": answers([1.0])})
    with pytest.raises(ValueError, match="got others in b"):
        compare({"a": answers([1.0])}, {"a": answers([1.0]), "b": answers([1.0])})
