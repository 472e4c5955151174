"""Streams: documents read as they are needed, window by window, and cut into blocks; a place in one is a small record.

A window of documents is shuffled by a generator of (seed, domain, window), tokenised and cut like the documents of
`Blocks`; the k-th block of the domain is the k-th of this endless sequence. To go on from a place, its window is read
again, never what came before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from .blocks import lay_out
from .documents import document_hash, is_held_out
from .encoding import encode_documents
from .order import WINDOWS, generator

# A window is full with so many documents, or so many bytes of text.
WINDOW_DOCUMENTS = 1000
WINDOW_BYTES = 8_000_000
# A stream of at most so many files is split into the files' own parts (row groups of parquet), in which a place is
# found at once; for that each file's table of contents is read. Of more, the file that a place lies in is read anew.
_SPLIT_FILES = 100
# Documents tokenised at once: the rest of the window waits until it is needed.
_ENCODED_DOCUMENTS = 64
_ENCODED_BYTES = 1_000_000


@dataclass
class TextStream:
    """The documents of one streamed domain, those held out apart."""

    name: str
    """The domain."""
    place: str
    """Where it comes from, for errors."""
    dataset: IterableDataset
    text_column: str
    validation: IterableDataset | None
    """The held-out documents, where the source has them apart; those of them that are in `held_out` are not trained on
    where they stand in the stream too."""
    validation_fraction: float
    """Else this share of the documents is held out, by a hash of the text."""
    max_train_bytes: int | None
    """Training text of an epoch: what comes after it in the stream is not read."""
    max_validation_bytes: int
    split_seed: int = 0
    """Seeds that hash."""

    @cached_property
    def held_out(self) -> list[str]:
        """The first held-out texts of the stream, up to `max_validation_bytes`.

        Raises:
            ValueError: there are none.
        """
        texts, size = [], 0
        for text in _texts(self.validation or self.dataset.with_format(None), self):
            text_bytes = len(text.encode())
            if not text or text.isspace() or text_bytes > self.max_validation_bytes:
                continue
            if self.validation is None and not is_held_out(
                document_hash(text, self.split_seed), self.validation_fraction
            ):
                continue
            size += text_bytes
            if size > self.max_validation_bytes:
                break
            texts.append(text)
        if not texts:
            raise ValueError(
                f"{self.place}: domain {self.name}: the stream must hold a held-out document with text that fits "
                f"max_validation_bytes ({self.max_validation_bytes}); got none"
            )
        return texts

    @cached_property
    def split_dataset(self) -> IterableDataset:
        """The data set, split as far as its files allow, in the same order."""
        if self.dataset.num_shards > _SPLIT_FILES or not hasattr(self.dataset, "reshard"):  # an older datasets
            return self.dataset
        return self.dataset.reshard()

    @cached_property
    def _held_out_hashes(self) -> set[int]:
        return {document_hash(text, self.split_seed) for text in self.held_out}

    def training_texts(self) -> Iterator[str]:
        """The texts that are not held out, from the beginning of the stream."""
        return filter(self.is_trained_on, _texts(self.dataset.with_format(None), self))

    def is_trained_on(self, text: str) -> bool:
        """False for documents without text and for those held out."""
        if not text or text.isspace():
            return False
        number = document_hash(text, self.split_seed)
        if self.validation is not None:
            return number not in self._held_out_hashes
        return not is_held_out(number, self.validation_fraction)


class WindowReader:
    """Reads a stream window by window, without end; where the stream ends it begins again.

    Args:
        stream: What is read.
        state: Where to begin, a `state` of another reader of this stream; None is the beginning.
    """

    def __init__(self, stream: TextStream, state: dict[str, Any] | None = None) -> None:
        self._stream = stream
        num_shards = stream.split_dataset.num_shards
        self.state = state or {"window": 0, "epoch": 0, "epoch_bytes": 0, "shards": num_shards, "source": None}
        """Where the next window begins, JSON-able: its number, how often the stream has been gone through, bytes of
        training text read of it this time, and the place in `datasets`' own terms, which count its parts."""
        if self.state["shards"] != num_shards:
            raise ValueError(
                f"{stream.place}: domain {stream.name}: state must be of a stream of as many parts ({num_shards}); "
                f"got one of {self.state['shards']}: of other files, or of another version of datasets"
            )
        self._open()

    def next(self) -> list[str]:
        """The texts of the next window, in the order of the stream; never none.

        Raises:
            ValueError: the stream has no document to train on, or a document without the text column.
        """
        state = dict(self.state)
        texts: list[str] = []
        window_bytes = 0
        while len(texts) < WINDOW_DOCUMENTS and window_bytes < WINDOW_BYTES:
            text = next(self._texts, None)
            size = 0 if text is None else len(text.encode())
            cap = self._stream.max_train_bytes
            if text is not None and cap is not None and size > cap:
                continue  # it fits no epoch
            if text is not None and self._stream.is_trained_on(text):
                if cap is None or state["epoch_bytes"] + size <= cap:
                    texts.append(text)
                    window_bytes += size
                    state["epoch_bytes"] += size
                    continue
            elif text is not None:
                continue
            # The end of the stream, or of what shall be read of it.
            if not state["epoch_bytes"]:
                raise ValueError(
                    f"{self._stream.place}: domain {self._stream.name}: the stream must hold a document with text "
                    f"that is not held out and fits max_train_bytes ({cap}); got none"
                )
            state |= {"epoch": state["epoch"] + 1, "epoch_bytes": 0, "source": None}
            self.state = state
            self._open()
            if texts:
                break
        else:
            state["source"] = self._dataset.state_dict()
        self.state = state | {"window": state["window"] + 1}
        return texts

    def _open(self) -> None:
        # A data set keeps its own place: every reader has one of its own.
        self._dataset = self._stream.split_dataset.with_format(None)
        if self.state["source"] is not None:
            self._dataset.load_state_dict(self.state["source"])
        self._texts = _texts(self._dataset, self._stream)


class BlockReader:
    """Cuts a stream into blocks, one after another.

    Args:
        stream: What is read.
        tokenizer: A copy of its own, for it is used in a thread of its own.
        block_size: Tokens per block.
        seed: Shuffles every window.
        domain: Number of the domain; each has its own shuffles.
        state: Where to begin, from `state_dict`; None is the beginning.
    """

    def __init__(
        self,
        stream: TextStream,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        seed: int,
        domain: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._block_size = tokenizer, block_size
        self._seed, self._domain = seed, domain
        self._windows = WindowReader(stream, None if state is None else state["reader"])
        self.block = 0
        """Number of the next block."""
        self._enter_window()
        if state is not None:
            self.block, self._document, self._token = state["block"], state["document"], state["token"]

    def state_dict(self) -> dict[str, Any]:
        """The place of the next block, JSON-able: where its window begins in the stream, the document in the shuffled
        window and the token in that document."""
        return {
            "reader": self._window,
            "block": self.block,
            "document": self._document,
            "token": self._token,
        }

    @property
    def epoch(self) -> int:
        """How often the stream has been gone through."""
        return self._window["epoch"]

    def next(self) -> np.ndarray:
        """Input ids and position ids of the next block, `[2, T]` int64."""
        pieces, missing = [], self._block_size
        while missing:
            if self._document == len(self._texts):
                self._enter_window()
            ids = self._encoded(self._document)[self._token :][:missing]
            pieces.append(ids)
            missing -= len(ids)
            self._token += len(ids)
            if self._token == len(self._encoded(self._document)):
                self._document, self._token = self._document + 1, 0
        self.block += 1
        return lay_out(pieces)

    def _enter_window(self) -> None:
        self._window = self._windows.state
        texts = self._windows.next()
        order = generator(self._seed, WINDOWS, self._domain, self._window["window"]).permutation(len(texts))
        self._texts = [texts[index] for index in order]
        self._document = self._token = 0
        self._first_encoded = 0
        self._ids: list[np.ndarray] = []

    def _encoded(self, document: int) -> np.ndarray:
        if not self._first_encoded <= document < self._first_encoded + len(self._ids):
            stop, size = document, 0
            while stop < min(len(self._texts), document + _ENCODED_DOCUMENTS) and size < _ENCODED_BYTES:
                size += len(self._texts[stop])
                stop += 1
            self._first_encoded = document
            self._ids = encode_documents(self._tokenizer, self._texts[document:stop])
        return self._ids[document - self._first_encoded]


def _texts(dataset: IterableDataset, stream: TextStream) -> Iterator[str]:
    for row in dataset:
        if stream.text_column not in row:
            raise ValueError(
                f"{stream.place}: domain {stream.name}: text_column must be a column of every document, one of "
                f"{list(row)}; got {stream.text_column}"
            )
        text = row[stream.text_column]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{stream.place}: domain {stream.name}: text_column must hold text; got {type(text).__name__} in "
                f"{stream.text_column}"
            )
        yield text or ""
