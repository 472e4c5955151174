"""Shared by all rooms' tests: a tiny model, and real gloo processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from equipoise import MoEConfig

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MoEConfig]:
    """A function that makes a configuration small enough for any test; fields can be changed by keyword."""

    def make(**changes: Any) -> MoEConfig:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_qk_norm": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 16,
            "max_position_embeddings": 128,
            # Large enough that routers differ between tokens from the start.
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 1,
        }
        return MoEConfig(**fields | changes)

    return make


def _process(rank: int, world_size: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(rank, world_size, *arguments), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """A function that runs `work(rank, world_size, *arguments)` in gloo processes and returns what each returned."""

    def run(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        mp.spawn(_process, args=(world_size, folder, work, arguments), nprocs=world_size)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]

    return run
