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
Returns:
    bits_per_byte: bits per UTF-8 byte, >= 0.
    perplexity: exp of nats_per_token, >= 1 (inf when that overflows).
    nats_per_token: mean negative log-likelihood of a token, >= 0.
    num_tokens: tokens predicted in all items.
    num_bytes: UTF-8 bytes in all items.
Raises:
    ValueError: an nll is negative or not finite, a count is negative, or the tokens or bytes of all items sum to 0.
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
                }
            ),
        )

    def _compute(self, nll: list[float], num_tokens: list[int], num_bytes: list[int]) -> dict[str, float]:
        # Lists, since MetricInfo(format="numpy") would round them to float32.
        _require("nll must be finite and at least 0", nll, np.isfinite(nll) & np.greater_equal(nll, 0))
        _require("num_tokens must be at least 0", num_tokens, np.greater_equal(num_tokens, 0))
        _require("num_bytes must be at least 0", num_bytes, np.greater_equal(num_bytes, 0))
        tokens = sum(num_tokens)
        length = sum(num_bytes)
        if tokens == 0:
            raise ValueError("num_tokens must sum to more than 0; got 0")
        if length == 0:
            raise ValueError("num_bytes must sum to more than 0; got 0")
        nats = math.fsum(nll)  # correctly rounded, so that the order of the items does not matter
        nats_per_token = nats / tokens
        return {
            "bits_per_byte": nats / (math.log(2) * length),
            "perplexity": math.exp(nats_per_token) if nats_per_token < 709 else math.inf,
            "nats_per_token": nats_per_token,
            "num_tokens": tokens,
            "num_bytes": length,
        }


def _require(rule: str, values: list, valid: np.ndarray) -> None:
    if not valid.all():
        item = int(np.argmin(valid))
        raise ValueError(f"{rule}; got {values[item]} in item {item}")
