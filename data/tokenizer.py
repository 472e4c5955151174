"""The tokenizer: a byte-level BPE trained on the documents, or one that is given."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE whose one special token, `<|endoftext|>`, is bos, eos and pad at once.

    Args:
        texts: The documents to learn merges from.
        vocab_size: Largest number of entries, at least 257 (256 bytes and the special token). Texts that
            do not fill it give a smaller vocabulary.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + 1}, every byte and {END_OF_TEXT}; got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=True
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Loads any tokenizer that `AutoTokenizer` knows.

    Raises:
        ValueError: There is no such tokenizer; or it has no eos token, so that documents could not be told apart.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except OSError as error:
        raise ValueError(f"tokenizer must be the name or folder of a tokenizer; got {name_or_path}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer must have an eos token to end documents with; got none in {name_or_path}")
    return tokenizer
