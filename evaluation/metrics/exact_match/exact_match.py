"""Exact match of generated answers with references, as texts or as numbers."""

import re
import unicodedata
from decimal import Decimal
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Exact match: the share of items whose prediction equals one of its references,

    exact_match = (items with a match) / items

from 0 to 1, higher is better. What is compared:

- By default the texts, without the white space around them.
- With `regex`, of a prediction the first match of the pattern (its first group, if it has one); a prediction without a
  match counts as wrong. References are taken as they are.
- With `numeric`, one number of each text (of what `regex` found, if both are given), by value: "3.0" equals "3". It is
  the first number after the first "####", where a text has that mark (what comes later is the next question, which a
  model made up); without the mark it is the last number of the text. Digits may be grouped by commas or by
  non-breaking or thin spaces ("1,234", "1,00,000"); the decimal sign is a point; a sign counts unless it stands
  directly behind a letter, digit or closing bracket, where it is a subtraction or a hyphen ("10-5" ends in 5).
  Currency signs and percent signs are passed over: "$5" is 5, "50%" is 50. "1/2" is two numbers, the last of them 2.
- With `ignore_case` and `ignore_punctuation`, texts that differ only so are equal. Punctuation is every character of
  the Unicode categories P (punctuation) and S (symbols); it is removed, and runs of white space become one space.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the generated text of each item.
    references (list of str, or list of list of str): the right answer of each item, or all that are right.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    numeric (bool): whether to compare numbers, as in GSM8K.
    regex (str): what to take of a prediction.
    ignore_case (bool): whether upper and lower case are the same.
    ignore_punctuation (bool): whether to remove punctuation first.
    return_items (bool): whether to return `items` too.
Returns:
    exact_match: share of items with a match, 0..1.
    answered: share of items in whose prediction there was something to compare: a match of the regex, a number, or
        else a text that is not empty; 0..1.
    num_items: how many items.
    items: columns with one value per item, in input order, or in order of the index: exact_match (0 or 1), extracted
        (what was compared, or None); index.
Raises:
    ValueError: there is no item, an item has no reference, the regex is none, `numeric` is combined with ignore_case
        or ignore_punctuation, a reference holds no number where `numeric` needs one, or items with the same index
        differ in their references.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/exact_match")
    >>> metric.compute(predictions=["So she has $1,200.00."], references=["12 * 100 = 1200\\n#### 1200"], numeric=True)
    {'exact_match': 1.0, 'answered': 1.0, 'num_items': 1}
"""

_CITATION = """
@article{cobbe2021training,
    title={Training Verifiers to Solve Math Word Problems},
    author={Cobbe, Karl and others},
    journal={arXiv:2110.14168},
    note={GSM8K, whose solutions end in "#### " and the answer},
    year={2021}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}

_SPACES = "\u00a0\u2009\u202f"
_NUMBER = re.compile(
    # A sign, unless it is an operator or a hyphen; a currency sign before or after it.
    r"(?:(?<![\w)\]])(?P<sign>[-+\u2212]))?[$€£¥₹]?(?:(?<=[$€£¥₹])(?P<late_sign>[-+\u2212]))?"
    rf"(?P<digits>\d{{1,3}}(?:[,{_SPACES}]\d{{2,3}})*[,{_SPACES}]\d{{3}}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    # Three digits at most, which no sensible answer exceeds.
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    # Alternative features, a text or a list of texts, would have to be told apart by an item, which a process of
    # several may not have.
    def add_batch(self, *, references: list | None = None, **columns: list) -> None:
        """Adds items; a reference may be a text or a list of texts."""
        super().add_batch(references=[_as_list(given) for given in references or []], **columns)

    def add(self, *, reference: str | list[str] | None = None, **values: Any) -> None:
        """Adds an item; its reference may be a text or a list of texts."""
        super().add(references=_as_list(values.pop("references", reference)), **values)

    def _compute(
        self,
        *,
        numeric: bool = False,
        regex: str | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        return_items: bool = False,
        **columns: list,
    ) -> dict:
        _check_given(columns)
        if numeric and (ignore_case or ignore_punctuation):
            raise ValueError("ignore_case and ignore_punctuation must be False with numeric; got True")
        pattern = _compiled(regex)
        for item, accepted in enumerate(columns["references"]):
            if not accepted:
                raise ValueError(f"references must hold at least one text for each item; got none in item {item}")
            for text in accepted:
                if numeric and _number(text) is None:
                    raise ValueError(f"references must hold a number; got {text!r} in item {item}")
        columns = _distinct(columns, same=("references",))

        def normalised(text: str) -> Decimal | str | None:
            if numeric:
                return _number(text)
            text = text.casefold() if ignore_case else text
            return (_without_punctuation(text) if ignore_punctuation else text).strip()

        matches, extracted = [], []
        for prediction, accepted in zip(columns["predictions"], columns["references"], strict=True):
            found = _found(pattern, prediction)
            answer = None if found is None else normalised(found)
            extracted.append(None if answer is None or answer == "" else str(answer))
            matches.append(float(answer is not None and answer in [normalised(text) for text in accepted]))
        number = len(matches)
        result: dict = {
            "exact_match": sum(matches) / number,
            "answered": sum(text is not None for text in extracted) / number,
            "num_items": number,
        }
        if return_items:
            index = {name: columns[name] for name in columns if name == "index"}
            result["items"] = {"exact_match": matches, "extracted": extracted, **index}
        return result


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _compiled(regex: str | None) -> re.Pattern | None:
    try:
        return None if regex is None else re.compile(regex)
    except re.error as error:
        raise ValueError(f"regex must be a regular expression; got {regex!r}: {error}") from error


def _found(pattern: re.Pattern | None, text: str) -> str | None:
    """What of a prediction is compared, before numbers or texts are normalised; None where there is no match."""
    if pattern is None:
        return text
    match = pattern.search(text)
    return match and match[1 if pattern.groups else 0]


def _number(text: str) -> Decimal | None:
    marked = text.split("####")[1:2]
    found = list(_NUMBER.finditer(marked[0] if marked else text))
    if not found:
        return None
    match = found[0 if marked else -1]
    digits = re.sub(rf"[,{_SPACES}]", "", match["digits"])
    sign = "-" if (match["sign"] or match["late_sign"] or "+") in "-\u2212" else ""
    return Decimal(f"{sign}{digits}{match['exponent'] or ''}")


def _without_punctuation(text: str) -> str:
    return " ".join("".join(character for character in text if unicodedata.category(character)[0] not in "PS").split())


def _optional_features(config_name: str, optional: dict) -> dict:
    """The optional features that the configuration names, joined by "+"; "default" has none."""
    names = [] if config_name == "default" else config_name.split("+")
    for name in names:
        if name not in optional:
            raise ValueError(f"config_name must join names of {sorted(optional)} by '+'; got {config_name!r}")
    return {name: optional[name] for name in names}


def _check_given(columns: dict[str, list]) -> None:
    for name, column in columns.items():
        if not column:
            raise ValueError(f"{name} must hold at least one item; got none")
        if None in column:
            raise ValueError(f"{name} must be given for every item; got None in item {column.index(None)}")


def _distinct(columns: dict[str, list], same: tuple[str, ...]) -> dict[str, list]:
    """The first item of each index, in order of the index; without an index, all items as they came.

    Raises:
        ValueError: two items have one index, but differ in a column of `same`, which describes the item itself.
    """
    if "index" not in columns:
        return columns
    first: dict[int, int] = {}
    for item, number in enumerate(columns["index"]):
        kept = first.setdefault(number, item)
        for name in same:
            if columns[name][item] != columns[name][kept]:
                raise ValueError(
                    f"index must name one item; got {number} for items {kept} and {item}, whose {name} differ: "
                    f"{columns[name][kept]!r} and {columns[name][item]!r}"
                )
    order = [first[number] for number in sorted(first)]
    return {name: [column[item] for item in order] for name, column in columns.items()}
