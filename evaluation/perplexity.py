"""Bits per byte and perplexity of a causal language model on held-out documents, domain by domain.

Shapes: B sequences, T positions, V vocabulary; W windows of the evaluation set.
"""

from pathlib import Path

import evaluate
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import evaluation_windows

BITS_PER_BYTE = Path(__file__).parent / "metrics" / "bits_per_byte"
ALL = "all"
IGNORED = -100


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
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    windows = evaluation_windows(documents, tokenizer, block_size)
    if len(windows) == 0:
        raise ValueError(f"documents must hold at least one document with text; got {len(documents)} without")
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
    windows = windows.select_columns(["input_ids", "labels"]).with_format("torch")
    lengths = torch.tensor([len(ids) for ids in windows["input_ids"]])
    # Windows of like length share a batch, so little is padding; the longest come first, so memory only falls.
    order = lengths.argsort(descending=True, stable=True)
    nll = torch.zeros(len(windows), dtype=torch.float64)
    num_tokens = torch.zeros(len(windows), dtype=torch.int64)

    was_training = model.training
    model.eval()
    try:
        with tqdm(total=int(lengths.sum()), desc="evaluating", unit="token", unit_scale=True, disable=None) as bar:
            for rows in order.split(batch_size):
                batch = windows[rows.tolist()]
                input_ids = pad_sequence(batch["input_ids"], batch_first=True).to(model.device)
                labels = pad_sequence(batch["labels"], batch_first=True, padding_value=IGNORED).to(model.device)
                real = torch.arange(input_ids.shape[1]) < lengths[rows, None]  # [B, T]
                logits = model(
                    input_ids=input_ids, attention_mask=real.long().to(model.device), use_cache=False
                ).logits
                nll[rows] = sequence_nll(logits, labels).cpu()
                num_tokens[rows] = labels[:, 1:].ne(IGNORED).sum(-1).cpu()
                bar.update(int(lengths[rows].sum()))
    finally:
        model.train(was_training)
    return nll, num_tokens


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL in nats of each sequence's labels: `logits` [B, T, V], `labels` [B, T] -> [B] float64."""
    # Sequence by sequence: the fp32 copy and its log-softmax are then [T, V], however large the batch.
    return torch.stack(
        [
            F.cross_entropy(row_logits[:-1].float(), row_labels[1:], ignore_index=IGNORED, reduction="none").sum(
                dtype=torch.float64
            )
            for row_logits, row_labels in zip(logits, labels, strict=True)
        ]
    )
