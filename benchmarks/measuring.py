"""What the measurements of `scripts/benchmark.py` share: models, micro-batches, checks, a spread, a result's origin.

`B` sequences, `T` positions.
"""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from equipoise import MoEConfig

ALLOCATOR = re.compile(r"MALLOC|GLIBC_TUNABLES|LD_PRELOAD|ALLOC_CONF|THP_MEM_ALLOC")
"""Variables of the environment by which memory is allocated otherwise."""

MICRO_BATCH = ("micro_batch_size", "sequence_length")
"""Fields of `Shape` that are not the model's."""


@dataclass
class Shape:
    """The model and the micro-batch that are measured; the model's fields are named as in `MoEConfig`."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 4
    num_shared_experts: int = 0
    moe_intermediate_size: int = 128
    micro_batch_size: int = field(default=2, metadata={"help": "Sequences in a micro-batch of one process."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens in a sequence."})

    def shape(self) -> dict[str, int]:
        """These fields by name, without those that a sub-command adds."""
        return {name: getattr(self, name) for name in Shape.__dataclass_fields__}

    def config(self, **changes: Any) -> MoEConfig:
        """The model's configuration; raises, naming the field, on sizes that cannot be."""
        check_at_least(1, micro_batch_size=self.micro_batch_size)
        check_at_least(2, sequence_length=self.sequence_length)  # one token predicts nothing
        fields: dict[str, Any] = self.shape() | {"max_position_embeddings": self.sequence_length} | changes
        return MoEConfig(**{name: value for name, value in fields.items() if name not in MICRO_BATCH})

    def micro_batch(self, random: torch.Generator) -> Tensor:
        """Random token ids, int64 `[B, T]`."""
        return torch.randint(self.vocab_size, (self.micro_batch_size, self.sequence_length), generator=random)


MODELS = {
    "S": Shape(num_attention_heads=4, num_key_value_heads=2, head_dim=64, micro_batch_size=8),
    "M": Shape(
        vocab_size=16384,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=128,
        micro_batch_size=4,
    ),
    # For a GPU: 0.92 B parameters, 0.22 B of them active.
    "L": Shape(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        micro_batch_size=8,
        sequence_length=2048,
    ),
    # For tests: widths that `grouped_mm` takes in bf16 too.
    "tiny": Shape(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        sequence_length=16,
    ),
}
"""The models that are compared with a peer, by name."""


@dataclass
class Comparison:
    """What the comparisons with the peer have in common."""

    models: list[str] = field(default_factory=lambda: ["S"], metadata={"help": f"Among {', '.join(MODELS)}."})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={"help": "float32; autocast, to bf16 with weights in fp32; or bfloat16, weights too."},
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "Of our experts. Default: what our model takes by itself."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of our attention. Default: what our model takes by itself."}
    )
    peer_implementations: list[str] = field(
        default_factory=lambda: ["eager", "grouped_mm"], metadata={"help": "Of the peer's experts."}
    )
    hopeless: float = field(
        default=0.0,
        metadata={"help": "Leave out a peer that takes so many times the fastest's time in warm-up; 0: none."},
    )
    rounds: int = field(default=12, metadata={"help": "Rounds measured; in each, everything is measured once."})
    warmup: int = field(default=2, metadata={"help": "Rounds before them that are not measured."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu, one thread, or cuda."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, tokens and the order within a round."})
    output: str = field(default="benchmarks/results", metadata={"help": "Folder of the JSON files."})

    def check(self) -> None:
        """Raises ValueError, naming the field, for arguments that cannot be."""
        check_device(self.device)
        check_at_least(1, rounds=self.rounds, warmup=self.warmup)
        check_among(MODELS, models=self.models)
        check_among(DTYPES, dtypes=self.dtypes)
        check_among(PEER_IMPLEMENTATIONS, peer_implementations=self.peer_implementations)
        if "sonicmoe" in self.peer_implementations and (self.device != "cuda" or find_spec("kernels") is None):
            got = f"{self.device}, kernels {'missing' if find_spec('kernels') is None else 'installed'}"
            raise ValueError(f"peer_implementations may have sonicmoe on a GPU and with kernels installed; got {got}")
        if self.hopeless and self.hopeless < 1:
            raise ValueError(f"hopeless must be 0 or at least 1; got {self.hopeless}")


DTYPES = {"float32": torch.float32, "autocast": torch.bfloat16, "bfloat16": torch.bfloat16}
"""In which numbers are multiplied."""

PEER_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "sonicmoe")


def check_device(device: str) -> None:
    """Raises ValueError for a device that is not there."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where there is a GPU; got {device}")


def check_among(known: Iterable[str], **values: list[str]) -> None:
    """Raises ValueError, naming the field, for a list that is empty or holds something unknown."""
    for name, given in values.items():
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name} must be among {', '.join(known)}; got {' '.join(given) or 'none'}")


def check_at_least(least: int, **values: int) -> None:
    """Raises ValueError, naming the field, for a value below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def spread(ratios: ArrayLike, seed: int) -> dict[str, Any]:
    """Of the ratios of pairs: the median, the quartiles, and a 95% bootstrap interval of the median."""
    ratios = np.asarray(ratios)
    resampled = np.median(np.random.default_rng(seed).choice(ratios, (10_000, len(ratios))), axis=1)
    return {
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "ratio_interval_95": np.quantile(resampled, [0.025, 0.975]).tolist(),
    }


def origin(arguments: Any, shape: Shape) -> dict[str, Any]:
    """The first entries of every result: command, machine, versions, settings of the allocator, shape, arguments.

    Args:
        arguments: a dataclass with a field `device`; what of it is in the shape is not told twice.
    """
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    sizes = shape.shape()
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("equipoise", "torch", "transformers", "numpy")},
        "allocator": {
            "environment": {name: value for name, value in os.environ.items() if ALLOCATOR.search(name)},
            "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.is_file() else None,
        },
        "shape": sizes,
        "arguments": {name: value for name, value in asdict(arguments).items() if name not in sizes},
    }
