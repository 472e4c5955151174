"""Real gloo processes for tests, in a module whose name nothing shares: what they run is found by it."""

import io
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """A gloo process: runs what comes through the pipe, until it closes."""
    # Left unset, Accelerate would give a process alone other threads than one of three, and products other roundings.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        answer = io.BytesIO()
        try:
            torch.save({"result": work(rank, world_size, *arguments)}, answer)
        except BaseException:
            torch.save({"error": traceback.format_exc()}, answer)
        pipe.send_bytes(answer.getvalue())


class Processes:
    """Gloo processes that stay up from test to test: starting one costs seconds."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, str(folder / "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((work, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            ready = wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers], timeout=300)
            if not ready:
                raise RuntimeError(f"only ranks {sorted(answers)} of {len(self.pipes)} answered within five minutes")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                answer = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=True)
                if "error" in answer:
                    raise RuntimeError(f"rank {rank}:\n{answer['error']}")
                answers[rank] = answer["result"]
        return [answers[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
