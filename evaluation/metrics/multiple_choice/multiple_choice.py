"""Accuracy of a language model that chooses among texts by their log-likelihoods."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Multiple-choice accuracy: the model's choice is the one of the largest score s_c, where s_c is the choice's
log-likelihood (`accuracy`), that divided by its tokens (`accuracy_per_token`), or by its UTF-8 bytes
(`accuracy_per_byte`). The log-likelihood alone favours short choices; bytes do not depend on the tokenizer. Each is

    accuracy = mean over items of (1 if s_answer = max_c s_c, else 0) / (how many choices have s_c = max_c s_c)

from 0 to 1, higher is better. A tie thus counts as a choice drawn among the tied would on average: to take the first
of them would let the order of the choices decide, and a model that cannot tell the choices apart would score by where
the answer stands. As it is, such a model scores `chance`, the mean over items of 1 / (number of choices).
"""

_KWARGS_DESCRIPTION = """
Args:
    log_likelihoods (list of list of float): for each item, the log-likelihood of each choice in nats, summed over its
        tokens; at most 0.
    num_tokens (list of list of int): for each item, the tokens of each choice.
    num_bytes (list of list of int): for each item, the UTF-8 bytes of each choice.
    answer (list of int): for each item, the index of the right choice, from 0. Items may have different numbers of
        choices, at least two.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    return_items (bool): whether to return `items` too.
Returns:
    accuracy: share of items answered rightly by log-likelihood, 0..1.
    accuracy_per_token: the same by log-likelihood per token, 0..1.
    accuracy_per_byte: the same by log-likelihood per byte, 0..1.
    chance: what a blind choice scores, 0..0.5.
    num_items: how many items.
    items: columns with one value per item, in input order, or in order of the index: accuracy, accuracy_per_token,
        accuracy_per_byte, chance; index.
Raises:
    ValueError: there is no item, the lists of an item differ in length or are shorter than two, a log-likelihood is
        not finite or above 0, a length is below 1, an answer is no index of a choice, or items with the same index
        differ in num_tokens, num_bytes or answer.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/multiple_choice")
    >>> result = metric.compute(
    ...     log_likelihoods=[[-6.0, -8.0], [-3.0, -3.0]],
    ...     num_tokens=[[2, 4], [1, 3]],
    ...     num_bytes=[[6, 8], [5, 15]],
    ...     answer=[0, 1],
    ... )
    >>> result["accuracy"], result["accuracy_per_token"], result["chance"]
    (0.75, 0.5, 0.5)
"""

_CITATION = """
@inproceedings{brown2020language,
    title={Language Models are Few-Shot Learners},
    author={Brown, Tom B. and others},
    booktitle={NeurIPS},
    note={arXiv:2005.14165, section 2.4: choices compared by likelihood per token},
    year={2020}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MultipleChoice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "log_likelihoods": datasets.Sequence(datasets.Value("float64")),
                    "num_tokens": datasets.Sequence(datasets.Value("int64")),
                    "num_bytes": datasets.Sequence(datasets.Value("int64")),
                    "answer": datasets.Value("int64"),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(self, *, return_items: bool = False, **columns: list) -> dict:
        _check_given(columns)
        for item in range(len(columns["answer"])):
            _check_item(item, {name: column[item] for name, column in columns.items()})
        columns = _distinct(columns, same=("num_tokens", "num_bytes", "answer"))
        scores: dict[str, list[float]] = {"accuracy": [], "accuracy_per_token": [], "accuracy_per_byte": []}
        for likelihoods, tokens, size, answer in zip(
            columns["log_likelihoods"], columns["num_tokens"], columns["num_bytes"], columns["answer"], strict=True
        ):
            scores["accuracy"].append(_credit(likelihoods, answer))
            scores["accuracy_per_token"].append(_credit(_divided(likelihoods, tokens), answer))
            scores["accuracy_per_byte"].append(_credit(_divided(likelihoods, size), answer))
        scores["chance"] = [1 / len(likelihoods) for likelihoods in columns["log_likelihoods"]]
        number = len(columns["answer"])
        # fsum rounds once, so that the order of the items does not matter.
        result: dict = {name: math.fsum(column) / number for name, column in scores.items()}
        result["num_items"] = number
        if return_items:
            result["items"] = scores | {name: columns[name] for name in columns if name == "index"}
        return result


def _credit(scores: list[float], answer: int) -> float:
    best = max(scores)
    return 1 / scores.count(best) if scores[answer] == best else 0.0


def _divided(likelihoods: list[float], lengths: list[int]) -> list[float]:
    # Division rounds correctly: choices whose exact quotients are equal stay tied.
    return [likelihood / length for likelihood, length in zip(likelihoods, lengths, strict=True)]


def _check_item(item: int, given: dict) -> None:
    choices = len(given["log_likelihoods"])
    if choices < 2:
        raise ValueError(f"log_likelihoods must hold at least two choices; got {choices} in item {item}")
    for likelihood in given["log_likelihoods"]:
        if not (math.isfinite(likelihood) and likelihood <= 0):
            raise ValueError(f"log_likelihoods must be finite and at most 0; got {likelihood} in item {item}")
    for name in ("num_tokens", "num_bytes"):
        if len(given[name]) != choices:
            raise ValueError(
                f"{name} must hold a value for each choice ({choices}); got {len(given[name])} in item {item}"
            )
        if min(given[name]) < 1:
            raise ValueError(f"{name} must be at least 1; got {min(given[name])} in item {item}")
    if not 0 <= given["answer"] < choices:
        raise ValueError(f"answer must be from 0 to {choices - 1}; got {given['answer']} in item {item}")


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
