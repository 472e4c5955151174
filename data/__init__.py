"""Text of many domains in, packed training blocks out."""

from .core_corpus import DomainsFailed, build_core_corpus
from .corpus import Corpus, description_differences, open_corpus
from .documents import read_documents, read_held_out
from .embedded_corpus import build_embedded_corpus
from .encoding import IGNORE_INDEX
from .files import write_json, write_whole
from .micro_batches import MicroBatches, PackedCorpus, pack
from .task_items import gather_task_items
from .tokenizer import load_tokenizer, train_tokenizer
from .windows import evaluation_windows, padded_batches

__all__ = [
    "IGNORE_INDEX",
    "Corpus",
    "DomainsFailed",
    "MicroBatches",
    "PackedCorpus",
    "build_core_corpus",
    "build_embedded_corpus",
    "description_differences",
    "evaluation_windows",
    "gather_task_items",
    "load_tokenizer",
    "open_corpus",
    "pack",
    "padded_batches",
    "read_documents",
    "read_held_out",
    "train_tokenizer",
    "write_json",
    "write_whole",
]
