"""Results as they are printed."""

import re

import pytest

from equipoise.evaluation import results_lines
from equipoise.evaluation.comparison import Scores, compare
from equipoise.evaluation.report_lines import p_value_text

DOMAIN = {"bits_per_byte": 1.5, "perplexity": 9.0, "nats_per_token": 2.2, "num_tokens": 1234, "num_bytes": 5678}


def report(**changes: object) -> dict:
    return {"domains": {}, "tasks": {}, "left_out": {}} | changes


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(1.0, "1.0000"), (0.0123, "0.0123"), (1e-4, "0.0001"), (9.99e-5, "<.0001"), (1 / 20_001, "<.0001")],
)
def test_no_p_value_is_shown_as_zero(p_value: float, text: str) -> None:
    assert p_value_text(p_value) == text


def test_a_comparison_shows_what_is_smaller_than_its_digits() -> None:
    """0.00005 rounds to 0.0001 and 0.0000 alike: both read as if they were known to that digit."""
    found = {"difference": -0.02, "low": -0.03, "high": -0.01, "p_value": 0.00005, "p_value_holm": 0.0006}
    comparison = {"first": "none", "second": "global", "measures": {"bits_per_byte": {"law": found}}}
    lines = results_lines({"none": report(), "global": report()}, [comparison])
    assert "global less none; p paired, and adjusted over a measure's domains" in lines
    assert lines[-1].split() == ["bits_per_byte", "law", "-0.0200", "-0.0300", "-0.0100", "<.0001", "0.0006"]


def test_columns_stand_under_their_heads() -> None:
    """Words on the left, numbers on the right, an interval only where there is one."""
    task = {
        "score": "accuracy_per_byte",
        "truncated": 3,
        "domains": {
            "law": {"score": 0.5, "low": 0.25, "high": 0.75, "chance": 0.25, "num_items": 1200},
            "a long domain": {"score": 0.5, "low": None, "high": None, "num_items": 7},
        },
    }
    domains = {"law": DOMAIN | {"low": 1.25, "high": 1.75}, "all": DOMAIN | {"low": None, "high": None}}
    lines = results_lines({"one": report(domains=domains, tasks={"sums": task}, left_out={"ja": "too little"})}, [])
    assert lines == [
        "",
        "domain  bits/byte   95% interval  perplexity  nats/token  tokens  bytes",
        "law        1.5000  1.2500 1.7500        9.00      2.2000   1,234  5,678",
        "all        1.5000                       9.00      2.2000   1,234  5,678",
        "",
        "task  domain                     score           95% interval  chance  items",
        "sums  law            accuracy_per_byte  0.5000  0.2500 0.7500  0.2500  1,200",
        "sums  a long domain  accuracy_per_byte  0.5000                             7",
        "sums: 3 contexts were cut off at their beginning, to fit the model",
        "continuation leaves out ja: too little",
    ]


def test_what_every_model_leaves_out_is_said_once() -> None:
    lines = results_lines({name: report(left_out={"ja": "too little"}) for name in ("one", "two")}, [])
    assert lines == ["", "== one", "", "== two", "continuation leaves out ja: too little"]


def test_a_difference_in_one_document_has_no_interval() -> None:
    """It would be printed as nan, and NaN in comparison.json is no JSON."""
    one, two = (Scores(values=[bits], weights=[4], clusters=["0"]) for bits in (8.0, 6.0))
    (found,) = compare({"ja": one}, {"ja": two}).values()
    assert (found["difference"], found["low"], found["high"]) == (-0.5, None, None)
    lines = results_lines(
        {"a": report(), "b": report()}, [{"first": "a", "second": "b", "measures": {"bits_per_byte": {"ja": found}}}]
    )
    assert re.fullmatch(r"bits_per_byte +ja +-0\.5000 +1\.0000 +1\.0000", lines[-1])
