"""Bits per byte and perplexity of a language model, from summed log-likelihoods."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Bits per byte: how many bits a language model needs for one UTF-8 byte of the text,

    bits_per_byte = sum(nll) / (ln 2 * sum(num_bytes))

with nll in nats. From 0 (the text is certain) upwards, lower is better; 8 is a uniform guess over bytes.
Unlike perplexity, exp(sum(nll) / sum(num_tokens)), from 1 upwards, it does not depend on the tokenizer,
so models with different vocabularies can be compared. Both are micro averages: every byte, or every token, counts
the same.
"""

_KWARGS_DESCRIPTION = """
Args:
    nll (list of float): negative log-likelihood of each item in nats, summed over the tokens predicted in it.
    num_tokens (list of int): how many tokens were predicted in each item.
    num_bytes (list of int): length of each item's text in UTF-8 bytes. An item may have 0, for instance the second
        window of a document whose bytes were counted with the first.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    return_items (bool): whether to return `items` too.
Returns:
    bits_per_byte: bits per UTF-8 byte, >= 0.
    perplexity: exp of nats_per_token, >= 1 (inf when that overflows).
    nats_per_token: mean negative log-likelihood of a token, >= 0.
    num_tokens: tokens predicted in all items.
    num_bytes: UTF-8 bytes in all items.
    items: columns with one value per item, in input order, or in order of the index: nll, num_tokens, num_bytes (the
        results are ratios of their sums, so resample these) and bits_per_byte (nan where num_bytes is 0); index.
Raises:
    ValueError: an nll is negative or not finite, a count is negative, the tokens or bytes of all items sum to 0, or
        items with the same index differ in num_tokens or num_bytes.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/bits_per_byte")
    >>> metric.compute(nll=[8 * 0.6931471805599453], num_tokens=[2], num_bytes=[4])["bits_per_byte"]
    2.0
"""

_CITATION = """
@article{gao2020pile,
    title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
    author={Gao, Leo and others},
    journal={arXiv:2101.00027},
    note={Section 3.1, bits per UTF-8 encoded byte},
    year={2020}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "nll": datasets.Value("float64"),
                    "num_tokens": datasets.Value("int64"),
                    "num_bytes": datasets.Value("int64"),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(self, *, return_items: bool = False, **columns: list) -> dict:
        # Lists, since MetricInfo(format="numpy") would round them to float32.
        _check_given(columns)
        nll = columns["nll"]
        _require("nll must be finite and at least 0", nll, np.isfinite(nll) & np.greater_equal(nll, 0))
        for name in ("num_tokens", "num_bytes"):
            _require(f"{name} must be at least 0", columns[name], np.greater_equal(columns[name], 0))
        columns = _distinct(columns, same=("num_tokens", "num_bytes"))
        tokens = sum(columns["num_tokens"])
        length = sum(columns["num_bytes"])
        if tokens == 0:
            raise ValueError("num_tokens must sum to more than 0; got 0")
        if length == 0:
            raise ValueError("num_bytes must sum to more than 0; got 0")
        nats = math.fsum(columns["nll"])  # correctly rounded, so that the order of the items does not matter
        nats_per_token = nats / tokens
        result = {
            "bits_per_byte": nats / (math.log(2) * length),
            "perplexity": math.exp(nats_per_token) if nats_per_token < 709 else math.inf,
            "nats_per_token": nats_per_token,
            "num_tokens": tokens,
            "num_bytes": length,
        }
        if return_items:
            each = zip(columns["nll"], columns["num_bytes"], strict=True)
            bits = [nll / (math.log(2) * size) if size else math.nan for nll, size in each]
            result["items"] = {**columns, "bits_per_byte": bits}
        return result


def _require(rule: str, values: list, valid: np.ndarray) -> None:
    if not valid.all():
        item = int(np.argmin(valid))
        raise ValueError(f"{rule}; got {values[item]} in item {item}")


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
