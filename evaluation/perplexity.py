"""Bits per byte and perplexity of a causal language model on held-out documents, domain by domain.

Shapes: B sequences, T positions, V vocabulary; W windows of the evaluation set.
"""

from pathlib import Path

import evaluate
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import IGNORE_INDEX, evaluation_windows, padded_batches

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

    Args:
        documents: columns `text` and `domain`. Each token is predicted once, from the tokens before it in its window.
        block_size: the longest window, in tokens.
        batch_size: windows in one forward pass. It changes the speed and the memory, not the result.

    Returns:
        For each domain in alphabetical order, then for `"all"`, what the metric `bits_per_byte` returns:
        `bits_per_byte` (bits per UTF-8 byte), `perplexity`, `nats_per_token`, `num_tokens`, `num_bytes`.
        `"all"` is the micro average: a domain weighs as much as it has bytes, or tokens.

    Raises:
        ValueError: `documents` hold no text, a domain is named "all", a size is too small, or the model's
            log-likelihoods are not finite.
    """
    windows = evaluation_windows(documents, tokenizer, block_size)
    window_domains = windows["domain"][:]
    domains = sorted(set(window_domains))
    if ALL in domains:
        raise ValueError(f"domain must not be {ALL!r}, the name of the pooled result; got {domains}")

    nll, num_tokens = window_log_likelihoods(model, windows, batch_size=batch_size)
    columns = {"nll": nll.tolist(), "num_tokens": num_tokens.tolist(), "num_bytes": windows["num_bytes"][:]}
    metric = evaluate.load(str(BITS_PER_BYTE), keep_in_memory=True)
    results = {}
    for domain in domains:
        rows = [row for row, name in enumerate(window_domains) if name == domain]
        results[domain] = metric.compute(**{name: [values[row] for row in rows] for name, values in columns.items()})
    results[ALL] = metric.compute(**columns)
    return results


@torch.no_grad()
def window_log_likelihoods(model: PreTrainedModel, windows: Dataset, *, batch_size: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each window, summed over its labels, and the number of those labels.

    Args:
        windows: columns `input_ids` and `labels`, aligned (a label is the token at its own position, and is
            predicted from the position before); -100 marks a position that is not predicted.

    Returns:
        `nll` [W] in nats, float64, and `num_tokens` [W], int64.
    """
    nll = torch.zeros(len(windows), dtype=torch.float64)
    num_tokens = torch.zeros(len(windows), dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for rows, batch in padded_batches(windows, batch_size, "evaluating"):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            nll[rows] = sequence_nll(model(**batch, use_cache=False).logits, labels).cpu()
            num_tokens[rows] = labels[:, 1:].ne(IGNORE_INDEX).sum(-1).cpu()
    finally:
        model.train(was_training)
    return nll, num_tokens


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
