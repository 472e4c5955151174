"""Exact match: what is taken for the number of a text, and which texts are the same."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import evaluate
import pytest
from hypothesis import given
from hypothesis import strategies as st

METRIC = Path(__file__).parents[2] / "evaluation" / "metrics" / "exact_match"


@pytest.fixture(scope="module")
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def extracted(metric: evaluate.EvaluationModule, prediction: str, **options: Any) -> str | None:
    result = metric.compute(predictions=[prediction], references=["0"], return_items=True, **options)
    return result["items"]["extracted"][0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("The answer is 72.", 72),
        ("3 + 4 = 7 apples", 7),
        ("3.0", 3),
        ("007", 7),
        ("It costs $1,234.50!", "1234.5"),
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("5 €", 5),
        ("50%", 50),
        ("-3", -3),
        ("x = -3", -3),
        ("\u22123", -3),
        ("+3", 3),
        ("(-3)", -3),
        ("10-5", 5),  # a subtraction
        ("10 - 5", 5),
        ("COVID-19", 19),  # a hyphen
        ("1,000,000", 1_000_000),
        ("1,00,000", 100_000),  # grouped as in India
        ("1\u202f000\u00a0000", 1_000_000),  # grouped as in France
        ("1, 2, 3", 3),
        ("1,2,3", 3),
        (".5", "0.5"),
        ("Well...5", 5),
        ("1.5e3", 1500),
        ("2e999999999", 999999999),  # no exponent: nothing could hold it
        ("4th", 4),
        ("x1", 1),
        ("٣", 3),
        ("\uff13\uff16", 36),
        ("答えは18です。", 18),
        ("1/2", 2),
        ("5 * 3 = 15\n#### 15", 15),
        ("#### 15\nQuestion: what are 2 and 2?\n#### 4", 15),  # the next question is none of ours
        ("about 12 ####", None),  # a mark without an answer
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(metric: evaluate.EvaluationModule, text: str, number: int | str | None) -> None:
    found = extracted(metric, text, numeric=True)
    assert found is number is None or Decimal(found) == Decimal(number)


@given(
    st.decimals(-(10**9), 10**9, places=3),
    st.sampled_from(["{:,}", "{}", "${:,}", "is {:,}.", "a 7 and then {:,}\n", "{:,}%", "work 12\n#### {:,}\nnext 5"]),
)
def test_numbers_are_read_as_they_are_written(number: Decimal, template: str) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    text = template.format(number).replace("$-", "-$")
    result = metric.compute(predictions=[text], references=[f"#### {number}"], numeric=True)
    assert result["exact_match"] == 1


def test_numbers_are_compared_by_value(metric: evaluate.EvaluationModule) -> None:
    result = metric.compute(
        predictions=["so 3.0", "3.1", "1e2", "100000000000000000000001"],
        references=["#### 3", "3", "100", "100000000000000000000002"],  # the last are one float64
        numeric=True,
        return_items=True,
    )
    assert result["items"]["exact_match"] == [1, 0, 1, 0]
    assert result["exact_match"] == 0.5


def test_texts_are_compared_as_they_are(metric: evaluate.EvaluationModule) -> None:
    predictions = ["Paris", " Paris\n", "paris", "Paris.", "Paris , France", "", "Rome"]
    references = [["Paris"]] * 4 + [["Paris, France"], ["x"], ["Paris", "Rome"]]

    def matches(**options: bool) -> list[float]:
        result = metric.compute(predictions=predictions, references=references, return_items=True, **options)
        assert result["answered"] == 6 / 7
        return result["items"]["exact_match"]

    assert matches() == [1, 1, 0, 0, 0, 0, 1]
    assert matches(ignore_case=True) == [1, 1, 1, 0, 0, 0, 1]
    assert matches(ignore_punctuation=True) == [1, 1, 0, 1, 1, 0, 1]
    assert matches(ignore_case=True, ignore_punctuation=True) == [1, 1, 1, 1, 1, 0, 1]


def test_case_and_punctuation_of_other_scripts(metric: evaluate.EvaluationModule) -> None:
    result = metric.compute(
        predictions=["STRASSE", "「東京」。"],
        references=["straße", "東京"],
        ignore_case=True,
        ignore_punctuation=True,
        return_items=True,
    )
    assert result["items"]["exact_match"] == [1, 1]


def test_one_reference_is_a_list_of_one(metric: evaluate.EvaluationModule) -> None:
    several = metric.compute(predictions=["a", "b"], references=[["a"], ["a"]])
    assert metric.compute(predictions=["a", "b"], references=["a", "a"]) == several
    assert several == {"exact_match": 0.5, "answered": 1.0, "num_items": 2}
    metric.add(prediction="a", reference="a")
    metric.add(predictions="b", references=["a"])
    metric.add_batch(predictions=["a", "b"], references=["a", "a"])
    assert metric.compute() == several | {"num_items": 4}


def test_regex_takes_its_group_or_all_of_its_match(metric: evaluate.EvaluationModule) -> None:
    text = "The answer is (B). Then the answer is (C)."
    assert extracted(metric, text, regex=r"answer is \((\w)\)") == "B"
    assert extracted(metric, text, regex=r"\(\w\)") == "(B)"
    assert extracted(metric, text, regex="nothing") is None
    assert extracted(metric, "I have 5. Total: 1,234 of 9", regex=r"Total: \S+", numeric=True) == "1234"
    result = metric.compute(predictions=[text, text, "?"], references=["B", "C", "?"], regex=r"\((\w)\)")
    assert result == {"exact_match": 1 / 3, "answered": 2 / 3, "num_items": 3}


def test_a_group_without_a_part_in_the_match_is_no_answer(metric: evaluate.EvaluationModule) -> None:
    assert extracted(metric, "b", regex="(a)|b") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": [["a"], []]}, "references must hold at least one text for each item; got none in item 1"),
        ({"references": ["1", "one"], "numeric": True}, "references must hold a number; got 'one' in item 1"),
        ({"numeric": True, "ignore_case": True}, "ignore_case and ignore_punctuation must be False with numeric"),
        ({"regex": "("}, r"regex must be a regular expression; got '\(': missing \)"),
        ({"predictions": [], "references": []}, "at least one item; got none"),
    ],
)
def test_refuses(metric: evaluate.EvaluationModule, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": ["a", "b"], "references": ["a", "b"]} | changes)
