"""Text of many domains in, packed training blocks out."""

from .corpus import Corpus, description_differences, open_corpus
from .documents import read_documents, read_held_out
from .embedded_corpus import build_embedded_corpus
from .files import write_json, write_whole
from .micro_batches import MicroBatches, PackedCorpus, pack
from .order import MicroBatchSampler
from .packing import IGNORE_INDEX, pack_documents
from .tokenizer import load_tokenizer, sample_texts, train_tokenizer
from .windows import evaluation_windows, padded_batches

__all__ = [
    "IGNORE_INDEX",
    "Corpus",
    "MicroBatchSampler",
    "MicroBatches",
    "PackedCorpus",
    "build_embedded_corpus",
    "description_differences",
    "evaluation_windows",
    "load_tokenizer",
    "open_corpus",
    "pack",
    "pack_documents",
    "padded_batches",
    "read_documents",
    "read_held_out",
    "sample_texts",
    "train_tokenizer",
    "write_json",
    "write_whole",
]
