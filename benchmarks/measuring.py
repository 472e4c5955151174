"""What the measurements of `scripts/benchmark.py` share: the model's shape, a check, what a result says of its origin.

`B` sequences, `T` positions.
"""

import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise import MoEConfig

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


def check_at_least(least: int, **values: int) -> None:
    """Raises ValueError, naming the field, for a value below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def origin(arguments: Shape, device: str) -> dict[str, Any]:
    """The first entries of every result: command, machine, versions, shape, arguments.

    Args:
        device: `cpu` or `cuda`.
    """
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    shape = arguments.shape()
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        },
        "versions": {name: version(name) for name in ("equipoise", "torch", "transformers", "numpy")},
        "shape": shape,
        "arguments": {name: value for name, value in asdict(arguments).items() if name not in shape},
    }
