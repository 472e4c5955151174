"""Blocks cut when asked for: against a token-by-token recomputation in plain Python."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from equipoise.data import train_tokenizer
from equipoise.data.blocks import Blocks, labels_of, tokenize
from equipoise.data.documents import DomainDocuments
from equipoise.data.encoding import encode, encode_documents
from equipoise.data.keys import tokenizer_key


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["abc cab bac"] * 10, 270)


def documents_of(texts: list[str]) -> DomainDocuments:
    data = Dataset.from_dict({"text": texts, "domain": ["x"] * len(texts)})
    key = hashlib.sha256(repr(texts).encode()).hexdigest()
    size = sum(map(len, texts))
    return DomainDocuments(train=data, held_out=data, key=key, held_out_key=key, train_bytes=size, held_out_bytes=size)


def blocks_of(tokens: list[list[int]], block_size: int, seed: int = 0, domain: int = 0) -> Blocks:
    return Blocks(Dataset.from_dict({"input_ids": tokens}), block_size, seed=seed, domain=domain)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 25), min_size=1, max_size=12), block_size=st.integers(2, 9), seed=st.integers(0, 3)
)
def test_blocks_hold_the_documents_end_to_end(lengths: list[int], block_size: int, seed: int) -> None:
    # document i is i*100, i*100 + 1, ...: a token tells its document and its place
    tokens = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths, start=1)]
    blocks = blocks_of(tokens, block_size, seed)
    assert len(blocks) == sum(lengths) // block_size
    stream = [token for number in range(len(blocks)) for token in blocks[number][0].tolist()]
    seen: list[int] = []
    for offset, token in enumerate(stream):
        document, place = divmod(token, 100)
        if place == 0:
            seen.append(document)
        else:
            assert stream[offset - 1] == token - 1
        # a document ends only where it ends
        if place == lengths[document - 1] - 1 and offset + 1 < len(stream):
            assert stream[offset + 1] % 100 == 0
    assert len(set(seen)) == len(seen)
    for number in range(len(blocks)):
        input_ids, position_ids = blocks[number]
        labels = labels_of(blocks[number])
        expected_position = 0
        for offset in range(block_size):
            expected_position = 0 if offset == 0 or input_ids[offset] % 100 == 0 else expected_position + 1
            assert position_ids[offset] == expected_position
            assert labels[offset] == (-100 if expected_position == 0 else input_ids[offset])


def test_shuffles_are_of_seed_and_domain() -> None:
    tokens = [[number, number] for number in range(40)]

    def order(seed: int, domain: int) -> tuple[int, ...]:
        blocks = blocks_of(tokens, 2, seed, domain)
        return tuple(int(blocks[number][0][0]) for number in range(40))

    assert order(0, 0) == order(0, 0)
    assert sorted(order(1, 2)) == list(range(40))
    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3


def test_tokens_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["abc", "cab é日", "<|endoftext|> is text", "\n\n  x"]
    tokenized = tokenize(documents_of(texts), tokenizer, tokenizer_key(tokenizer))
    eos = tokenizer.eos_token_id
    expected = [[eos, *tokenizer(text, split_special_tokens=True)["input_ids"], eos] for text in texts]
    assert tokenized["input_ids"][:] == expected
    assert Counter(np.concatenate(encode_documents(tokenizer, texts)).tolist())[eos] == 2 * len(texts)


def test_encoding_is_not_that_of_the_last_call(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["abc cab " * 20, "bac"]
    expected = encode(tokenizer, texts)
    tokenizer(texts, padding=True, truncation=True, max_length=3)
    assert encode(tokenizer, texts) == expected
    assert tokenizer(texts[0])["input_ids"] == expected[0]


def test_bos_opens_documents_where_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="a", eos_token="<|endoftext|>", pad_token=None
    )
    ids = encode_documents(own, ["bbbb"])[0]
    assert ids[0] == own.convert_tokens_to_ids("a") != own.eos_token_id == ids[-1]


def test_a_document_of_ten_megabytes(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["abc cab\n" * 1_250_000, "abc", "x" * 1000]
    tokenized = tokenize(documents_of(texts), tokenizer, tokenizer_key(tokenizer))
    blocks = Blocks(tokenized, 512, seed=0, domain=0)
    number = len(blocks) // 2
    assert blocks[number][1].tolist() == list(range(512))
    assert tokenizer.decode(blocks[number][0]) in texts[0]
