"""In the place of a file that Transformers does not distribute: starts the processes of its tests, with gloo."""

import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _start_rank_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass


def _run(rank: int, function: Callable[..., None], world_size: int, port: int, arguments: Any, keywords: Any) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    function(rank, *arguments, **keywords)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls `function(rank, ...)` in `world_size` processes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_run, (function, world_size, port, arguments, keywords), world_size)

        return call

    return decorate
