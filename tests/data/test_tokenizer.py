"""The byte-level BPE: bytes survive, ids survive saving, the same texts give the same merges."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from equipoise.data import load_tokenizer, train_tokenizer

TEXTS = [f"for i in range({i}):\n    print('naïve', i)\n" for i in range(50)] + ["le chat est là. 日本語"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320)


@given(text=st.text())
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_one_special_token_is_bos_eos_and_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == 320
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]), "no merges were learned"


def test_saving_keeps_every_id(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    unseen = [*TEXTS, "<|endoftext|>x", "\r\n\t", "\u200b 🙂 don't"]
    assert loaded(unseen)["input_ids"] == tokenizer(unseen)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(TEXTS), 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert 257 <= len(train_tokenizer(["ab"], 5000)) < 300


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257.*; got 256"):
        train_tokenizer(TEXTS, 256)


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have an eos token"):
        load_tokenizer(tmp_path)
