"""Windows: documents cut for evaluation, so that every token of every document is predicted once.

[bos] t1 t2 t3 | t3 t4 t5 t6 | t6 t7        block_size 4
 -100 t1 t2 t3 |-100 t4 t5 t6 |-100 t7      labels
"""

from collections.abc import Sequence

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .packing import IGNORE_INDEX, encode, first_token_id


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
