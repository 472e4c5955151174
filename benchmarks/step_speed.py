"""A whole training step, ours against the peer's: time, memory, fraction of the matmul peak.

`python scripts/benchmark.py step` calls `benchmark_step`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import OURS, UNBALANCED, Pair, Training, peer_name
from measuring import DTYPES, MODELS, Comparison, origin, spread
from memory_account import step_memory
from rounds import (
    Rounds,
    described,
    in_rounds,
    matmul_peaks,
    peak_performance,
    performance,
    print_performance,
    speedups,
    synchronize,
    timed,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from equipoise import MoEForCausalLM
from equipoise.data import write_json
from equipoise.training.flops import training_flops_per_token


@dataclass
class StepArguments(Comparison):
    """Measures a training step (forward, backward, fused AdamW) of ours, balanced over the global batch, against
    Qwen3-MoE of Transformers with the same weights, not balanced."""

    skip_logits: bool = field(
        default=False, metadata={"help": "Have our forward pass return a loss and no logits, as our training does."}
    )
    unbalanced: bool = field(default=False, metadata={"help": "Also measure ours with balancing off."})
    memory: bool = field(default=True, metadata={"help": "Also account for the memory of a step."})
    profile: bool = field(default=False, metadata={"help": "Also name the operators in which a step spends its time."})


def benchmark_step(arguments: StepArguments) -> None:
    """Measures each model in each dtype, prints it and writes `step_MODEL_DTYPE_DEVICE.json`.

    Raises:
        ValueError: arguments that cannot be, before anything starts.
    """
    arguments.check()
    torch.set_num_threads(1)
    for model in arguments.models:
        for dtype in arguments.dtypes:
            found = measure(arguments, model, dtype)
            print_step(found)
            file = Path(arguments.output) / f"step_{model}_{dtype}_{arguments.device}.json"
            write_json(file, origin(arguments, MODELS[model]) | found)
            print(f"all figures: {file}")


def measure(arguments: StepArguments, model: str, dtype: str) -> dict[str, Any]:
    """The memory first, while nothing of an earlier step is kept; then the rounds."""
    shape, device, seed = MODELS[model], arguments.device, arguments.seed
    tokens = torch.Generator().manual_seed(seed)
    batch = shape.micro_batch(tokens).to(device)
    with Pair(shape, seed=seed, dtype=dtype, device=device) as pair:
        ours = partial(pair.ours, arguments.experts_implementation, arguments.attn_implementation)
        makers: dict[str, Any] = {OURS: ours}
        if arguments.unbalanced:
            makers[UNBALANCED] = partial(ours, balancing_mode="none")
        peers = {peer_name(name): partial(pair.peer, name) for name in arguments.peer_implementations}

        def train(name: str, make: Any) -> Training:
            skip_logits = arguments.skip_logits and name not in peers
            return Training(make, dtype=dtype, device=device, skip_logits=skip_logits)

        memory = {}
        if arguments.memory:
            for name, make in tqdm((makers | peers).items(), desc="memory", unit="model", leave=False):
                memory[name] = account(train(name, make), batch)
        trainings = {name: train(name, make) for name, make in (makers | peers).items()}
    tokens_per_step = batch.numel()
    flops = step_flops(trainings[OURS].model, shape.sequence_length, tokens_per_step)

    peaks = matmul_peaks(DTYPES[dtype], device)
    contestants: dict[str, Any] = {
        name: partial(timed, partial(training.step, batch), device) for name, training in trainings.items()
    }
    rounds = in_rounds(
        contestants | peaks,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=seed,
        peers=list(peers),
        hopeless=arguments.hopeless,
    )
    fastest, ratios = speedups(rounds, OURS, list(peers), seed)
    found = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "implementations": implementations(trainings[OURS].model),
        "parameters": trainings[OURS].model.num_parameters(),
        "tokens_per_step": tokens_per_step,
        "flops_per_step": flops,
        "contestants": performance(rounds, peaks, seed=seed, tokens=tokens_per_step, flops=flops),
        "peaks": peak_performance(rounds, peaks),
        "left_out": rounds.left_out,
        "fastest_peer": fastest,
        "speedups": ratios,
        "memory": memory,
    }
    if memory:
        found["activations_ratio"] = memory[OURS]["activations"] / memory[fastest]["activations"]
    if arguments.unbalanced:
        found["balancing"] = cost_of_balancing(rounds, seed)
    if arguments.profile:
        found["operators"] = {name: operators(trainings[name], batch) for name in (OURS, fastest)}
    return found


def account(training: Training, batch: Tensor) -> dict[str, int]:
    """`step_memory` of a training made anew."""
    return step_memory(training.model, training.optimizer, lambda: training.backward(batch), batch.device.type)


def step_flops(model: MoEForCausalLM, sequence_length: int, tokens: int) -> float:
    """What a step must multiply: of attention only what is not masked, on average (T + 1) / 2 keys for a query. An
    implementation that multiplies the masked half too gets nothing for it."""
    return tokens * training_flops_per_token(model, model.config, (sequence_length + 1) // 2)


def implementations(model: MoEForCausalLM) -> dict[str, str]:
    """What ours has taken."""
    return {"experts": model.config._experts_implementation, "attention": model.config._attn_implementation}


def cost_of_balancing(rounds: Rounds, seed: int) -> dict[str, Any]:
    """How many times the seconds of a step without balancing one with it takes, within rounds."""
    pairs = zip(rounds.seconds[OURS], rounds.seconds[UNBALANCED], strict=True)
    return spread([balanced / unbalanced for balanced, unbalanced in pairs], seed)


def operators(training: Training, batch: Tensor, most: int = 12) -> list[dict[str, Any]]:
    """The operators that take most of a step's time, by their own time, under torch's profiler, which slows them."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (batch.device.type == "cuda")
    with profile(activities=activities) as profiler:
        training.step(batch)
        synchronize(batch.device.type)
    kind = "self_device_time_total" if batch.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events)
    return [
        {"operator": event.key, "calls": event.count, "share": getattr(event, kind) / total} for event in events[:most]
    ]


def print_step(found: dict[str, Any]) -> None:
    print(
        f"\nstep, {found['model']}, {found['dtype']}, {found['device']}, {found['parameters'] / 1e6:.1f} M parameters"
    )
    print_performance(found)
    for name, memory in found["memory"].items():
        print(f"{name:24} activations {memory['activations'] / 1e6:.1f} MB of {memory['peak'] / 1e6:.1f} MB")
    if "activations_ratio" in found:
        print(f"activations against {found['fastest_peer']}: {found['activations_ratio']:.3f}")
    if "balancing" in found:
        print(f"balancing against none: {described(found['balancing'])}")
    for name, rows in found.get("operators", {}).items():
        print(f"{name}: " + ", ".join(f"{row['operator']} {row['share']:.1%}" for row in rows))
