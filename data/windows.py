"""Windows: documents cut for evaluation, so that every token of every document is predicted once.

[bos] t1 t2 t3 | t3 t4 t5 t6 | t6 t7        block_size 4
 -100 t1 t2 t3 |-100 t4 t5 t6 |-100 t7      labels

Shapes: B windows, T positions.
"""

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .encoding import IGNORE_INDEX, encode, first_token_id


def windows(token_ids: Sequence[int], block_size: int) -> list[list[int]]:
    """Cuts one document into windows of at most `block_size` tokens, each beginning with the last of the one before.

    Args:
        token_ids: The token that opens the document, then the document's own. These are all predicted once.
        block_size: Tokens per window, at least 2.

    Raises:
        ValueError: `block_size` is below 2.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, for a token to be predicted from another; got {block_size}")
    stride = block_size - 1
    return [list(token_ids[start : start + block_size]) for start in range(0, len(token_ids) - 1, stride)]


def evaluation_windows(documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Cuts each document, `[bos] tokens`, into windows whose labels hold each of its tokens exactly once.

    Args:
        documents: Columns `text` and `domain`.
        tokenizer: A fast tokenizer; where it has no bos token, eos stands for it.
        block_size: Most tokens in a window, at least 2.

    Returns:
        One row per window: `input_ids`, `labels` (`input_ids`, with -100 at the first position; the loss shifts
        labels), `document` (index into `documents`), `num_bytes` (UTF-8 bytes of the document on its first
        window and 0 on the others, so that the column's sum is the bytes predicted), `domain`. A document
        without text has no window.

    Raises:
        ValueError: `block_size` is below 2; the tokenizer has neither bos nor eos token.
    """
    windows([], block_size)
    if first_token_id(tokenizer) is None:
        raise ValueError("tokenizer must have a bos or an eos token to begin documents with; got one without")
    return documents.map(
        _window_batch,
        batched=True,
        with_indices=True,
        input_columns=["text", "domain"],
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer, "block_size": block_size},
        features=Features(
            {
                "input_ids": List(Value("int32")),
                "labels": List(Value("int32")),
                "document": Value("int64"),
                "num_bytes": Value("int64"),
                "domain": Value("string"),
            }
        ),
        desc="Cutting evaluation windows",
    )


def padded_batches(
    windows: Dataset, batch_size: int, description: str, part: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Windows of like length together, so that little is padding; the longest first, so that memory only falls.

    Args:
        windows: From `evaluation_windows`.
        batch_size: Windows in a batch, at least 1.
        description: Stands before the progress bar, which counts tokens.
        part: This process and how many there are, which take turns at the batches: the batches are the same for any
            number of processes. The first shows the bar.

    Yields:
        The rows of the batch `[B]`, and `input_ids`, `labels` and `attention_mask` `[B, T]`, padded on the right.

    Raises:
        ValueError: `batch_size` is below 1, or there are no windows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if len(windows) == 0:
        raise ValueError("documents must hold at least one document with text; got none")
    windows = windows.select_columns(["input_ids", "labels"]).with_format("torch")
    lengths = torch.tensor([len(ids) for ids in windows["input_ids"]])
    order = lengths.argsort(descending=True, stable=True)
    batches = order.split(batch_size)[part[0] :: part[1]]
    total = sum(int(lengths[rows].sum()) for rows in batches)
    hidden = True if part[0] else None
    with tqdm(total=total, desc=description, unit="token", unit_scale=True, disable=hidden) as progress:
        for rows in batches:
            batch = windows[rows.tolist()]
            input_ids = pad_sequence(batch["input_ids"], batch_first=True)
            labels = pad_sequence(batch["labels"], batch_first=True, padding_value=IGNORE_INDEX)
            attention_mask = (torch.arange(input_ids.shape[1]) < lengths[rows, None]).long()
            yield rows, {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
            progress.update(int(lengths[rows].sum()))


def _window_batch(
    texts: list[str],
    domains: list[str],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
) -> dict[str, list]:
    rows: dict[str, list] = {name: [] for name in ("input_ids", "labels", "document", "num_bytes", "domain")}
    first = first_token_id(tokenizer)
    for text, domain, index, ids in zip(texts, domains, indices, encode(tokenizer, texts), strict=True):
        for number, window in enumerate(windows([first, *ids], block_size)):
            rows["input_ids"].append(window)
            rows["labels"].append([IGNORE_INDEX, *window[1:]])
            rows["document"].append(index)
            rows["num_bytes"].append(0 if number else len(text.encode()))
            rows["domain"].append(domain)
    return rows
