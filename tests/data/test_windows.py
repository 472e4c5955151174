"""Windows: every token of every document is predicted once, whatever the lengths."""

from collections import defaultdict
from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from equipoise.data import evaluation_windows, train_tokenizer
from equipoise.data.windows import windows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["abc cab bac"] * 10, 270)


@given(num_tokens=st.integers(0, 60), block_size=st.integers(2, 20))
def test_every_token_is_predicted_once_from_the_one_before(num_tokens: int, block_size: int) -> None:
    document = list(range(num_tokens))  # distinct, so that a token is its place
    cut = windows(document, block_size)
    predictions = [(left, right) for window in cut for left, right in pairwise(window)]
    assert predictions == list(pairwise(document))
    assert all(2 <= len(window) <= block_size for window in cut)
    assert all(len(window) == block_size for window in cut[:-1])
    assert all(after[0] == before[-1] for before, after in pairwise(cut))


@settings(max_examples=20)
@given(texts=st.lists(st.text("abc é日\n", max_size=40), min_size=1, max_size=8), block_size=st.integers(2, 9))
def test_labels_and_bytes_add_up_to_the_documents(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], block_size: int
) -> None:
    documents = Dataset.from_dict({"text": texts, "domain": [f"d{i % 2}" for i in range(len(texts))]})
    predicted, num_bytes = defaultdict(list), defaultdict(list)
    for row in evaluation_windows(documents, tokenizer, block_size):
        assert row["labels"] == [-100, *row["input_ids"][1:]]
        assert row["domain"] == documents[row["document"]]["domain"]
        if row["document"] not in predicted:
            assert row["input_ids"][0] == tokenizer.bos_token_id
        predicted[row["document"]] += [label for label in row["labels"] if label != -100]
        num_bytes[row["document"]].append(row["num_bytes"])
    for index, text in enumerate(texts):
        assert tokenizer.decode(predicted[index]) == text
        if text:
            assert num_bytes[index] == [len(text.encode())] + [0] * (len(num_bytes[index]) - 1)


def test_errors_name_field_and_value(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = Dataset.from_dict({"text": ["abc"], "domain": ["law"]})
    with pytest.raises(ValueError, match=r"block_size must be at least 2.*; got 1"):
        evaluation_windows(documents, tokenizer, 1)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="bos or an eos token"):
        evaluation_windows(documents, bare, 4)
