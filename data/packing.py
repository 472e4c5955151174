"""Packing: documents in, training blocks of one length out.

    [bos] a a a [eos] [bos] b b b b b | b b [eos] ...      documents of one domain, cut into blocks
      0   1 2 3   4     0   1 2 3 4 5 | 0 1   2            position_ids
     -100 a a a [eos] -100  b b b b b |-100 b [eos]        labels

Attention that reads `position_ids` keeps the documents of a block apart. Transformers does so only where
`attention_mask` is None, so blocks carry none.
"""

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .documents import document_domains

# The loss leaves out labels of this value (torch.nn.functional.cross_entropy's default).
IGNORE_INDEX = -100


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    domains: list[str],
    seed: int = 0,
    num_proc: int | None = None,
) -> Dataset:
    """Cuts the documents of each domain, shuffled and end to end, into blocks of `block_size` tokens.

    Args:
        documents: Columns `text` and `domain`.
        tokenizer: A fast tokenizer with an eos token; where it has no bos token, eos stands for it.
        block_size: Tokens per block, at least 2.
        domains: Every domain's name; a block's `domain` is an index into it.
        seed: Shuffles the documents within their domain.
        num_proc: Processes that tokenise; None is this one.

    Returns:
        One row per block: `input_ids`, `position_ids` (from 0 at each document and at each block) and `labels`
        (`input_ids`, with -100 at the first position of each document and block, so that nothing is predicted
        across them; the loss shifts labels), each of `block_size` int32; and `domain`. Blocks of one domain
        stand together, in the order of `domains`. A domain's last, incomplete block is dropped.

    Raises:
        ValueError: `block_size` is below 2; the tokenizer has no eos token; a document's domain is not in
            `domains`; a domain has fewer than `block_size` tokens.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, for a token to be predicted from another; got {block_size}")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos token to end documents with; got one without")
    names = document_domains(documents)
    unknown = sorted(set(names) - set(domains))
    if unknown:
        raise ValueError(f"domains must name the domain of every document; got {domains}, without {unknown}")

    tokenized = documents.map(
        _tokenize,
        batched=True,
        input_columns="text",
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        features=Features({"input_ids": List(Value("int32"))}),
        num_proc=num_proc,
        desc="Tokenising",
    ).with_format("arrow")

    columns = ("input_ids", "position_ids", "labels")
    features = Features(
        {name: List(Value("int32"), length=block_size) for name in columns} | {"domain": Value("int64")}
    )
    packed = []
    for index, domain in enumerate(domains):
        order = np.random.default_rng((seed, index)).permutation(np.flatnonzero(names == domain))
        blocks = tokenized.select(order).map(
            _cut,
            batched=True,
            batch_size=None,  # the whole domain at once: a block goes on where the one before it ended
            remove_columns=["input_ids"],
            fn_kwargs={"block_size": block_size, "domain": index},
            features=features,
            desc=f"Packing {domain}",
        )
        if not len(blocks):
            num_tokens = sum(len(ids) for ids in tokenized.select(order).with_format(None)["input_ids"])
            raise ValueError(
                f"block_size must be at most the number of tokens of every domain; "
                f"got {block_size}, and {domain} has {num_tokens}"
            )
        packed.append(blocks.with_format(None))
    return concatenate_datasets(packed)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain text: a special token's name written in a document is text like any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]
    # Straight to the tokenizer's own threads: through Transformers the same ids take more than twice as long.
    # Transformers sets these three anew at each of its own calls.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def first_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that opens a document: bos, or eos where the tokenizer has no bos."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    first, last = first_token_id(tokenizer), tokenizer.eos_token_id
    return {"input_ids": [[first, *ids, last] for ids in encode(tokenizer, texts)]}


def _cut(table: pa.Table, block_size: int, domain: int) -> pa.Table:
    column = table.column("input_ids").combine_chunks()
    ids = column.flatten().to_numpy()
    # offsets of the documents within `ids`, whichever slice of a larger array the column is
    starts = np.cumsum(column.value_lengths().to_numpy()) - column.value_lengths().to_numpy()
    num_blocks = len(ids) // block_size
    ids = ids[: num_blocks * block_size]

    positions = np.arange(len(ids), dtype=np.int64)
    segment_start = positions // block_size * block_size
    segment_start[starts[starts < len(ids)]] = starts[starts < len(ids)]
    positions -= np.maximum.accumulate(segment_start)
    labels = np.where(positions == 0, IGNORE_INDEX, ids)

    def blocks(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.int32)), block_size)

    return pa.table(
        {
            "input_ids": blocks(ids),
            "position_ids": blocks(positions),
            "labels": blocks(labels),
            "domain": pa.array(np.full(num_blocks, domain, dtype=np.int64)),
        }
    )
