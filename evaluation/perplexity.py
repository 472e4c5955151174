"""Bits per byte and perplexity of a causal language model on held-out documents, domain by domain.

Shapes: B sequences, T positions, V vocabulary; W windows of the evaluation set.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import evaluate
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import IGNORE_INDEX, evaluation_windows, padded_batches
from .comparison import Scores
from .processes import evaluating, gather, this_process

BITS_PER_BYTE = Path(__file__).parent / "metrics" / "bits_per_byte"
ALL = "all"


def evaluate_domains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    *,
    block_size: int = 512,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """How well `model` predicts each domain of `documents`, and all of them pooled.

    Under `accelerate launch` the windows are dealt out to all processes, each of which returns the whole result; their
    number changes no digit of it.

    Args:
        documents: columns `text` and `domain`. Each token is predicted once, from the tokens before it in its window.
        block_size: the longest window, in tokens.
        batch_size: windows in one forward pass. It changes speed and memory; of the result only how matrix products
            are rounded.

    Returns:
        For each domain in alphabetical order, then for `"all"`, what the metric `bits_per_byte` returns:
        `bits_per_byte` (bits per UTF-8 byte), `perplexity`, `nats_per_token`, `num_tokens`, `num_bytes`.
        `"all"` is the micro average: a domain weighs as much as it has bytes, or tokens.

    Raises:
        ValueError: `documents` hold no text, a domain is named "all", a size is too small, or the model's
            log-likelihoods are not finite.
    """
    return measure_documents(model, tokenizer, documents, block_size=block_size, batch_size=batch_size).by_domain()


@dataclass(frozen=True)
class DocumentMeasures:
    """What a model needed for each window of each document, [W] each."""

    nll: list[float]
    """Nats, summed over the tokens predicted in the window."""
    num_tokens: list[int]
    num_bytes: list[int]
    """Of the whole document on its first window, 0 on the others."""
    documents: list[int]
    domains: list[str]

    def by_domain(self) -> dict[str, dict[str, float]]:
        """What `evaluate_domains` returns."""
        metric = evaluate.load(str(BITS_PER_BYTE), keep_in_memory=True)
        columns: dict[str, list] = {"nll": self.nll, "num_tokens": self.num_tokens, "num_bytes": self.num_bytes}
        return {
            domain: metric.compute(**{name: [values[row] for row in rows] for name, values in columns.items()})
            for domain, rows in self._rows().items()
        }

    def scores(self) -> dict[str, Scores]:
        """Bits and bytes of the windows of each domain, and of all; a document's are not independent."""
        return {
            domain: Scores(
                values=[self.nll[row] / math.log(2) for row in rows],
                weights=[self.num_bytes[row] for row in rows],
                clusters=[str(self.documents[row]) for row in rows],
            )
            for domain, rows in self._rows().items()
        }

    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {domain: [] for domain in sorted(set(self.domains))}
        for row, domain in enumerate(self.domains):
            rows[domain].append(row)
        return rows | {ALL: list(range(len(self.domains)))}


def measure_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Dataset, *, block_size: int, batch_size: int
) -> DocumentMeasures:
    """Computes what `evaluate_domains` sums up; takes and raises the same."""
    if ALL in documents["domain"]:
        raise ValueError(f"domain must not be {ALL!r}, the name of the pooled result; got it")
    windows = evaluation_windows(documents, tokenizer, block_size)
    nll, num_tokens = window_log_likelihoods(model, windows, batch_size=batch_size)
    return DocumentMeasures(
        nll=nll.tolist(),
        num_tokens=num_tokens.tolist(),
        num_bytes=windows["num_bytes"][:],
        documents=windows["document"][:],
        domains=windows["domain"][:],
    )


def window_log_likelihoods(model: PreTrainedModel, windows: Dataset, *, batch_size: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each window, summed over its labels, and the number of those labels.

    Args:
        windows: columns `input_ids` and `labels`, aligned (a label is the token at its own position, and is
            predicted from the position before); -100 marks a position that is not predicted.

    Returns:
        On every process, `nll` [W] in nats, float64, and `num_tokens` [W], int64.
    """
    found: list[tuple[int, tuple[float, int]]] = []
    state = this_process()
    part = (state.process_index, state.num_processes)
    with evaluating(model):
        for rows, batch in padded_batches(windows, batch_size, "evaluating", part=part):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            nll = sequence_nll(model(**batch, use_cache=False).logits, labels).tolist()
            num_tokens = labels[:, 1:].ne(IGNORE_INDEX).sum(-1).tolist()
            found += zip(rows.tolist(), zip(nll, num_tokens, strict=True), strict=True)
    of_all = gather(found, len(windows))
    return torch.tensor([one[0] for one in of_all], dtype=torch.float64), torch.tensor([one[1] for one in of_all])


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL in nats of each sequence's labels: `logits` [B, T, V], `labels` [B, T] -> [B] float64."""
    # Sequence by sequence: the fp32 copy and its log-softmax are then [T, V], however large the batch.
    return torch.stack(
        [
            F.cross_entropy(row_logits[:-1].float(), row_labels[1:], ignore_index=IGNORE_INDEX, reduction="none").sum(
                dtype=torch.float64
            )
            for row_logits, row_labels in zip(logits, labels, strict=True)
        ]
    )
