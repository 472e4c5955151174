"""Blocks: the documents of one domain, shuffled and end to end, cut into training blocks when they are asked for.

    [bos] a a a [eos] [bos] b b b b b | b b [eos] ...      documents of one domain, cut into blocks
      0   1 2 3   4     0   1 2 3 4 5 | 0 1   2            position_ids
     -100 a a a [eos] -100  b b b b b |-100 b [eos]        labels

Attention that reads `position_ids` keeps the documents of a block apart. Transformers does so only where
`attention_mask` is None, so blocks carry none. What is kept on disk are the documents' tokens; where a block begins
is arithmetic, so another length of block or another seed needs nothing new.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .documents import DomainDocuments
from .encoding import IGNORE_INDEX, encode_documents
from .keys import cache_file, key_of
from .order import DOCUMENTS, generator

_BATCH_BYTES = 8_000_000  # of text tokenised at once: enough to keep every core busy


class Blocks:
    """The blocks of one domain, read from the memory-mapped tokens of its documents.

    Args:
        tokens: One row per document, `input_ids`.
        block_size: Tokens per block.
        seed: Shuffles the documents.
        domain: Number of the domain; each has its own shuffle.
    """

    def __init__(self, tokens: Dataset, block_size: int, *, seed: int, domain: int) -> None:
        self._tokens = tokens.with_format("arrow")
        lengths = [chunk.value_lengths().to_numpy() for chunk in tokens.data.column("input_ids").chunks]
        document_lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        self._order = generator(seed, DOCUMENTS, domain).permutation(len(tokens))
        # where each document ends, in tokens of the whole shuffled domain
        self._ends = np.cumsum(document_lengths[self._order])
        self.block_size = block_size
        self.num_tokens = int(document_lengths.sum())

    def __len__(self) -> int:
        """Whole blocks; the tokens after the last are not trained on."""
        return self.num_tokens // self.block_size

    def __getitem__(self, number: int) -> np.ndarray:
        """Input ids and position ids of a block, `[2, T]` int64."""
        start, stop = number * self.block_size, (number + 1) * self.block_size
        first, last = np.searchsorted(self._ends, start, side="right"), np.searchsorted(self._ends, stop, side="left")
        rows = self._tokens[self._order[first : last + 1].tolist()].column("input_ids")
        documents = [document.values.to_numpy() for document in rows]
        begins = self._ends[first] - len(documents[0])
        documents[0] = documents[0][start - begins :]
        documents[-1] = documents[-1][: len(documents[-1]) - (self._ends[last] - stop)]
        return lay_out(documents)


def lay_out(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """A block of pieces of documents: input ids, and positions that begin again with each piece, `[2, T]` int64."""
    return np.stack([np.concatenate(pieces), np.concatenate([np.arange(len(piece)) for piece in pieces])]).astype(
        np.int64
    )


def labels_of(block: np.ndarray) -> np.ndarray:
    """The labels of blocks `[..., 2, T]`: their input ids, without the first token of each piece, `[..., T]`.

    Nothing is predicted across pieces; the loss shifts labels.
    """
    input_ids, position_ids = block[..., 0, :], block[..., 1, :]
    return np.where(position_ids == 0, IGNORE_INDEX, input_ids)


def tokenize(documents: DomainDocuments, tokenizer: PreTrainedTokenizerBase, tokenizer_key: str) -> Dataset:
    """The tokens of a domain's training documents, `input_ids`, each opened and closed; kept in the cache under the
    documents' and the tokenizer's content."""
    mean_bytes = documents.train_bytes / len(documents.train)
    tokens = documents.train.with_format("arrow").map(
        _tokenize,
        batched=True,
        batch_size=int(np.clip(_BATCH_BYTES / max(mean_bytes, 1), 1, 1000)),
        remove_columns=documents.train.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        features=Features({"input_ids": List(Value("int32"))}),
        cache_file_name=cache_file(key_of(documents.key, tokenizer_key), "tokens"),
        desc="Tokenising",
    )
    return tokens.with_format(None)


def _tokenize(table: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    encoded = encode_documents(tokenizer, table.column("text").to_pylist())
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.table({"input_ids": pa.ListArray.from_arrays(offsets, np.concatenate(encoded))})
