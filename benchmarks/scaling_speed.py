"""Tokens/s of a training step as one thing grows: experts, the length of sequences, processes.

`python scripts/benchmark.py scaling` calls `benchmark_scaling`.
"""

import json
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import OURS, Pair, Training, peer_name
from measuring import MODELS, Comparison, Shape, check_among, check_at_least, origin, spread
from rounds import Rounds, described, in_rounds, timed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from equipoise.data import write_json

AXES = ("num_experts", "sequence_length", "world_size")


@dataclass
class ScalingArguments(Comparison):
    """Measures tokens/s of a training step, ours balanced and the peer's not, against the number of experts at
    constant active parameters, the length of sequences at constant tokens, and the number of processes at a constant
    micro-batch of each."""

    axes: list[str] = field(default_factory=lambda: list(AXES), metadata={"help": "What grows, one after another."})
    num_experts: list[int] = field(default_factory=lambda: [16, 32, 64, 128], metadata={"help": "In each layer."})
    sequence_lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048], metadata={"help": "Each must divide the tokens of a micro-batch."}
    )
    world_sizes: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Processes, gloo or NCCL, one thread or GPU each."}
    )
    peer_implementations: list[str] = field(
        default_factory=lambda: ["grouped_mm"], metadata={"help": "Of the peer's experts; the first is measured."}
    )
    skip_logits: bool = field(default=False, metadata={"help": "Have our forward pass return a loss and no logits."})
    rounds: int = field(default=6, metadata={"help": "Rounds measured; in each, all sizes are measured once."})
    warmup: int = field(default=1, metadata={"help": "Rounds before them that are not measured."})

    def check(self) -> None:
        """Also the fields of its own."""
        super().check()
        check_among(AXES, axes=self.axes)
        for name in ("num_experts", "sequence_lengths", "world_sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for size in self.world_sizes:
            check_at_least(1, world_sizes=size)
            if self.device == "cuda" and size > torch.cuda.device_count():
                gpus = torch.cuda.device_count()
                raise ValueError(f"world_sizes must be at most the number of GPUs ({gpus}); got {size}")
        for model in self.models:
            for axis in AXES[:2]:
                for shape in self.shapes(MODELS[model], axis).values():
                    shape.config()

    def shapes(self, shape: Shape, axis: str) -> dict[int, Shape]:
        """The sizes along an axis, and the model and micro-batch at each."""
        if axis == "num_experts":
            return {size: replace(shape, num_experts=size) for size in self.num_experts}
        tokens = shape.micro_batch_size * shape.sequence_length
        shapes = {}
        for length in self.sequence_lengths:
            if length < 2 or tokens % length:
                raise ValueError(f"sequence_lengths must divide the tokens of a micro-batch ({tokens}); got {length}")
            shapes[length] = replace(shape, sequence_length=length, micro_batch_size=tokens // length)
        return shapes


def benchmark_scaling(arguments: ScalingArguments) -> None:
    """Measures each model in each dtype along each axis, prints it and writes `scaling_AXIS_MODEL_DTYPE_DEVICE.json`.

    Raises:
        ValueError: arguments that cannot be, before anything starts.
    """
    arguments.check()
    torch.set_num_threads(1)
    for model in arguments.models:
        for dtype in arguments.dtypes:
            for axis in arguments.axes:
                grow = over_processes if axis == "world_size" else partial(over_shapes, axis)
                sizes = grow(arguments, MODELS[model], dtype)
                found = {"model": model, "dtype": dtype, "axis": axis, "sizes": sizes}
                print_sizes(found, arguments.device)
                file = Path(arguments.output) / f"scaling_{axis}_{model}_{dtype}_{arguments.device}.json"
                write_json(file, origin(arguments, MODELS[model]) | found)
                print(f"all figures: {file}")


def trainings(arguments: ScalingArguments, shape: Shape, dtype: str, device: str) -> dict[str, Training]:
    """Ours and the peer's, by name."""
    peer = arguments.peer_implementations[0]
    with Pair(shape, seed=arguments.seed, dtype=dtype, device=device) as pair:
        ours = partial(pair.ours, arguments.experts_implementation, arguments.attn_implementation)
        return {
            OURS: Training(ours, dtype=dtype, device=device, skip_logits=arguments.skip_logits),
            peer_name(peer): Training(partial(pair.peer, peer), dtype=dtype, device=device, skip_logits=False),
        }


def over_shapes(axis: str, arguments: ScalingArguments, shape: Shape, dtype: str) -> dict[str, Any]:
    """All sizes in the same rounds, so that they too are compared within rounds."""
    contestants, tokens, random = {}, 0, torch.Generator().manual_seed(arguments.seed)
    shapes = arguments.shapes(shape, axis)
    for size, grown in shapes.items():
        batch = grown.micro_batch(random).to(arguments.device)
        tokens = batch.numel()  # the same at each
        for name, training in trainings(arguments, grown, dtype, arguments.device).items():
            contestants[f"{size} {name}"] = turn(training, batch)
    rounds = in_rounds(contestants, rounds=arguments.rounds, warmup=arguments.warmup, seed=arguments.seed)
    return compared({size: split(rounds, size) for size in shapes}, dict.fromkeys(shapes, tokens), arguments.seed)


def over_processes(arguments: ScalingArguments, shape: Shape, dtype: str) -> dict[str, Any]:
    """Each number of processes in processes of its own."""
    seconds = {}
    for world_size in arguments.world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (world_size, folder, arguments, shape, dtype), nprocs=world_size)
            seconds[world_size] = json.loads((Path(folder) / "seconds.json").read_text())
    tokens = {size: size * shape.micro_batch_size * shape.sequence_length for size in seconds}
    return compared(seconds, tokens, arguments.seed)


def process(rank: int, world_size: int, folder: str, arguments: ScalingArguments, shape: Shape, dtype: str) -> None:
    """One of several: DDP of both. A step lasts as long as on the slowest; rank 0 writes the seconds."""
    torch.set_num_threads(1)
    cuda = arguments.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    random = torch.Generator().manual_seed(1000 * arguments.seed + rank)
    batch = shape.micro_batch(random).to(arguments.device)
    both = trainings(arguments, shape, dtype, arguments.device)
    if world_size > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=world_size)
        for training in both.values():
            training.parallel = DistributedDataParallel(training.model, device_ids=[rank] if cuda else None)
    rounds = in_rounds(
        {name: turn(training, batch) for name, training in both.items()},
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=arguments.seed,
        show=rank == 0,
    )
    seconds = torch.tensor(list(rounds.seconds.values()), dtype=torch.float64, device=arguments.device)
    if world_size > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    if rank == 0:
        write_json(Path(folder) / "seconds.json", dict(zip(rounds.seconds, seconds.tolist(), strict=True)))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def turn(training: Training, batch: Tensor) -> Any:
    """A step on token ids `[B, T]`, as a contestant; all processes begin it together."""

    def run() -> float:
        if dist.is_initialized():
            dist.barrier()
        return timed(lambda: training.step(batch), training.device)

    return run


def split(rounds: Rounds, size: int) -> dict[str, list[float]]:
    """The seconds of one size, by contestant."""
    return {
        name.partition(" ")[2]: seconds for name, seconds in rounds.seconds.items() if name.split()[0] == str(size)
    }


def compared(seconds: dict[int, dict[str, list[float]]], tokens: dict[int, int], seed: int) -> dict[str, Any]:
    """Tokens/s of each contestant at each size, in relation to the first size, and to the peer's."""
    first, found = next(iter(seconds)), {}
    for size, measured in seconds.items():
        rates = {name: [tokens[size] / second for second in times] for name, times in measured.items()}
        firsts = {name: [tokens[first] / second for second in times] for name, times in seconds[first].items()}
        (peer,) = [name for name in rates if name != OURS]
        found[str(size)] = {
            "tokens": tokens[size],
            "contestants": {
                name: {
                    "seconds": measured[name],
                    "tokens_per_second": float(torch.tensor(rates[name], dtype=torch.float64).quantile(0.5)),
                    "of_first": spread([a / b for a, b in zip(rates[name], firsts[name], strict=True)], seed),
                }
                for name in rates
            },
            "speedup": spread([a / b for a, b in zip(rates[OURS], rates[peer], strict=True)], seed),
        }
    return found


def print_sizes(found: dict[str, Any], device: str) -> None:
    print(f"\nscaling, {found['axis']}, {found['model']}, {found['dtype']}, {device}")
    for size, record in found["sizes"].items():
        for name, measured in record["contestants"].items():
            ratio = measured["of_first"]["ratio"]
            print(f"{size:>6} {name:24} {measured['tokens_per_second']:9.0f} tokens/s, {ratio:.3f} of the first")
        print(f"{'':6} ours against the peer: {described(record['speedup'])}")
