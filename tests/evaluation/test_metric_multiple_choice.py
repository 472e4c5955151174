"""Multiple choice: accuracies in closed form and against drawn tie-breaks, whatever the order of the choices."""

import random
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

METRIC = Path(__file__).parents[2] / "evaluation" / "metrics" / "multiple_choice"
ACCURACIES = ("accuracy", "accuracy_per_token", "accuracy_per_byte")


@pytest.fixture(scope="module")
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def test_the_length_decides(metric: evaluate.EvaluationModule) -> None:
    # The answer is the second choice: less likely as a whole, as likely per token, more likely per byte.
    result = metric.compute(
        log_likelihoods=[[-6.0, -9.0]], num_tokens=[[2, 3]], num_bytes=[[6, 18]], answer=[1], return_items=True
    )
    assert result == {
        "accuracy": 0.0,
        "accuracy_per_token": 0.5,
        "accuracy_per_byte": 1.0,
        "chance": 0.5,
        "num_items": 1,
        "items": {
            "accuracy": [0.0],
            "accuracy_per_token": [0.5],
            "accuracy_per_byte": [1.0],
            "chance": [0.5],
        },
    }


def test_a_model_that_cannot_tell_scores_at_chance_wherever_the_answer_stands(
    metric: evaluate.EvaluationModule,
) -> None:
    sizes = [2, 4, 5, 3]
    for position in (0, 1):
        result = metric.compute(
            log_likelihoods=[[-5.0] * size for size in sizes],
            num_tokens=[[3] * size for size in sizes],
            num_bytes=[[7] * size for size in sizes],
            answer=[position] * 4,
        )
        assert [result[name] for name in ACCURACIES] == [result["chance"]] * 3
        assert result["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 5 + 1 / 3) / 4, abs=1e-15)


# Few values, so that there are ties.
CHOICE = st.tuples(st.integers(-6, 0).map(float), st.integers(1, 3), st.integers(1, 4))
ITEMS = st.lists(st.lists(CHOICE, min_size=2, max_size=5), min_size=1, max_size=6)


@given(ITEMS, st.randoms(use_true_random=False))
def test_matches_the_mean_of_drawn_tie_breaks_in_any_order(items: list, rng: random.Random) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    answers = [rng.randrange(len(choices)) for choices in items]

    def compute(items: list, answers: list[int]) -> dict[str, Any]:
        columns = [[[choice[part] for choice in choices] for choices in items] for part in range(3)]
        names = ("log_likelihoods", "num_tokens", "num_bytes")
        return metric.compute(**dict(zip(names, columns, strict=True)), answer=answers)

    result = compute(items, answers)
    for name, lengths in (("accuracy", None), ("accuracy_per_token", 1), ("accuracy_per_byte", 2)):
        expected = []
        for choices, answer in zip(items, answers, strict=True):
            scores = np.array([choice[0] / (choice[lengths] if lengths else 1) for choice in choices])
            best = np.flatnonzero(scores == scores.max())
            expected.append(np.mean(best == answer))  # each of the best is drawn as often
        assert result[name] == pytest.approx(np.mean(expected), abs=1e-14)

    dealt_items, dealt_answers = [], []
    for choices, answer in zip(items, answers, strict=True):
        order = rng.sample(range(len(choices)), len(choices))
        dealt_items.append([choices[old] for old in order])
        dealt_answers.append(order.index(answer))
    together = list(zip(dealt_items, dealt_answers, strict=True))
    rng.shuffle(together)
    assert compute([pair[0] for pair in together], [pair[1] for pair in together]) == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"log_likelihoods": [[-1.0, -2.0], [-3.0]]},
            "must hold at least two choices; got 1 in item 1",
        ),
        (
            {"log_likelihoods": [[-1.0, 0.5], [-3.0, -1.0]]},
            "must be finite and at most 0; got 0.5 in item 0",
        ),
        ({"log_likelihoods": [[-1.0, -1.0], [-3.0, float("nan")]]}, "must be finite and at most 0; got nan in item 1"),
        (
            {"log_likelihoods": [[-1.0, float("-inf")], [-3.0, -1.0]]},
            "must be finite and at most 0; got -inf in item 0",
        ),
        ({"num_tokens": [[1, 1], [1, 1, 1]]}, r"num_tokens must hold a value for each choice \(2\); got 3 in item 1"),
        ({"num_bytes": [[1, 1], [1, 0]]}, "num_bytes must be at least 1; got 0 in item 1"),
        ({"answer": [2, 0]}, "answer must be from 0 to 1; got 2 in item 0"),
        ({"answer": [0, -1]}, "answer must be from 0 to 1; got -1 in item 1"),
        ({"answer": [0, None]}, "answer must be given for every item; got None in item 1"),
        ({"log_likelihoods": [], "num_tokens": [], "num_bytes": [], "answer": []}, "at least one item; got none"),
    ],
)
def test_refuses(metric: evaluate.EvaluationModule, changes: dict, message: str) -> None:
    columns = {
        "log_likelihoods": [[-1.0, -2.0], [-3.0, -1.0]],
        "num_tokens": [[1, 2], [1, 1]],
        "num_bytes": [[1, 2], [1, 1]],
        "answer": [0, 1],
    }
    with pytest.raises(ValueError, match=message):
        metric.compute(**columns | changes)
