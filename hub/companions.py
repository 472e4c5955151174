"""What travels beside the weights: by name, so that nothing else in the folder (optimizers, pickles, secrets) does."""

import shutil
from pathlib import Path

from transformers.utils import GENERATION_CONFIG_NAME

# Whatever a tokenizer is made of, how to generate, and the terms of use.
_COMPANIONS = (
    GENERATION_CONFIG_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy them from one folder into another, byte for byte."""
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


__all__ = ["copy_companions"]
