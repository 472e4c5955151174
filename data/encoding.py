"""Encoding: plain text to token ids, and what opens and closes a document."""

import numpy as np
from transformers import PreTrainedTokenizerBase

# The loss leaves out labels of this value (torch.nn.functional.cross_entropy's default).
IGNORE_INDEX = -100


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


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Each document's token ids, int32, opened by bos (eos where there is none) and closed by eos."""
    first, last = first_token_id(tokenizer), tokenizer.eos_token_id
    return [np.array([first, *ids, last], dtype=np.int32) for ids in encode(tokenizer, texts)]


def first_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that opens a document: bos, or eos where the tokenizer has no bos."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
