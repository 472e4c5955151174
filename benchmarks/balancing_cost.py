"""What each balancing mode costs: the time of an optimizer step, in pairs with mode `none`.

`python scripts/benchmark.py balancing` calls `benchmark_balancing`.

Steps are compared, not modes in training: the learning rate is 0 and the biases go back to 0 after each step, so that
every variant sends the same tokens to the same experts. A routing that changed with the variant would measure what
balance is worth to the experts' arithmetic, not what the mechanism costs. `none` counts the load too, once a step, for
its metrics; `--profile` says what that takes.
"""

import json
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from balancer_profile import PARTS, profile_balancer
from measuring import Shape, check_among, check_at_least, check_device, origin, spread
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import set_seed

from equipoise import MoEForCausalLM
from equipoise.balancing import Balancer
from equipoise.configuration import BalancingSettings, BiasUpdateRule
from equipoise.data import write_json

LOSSES: dict[str, dict[str, Any]] = {
    "none/softmax": {"balancing_mode": "none"},
    "micro_batch": {"balancing_mode": "micro_batch"},
    "sequence": {"balancing_mode": "sequence"},
    # Not `exact`, which is for study and costs a second forward pass.
    "global_batch/running": {"balancing_mode": "global_batch", "load_estimate": "running"},
    "global_batch/current": {"balancing_mode": "global_batch", "load_estimate": "current"},
    "global_batch/completed": {"balancing_mode": "global_batch", "load_estimate": "completed"},
}
LOSS_FREE: dict[str, dict[str, Any]] = {
    "none/sigmoid": {"balancing_mode": "none"},
    **{
        f"loss_free/{rule}": {"balancing_mode": "loss_free", "bias_update_rule": rule}
        for rule in get_args(BiasUpdateRule)
    },
}
VARIANTS = {name: {"scoring_func": "softmax"} | settings for name, settings in LOSSES.items()} | {
    name: {"scoring_func": "sigmoid"} | settings for name, settings in LOSS_FREE.items()
}
"""Fields of `MoEConfig`. Each variant is paired with `none` of its scoring function. `none` itself is too: its ratio
shows how far from 1 chance goes."""

NOTABLE = 1.015
"""Where a ratio is above, the printed profile names the operators."""


@dataclass
class BalancingArguments(Shape):
    """Measures the time of an optimizer step in each balancing mode, in pairs with mode `none`."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Which to measure."})
    rounds: int = field(default=30, metadata={"help": "Pairs of steps measured for each variant."})
    warmup: int = field(default=3, metadata={"help": "Rounds before them that are not measured."})
    world_sizes: list[int] | None = field(
        default=None, metadata={"help": "Numbers of processes. Default: 1 2, and 1 where there is one GPU."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of a process in a step."})
    profile: bool = field(
        default=False, metadata={"help": "Afterwards, also time the Balancer's own calls and name their operators."}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": "cpu, one thread a process, or cuda, one GPU a process."},
    )
    seed: int = field(default=0, metadata={"help": "Of weights, tokens and the order of the variants."})
    output: str = field(default="benchmarks/results/balancing_cost.json", metadata={"help": "The JSON file to write."})

    def checked_world_sizes(self) -> list[int]:
        """Raises ValueError, naming the field, for arguments that cannot be."""
        check_device(self.device)
        check_at_least(1, rounds=self.rounds, gradient_accumulation_steps=self.gradient_accumulation_steps)
        check_at_least(0, warmup=self.warmup)
        check_among(VARIANTS, variants=self.variants)
        for name in self.variants:
            self.config(**VARIANTS[name])
        gpus = torch.cuda.device_count() if self.device == "cuda" else None
        world_sizes = self.world_sizes or ([1] if gpus == 1 else [1, 2])
        for size in world_sizes:
            check_at_least(1, world_sizes=size)
            if gpus is not None and size > gpus:
                raise ValueError(f"world_sizes must be at most the number of GPUs ({gpus}); got {size}")
        return world_sizes


def benchmark_balancing(arguments: BalancingArguments) -> None:
    """Measures each world size in processes of its own, prints its table, and writes the JSON file at the end.

    Raises:
        ValueError: arguments that cannot be, before anything starts.
    """
    world_sizes, worlds = arguments.checked_world_sizes(), {}
    torch.set_num_threads(1)  # here too, for the record
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler of each process would write lines among the bars
    for world_size in world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, args=(world_size, folder, arguments), nprocs=world_size)
            found = json.loads((Path(folder) / "found.json").read_text())
        variants = {name: summarize(record, arguments.seed) for name, record in found["variants"].items()}
        worlds[str(world_size)] = variants
        print(f"\nworld size {world_size}, {arguments.device}, {found['parameters'] / 1e6:.1f} M parameters, ", end="")
        print(f"{arguments.rounds} pairs of steps of {found['tokens_per_step']} tokens")
        print_ratios(variants)
        if arguments.profile:
            print_profiles(variants)
    result = {"parameters": found["parameters"], "world_sizes": worlds}
    write_json(arguments.output, origin(arguments, arguments) | result)
    print(f"\nall figures: {arguments.output}")


def measure(rank: int, world_size: int, folder: str, arguments: BalancingArguments) -> None:
    """One process: every variant in every round. Rank 0 writes `found.json`.

    A variant's step is measured directly before or after (by turns) a step of `none` on the same tokens: what the
    machine does to one of the pair it mostly does to the other. A step lasts as long as on its slowest rank.
    """
    torch.set_num_threads(1)  # as many in one process as in each of several
    device = torch.device(f"cuda:{rank}" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)

    names = list(dict.fromkeys(arguments.variants))
    scoring = {name: VARIANTS[name]["scoring_func"] for name in names}
    trials = {scoring_func: Trial(arguments, scoring_func, device) for scoring_func in sorted(set(scoring.values()))}
    tokens = torch.Generator().manual_seed(1000 * arguments.seed + rank)
    seconds = torch.zeros(len(names), arguments.rounds, 2, dtype=torch.float64, device=device)
    rounds = range(-arguments.warmup, arguments.rounds)
    for number in tqdm(rounds, desc=f"world size {world_size}", unit="round", disable=rank > 0):
        micro_batches = [arguments.micro_batch(tokens) for _ in range(arguments.gradient_accumulation_steps)]
        micro_batches = [batch.to(device) for batch in micro_batches]
        order = list(enumerate(names))
        Random(f"{arguments.seed}, {number}").shuffle(order)  # the same on all ranks
        for index, name in order:
            trial = trials[scoring[name]]
            pair = [("none", 0), (name, 1)]
            for variant, column in pair if (number + index) % 2 else reversed(pair):
                elapsed = trial.step(trial.balancers[variant], micro_batches)
                if number >= 0:
                    seconds[index, number, column] = elapsed
    if world_size > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)

    records: dict[str, dict[str, Any]] = {
        name: {"none_seconds": pairs[:, 0].tolist(), "seconds": pairs[:, 1].tolist()}
        for name, pairs in zip(names, seconds, strict=True)
    }
    for name in tqdm(names if arguments.profile else [], desc="profile", unit="variant", disable=rank > 0):
        records[name] |= trials[scoring[name]].profile(VARIANTS[name], micro_batches, min(arguments.rounds, 10))
    if rank == 0:
        tokens_per_step = world_size * sum(batch.numel() for batch in micro_batches)
        parameters = trials[scoring[names[0]]].model.num_parameters()
        found = {"parameters": parameters, "tokens_per_step": tokens_per_step, "variants": records}
        write_json(Path(folder) / "found.json", found)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


class Trial:
    """A model and its optimizer, and a Balancer for each variant of one scoring function.

    All variants share the weights, so that they differ neither in value nor in where they lie in memory.
    """

    def __init__(self, arguments: BalancingArguments, scoring_func: str, device: torch.device):
        set_seed(arguments.seed)
        self.device = device
        self.model = MoEForCausalLM(arguments.config(scoring_func=scoring_func)).to(device).train()
        self.parallel: DistributedDataParallel | None = None
        if dist.is_initialized():
            devices = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=devices)
        # At learning rate 0 the optimizer does all its work, and the weights stay what they are.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        settings = {name: VARIANTS[name] for name in arguments.variants}
        self.balancers = {
            name: self.balancer(values) for name, values in settings.items() if values["scoring_func"] == scoring_func
        }
        self.balancers["none"] = self.balancer({"balancing_mode": "none"})

    def balancer(self, settings: dict[str, Any]) -> Balancer:
        """A Balancer as `MoEForCausalLM` makes it, with other settings."""
        config = self.model.config
        changes = {name: value for name, value in settings.items() if name != "scoring_func"}
        return Balancer(
            num_experts=config.num_experts,
            scoring_func=config.scoring_func,
            biases=self.model.selection_biases,
            trained=self.model.trained_routers,
            **vars(BalancingSettings.of(config, **changes)),
        )

    def step(self, balancer: Balancer, micro_batches: list[Tensor]) -> float:
        """Seconds of one optimizer step on micro-batches `[B, T]`; the next one finds the model as this one did."""
        self.model.balancer = balancer
        if dist.is_initialized():
            dist.barrier()
        self.synchronize()
        start = time.perf_counter()
        for number, batch in enumerate(micro_batches, start=1):
            # Ranks exchange gradients once, after the last micro-batch.
            last = number == len(micro_batches)
            with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                outputs = (self.parallel or self.model)(input_ids=batch, labels=batch, use_cache=False)
                (outputs.loss / len(micro_batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        balancer.after_optimizer_step()
        self.synchronize()
        seconds = time.perf_counter() - start
        for bias in self.model.selection_biases():
            bias.zero_()
        return seconds

    def synchronize(self) -> None:
        """Waits until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def profile(self, settings: dict[str, Any], micro_batches: list[Tensor], steps: int) -> dict[str, Any]:
        """`profile_balancer` on a Balancer of its own, in steps that are not compared."""
        balancer = self.balancer(settings)
        return profile_balancer(balancer, lambda: self.step(balancer, micro_batches), self.synchronize, steps)


def summarize(record: dict[str, Any], seed: int) -> dict[str, Any]:
    """Of a variant's pairs: the medians of the steps in ms, and of the ratio variant / none the median, the quartiles
    and a 95% bootstrap interval of the median; then the record."""
    none, variant = np.array(record["none_seconds"]), np.array(record["seconds"])
    return {
        **spread(variant / none, seed),
        "step_ms": 1000 * float(np.median(variant)),
        "none_step_ms": 1000 * float(np.median(none)),
        **record,
    }


def print_ratios(variants: dict[str, dict[str, Any]]) -> None:
    print(f"{'variant':24} {'step ms':>9} {'none ms':>9}   ratio   quartiles       95% of the median")
    for name, found in variants.items():
        low, high = found["ratio_quartiles"]
        least, most = found["ratio_interval_95"]
        times = f"{found['step_ms']:9.2f} {found['none_step_ms']:9.2f}"
        print(f"{name:24} {times}  {found['ratio']:.4f}   {low:.4f} {high:.4f}   {least:.4f} {most:.4f}")


def print_profiles(variants: dict[str, dict[str, Any]]) -> None:
    print("\nthe Balancer's own calls, ms a step; exchange (packing, sending, waiting) is contained in them")
    print(f"{'variant':24}" + "".join(f"  {part}" for part in PARTS) + "  % of none's step")
    for name, found in variants.items():
        parts = found["parts_ms"]
        share = 100 * sum(parts[part] for part in PARTS if part != "exchange") / found["none_step_ms"]
        print(f"{name:24}" + "".join(f"  {parts[part]:{len(part)}.2f}" for part in PARTS) + f"{share:18.2f}")
    for name, found in variants.items():
        if found["ratio"] > NOTABLE:
            largest = list(found["operators_ms"].items())[:6]
            print(f"{name} is above {NOTABLE}; ms: " + ", ".join(f"{what} {spent:.2f}" for what, spent in largest))
