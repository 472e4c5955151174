"""Keys: names for content, so that nothing computed from other content is ever found in a cache under them.

`datasets` names what it caches by the path and the modification time of files, and by the pickle of functions: a file
changed with its time set back is then taken for the old one, and a tokenizer for another after its first use.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from transformers import PreTrainedTokenizerBase


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that stand for JSON-able values or bytes."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:32]


def files_key(files: Sequence[Path]) -> str:
    """The key of the files' bytes, in this order, whatever their names and times."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return key_of(digests)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """The key of everything that decides which ids a text without special tokens gets, and of bos and eos."""
    ends = [type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # How the tokenizer was last called, not what it is.
        content.pop("truncation", None)
        content.pop("padding", None)
        return key_of(ends, tokenizers.__version__, content)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return key_of(ends, [str(file.relative_to(folder)) for file in files], files_key(files))


def cache_file(key: str, name: str) -> str:
    """The path of a file that the cache of `datasets` keeps under this key."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "equipoise" / key
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{name}.arrow")
