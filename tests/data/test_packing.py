"""Packing: against a token-by-token recomputation in plain Python."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from equipoise.data import pack_documents, train_tokenizer

DOMAINS = ["code", "law"]
documents_of = st.lists(st.tuples(st.text("abc é\n", max_size=30), st.sampled_from(DOMAINS)), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["abc cab bac"] * 10, 270)


def dataset(pairs: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_dict({"text": [text for text, _ in pairs], "domain": [domain for _, domain in pairs]})


@settings(max_examples=25)
@given(pairs=documents_of, block_size=st.integers(2, 9), seed=st.integers(0, 3))
def test_blocks_hold_the_documents_of_one_domain_end_to_end(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], block_size: int, seed: int
) -> None:
    pairs = [*pairs, ("bca" * 9, "code"), ("acb" * 9, "law")]  # never a domain without a block
    blocks = pack_documents(dataset(pairs), tokenizer, block_size, domains=DOMAINS, seed=seed)
    eos = tokenizer.eos_token_id
    for index, domain in enumerate(DOMAINS):
        expected = Counter((eos, *tokenizer(text)["input_ids"], eos) for text, name in pairs if name == domain)
        own = [block for block in blocks if block["domain"] == index]
        assert all(len(block[name]) == block_size for block in own for name in ("input_ids", "position_ids", "labels"))
        num_tokens = sum(len(document) * count for document, count in expected.items())
        assert len(own) == num_tokens // block_size

        # Read the stream token by token: a bos opens a document, the next eos closes it.
        document: list[int] = []
        complete: Counter = Counter()
        for block in own:
            position = 0
            for offset, token in enumerate(block["input_ids"]):
                if not document or offset == 0:
                    position = 0
                assert block["position_ids"][offset] == position
                assert block["labels"][offset] == (-100 if position == 0 else token)
                document.append(token)
                position += 1
                if token == eos and len(document) > 1:
                    complete[tuple(document)] += 1
                    document = []
        assert complete <= expected
        # What is missing is less than the block that was dropped, and the documents it cut.
        missing = sum(len(d) * count for d, count in (expected - complete).items())
        assert missing - len(document) == num_tokens % block_size


def test_shuffling_is_seeded_and_within_the_domain(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [(f"abc {'a' * number}", "code") for number in range(1, 40)] + [("cab cab", "law")] * 5
    first, again, other = (
        pack_documents(dataset(pairs), tokenizer, 8, domains=DOMAINS, seed=seed).with_format("numpy")[:]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first["input_ids"], again["input_ids"])
    code = first["domain"] == 0
    assert not np.array_equal(first["input_ids"][code], other["input_ids"][code])
    assert list(first["domain"]) == sorted(first["domain"])


def test_blocks_are_rows_of_int64_tensors_without_a_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack_documents(dataset([("abc" * 20, "law")]), tokenizer, 4, domains=["law"])
    batch = blocks.with_format("torch")[:3]
    assert set(batch) == {"input_ids", "position_ids", "labels", "domain"}
    assert all(batch[name].shape == (3, 4) for name in ("input_ids", "position_ids", "labels"))
    assert all(column.dtype == torch.int64 for column in batch.values())


def test_special_token_written_in_a_document_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack_documents(dataset([("a<|endoftext|>b" * 9, "law")]), tokenizer, 5, domains=["law"])
    assert Counter(np.ravel(blocks["input_ids"][:]).tolist())[tokenizer.eos_token_id] <= 2


def test_several_processes_give_the_same_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = dataset([("abc cab" * number, "law") for number in range(1, 9)])
    one = pack_documents(documents, tokenizer, 4, domains=["law"])
    two = pack_documents(documents, tokenizer, 4, domains=["law"], num_proc=2)
    assert one["input_ids"][:] == two["input_ids"][:]


def test_bos_opens_documents_where_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="a", eos_token="<|endoftext|>", pad_token=None
    )
    block = pack_documents(dataset([("bbbb", "law")]), own, 2, domains=["law"])[0]
    assert block["input_ids"][0] == own.convert_tokens_to_ids("a") != own.eos_token_id


def test_errors_name_field_and_value(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = dataset([("abc", "code"), ("abc cab" * 9, "law")])
    with pytest.raises(ValueError, match=r"block_size must be at least 2.*; got 1"):
        pack_documents(documents, tokenizer, 1, domains=DOMAINS)
    with pytest.raises(ValueError, match=r"domains must name.*got \['law'\], without \['code'\]"):
        pack_documents(documents, tokenizer, 8, domains=["law"])
    tokens = len(tokenizer("abc")["input_ids"]) + 2
    with pytest.raises(ValueError, match=f"block_size .* got 8, and code has {tokens}$"):
        pack_documents(documents, tokenizer, 8, domains=DOMAINS)
    with pytest.raises(ValueError, match=r"absent has 0$"):
        pack_documents(documents, tokenizer, 2, domains=[*DOMAINS, "absent"])
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="must have an eos token"):
        pack_documents(documents, without_eos, 2, domains=DOMAINS)
