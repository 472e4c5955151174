"""The experts of one layer alone, forward and backward, ours against the peer's.

`python scripts/benchmark.py experts` calls `benchmark_experts`.

`N` tokens, `E` experts, `K` experts per token, `D` hidden size, `F` expert width.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import OURS, Pair, autocast, peer_name
from measuring import DTYPES, MODELS, Comparison, Shape, origin
from rounds import in_rounds, matmul_peaks, peak_performance, performance, print_performance, speedups, timed
from torch import Tensor, nn

from equipoise.data import write_json


@dataclass
class ExpertsArguments(Comparison):
    """Measures the routed experts of one layer, forward and backward, against those of Qwen3-MoE of Transformers with
    the same weights; every token selects at random."""

    peer_implementations: list[str] = field(
        default_factory=lambda: ["eager", "grouped_mm", "batched_mm"], metadata={"help": "Of the peer's experts."}
    )


def benchmark_experts(arguments: ExpertsArguments) -> None:
    """Measures each model's experts in each dtype, prints it and writes `experts_MODEL_DTYPE_DEVICE.json`.

    Raises:
        ValueError: arguments that cannot be, before anything starts.
    """
    arguments.check()
    torch.set_num_threads(1)
    for model in arguments.models:
        for dtype in arguments.dtypes:
            found = measure(arguments, model, dtype)
            print(f"\nexperts, {model}, {dtype}, {arguments.device}")
            print_performance(found)
            file = Path(arguments.output) / f"experts_{model}_{dtype}_{arguments.device}.json"
            write_json(file, origin(arguments, MODELS[model]) | found)
            print(f"all figures: {file}")


def measure(arguments: ExpertsArguments, model: str, dtype: str) -> dict[str, Any]:
    """One layer's experts, each kind in a model of its own."""
    shape, device = MODELS[model], arguments.device
    layer = replace(shape, num_hidden_layers=1, vocab_size=64)
    with Pair(layer, seed=arguments.seed, dtype=dtype, device=device) as pair:
        ours = pair.ours(arguments.experts_implementation, arguments.attn_implementation)
        models = {OURS: ours} | {peer_name(name): pair.peer(name) for name in arguments.peer_implementations}
    experts = {name: model.model.layers[0].mlp.experts for name, model in models.items()}
    inputs = random_inputs(shape, torch.bfloat16 if dtype == "bfloat16" else torch.float32, device, arguments.seed)

    def turn(module: nn.Module) -> float:
        def work() -> None:
            with autocast(dtype, device):
                output = module(*inputs[:3])
            output.backward(inputs[3].to(output.dtype))

        seconds = timed(work, device)
        for tensor in (*module.parameters(), *inputs):
            tensor.grad = None
        return seconds

    peaks = matmul_peaks(DTYPES[dtype], device)
    contestants: dict[str, Any] = {name: partial(turn, module) for name, module in experts.items()}
    peers = [name for name in experts if name != OURS]
    rounds = in_rounds(
        contestants | peaks,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        seed=arguments.seed,
        peers=peers,
        hopeless=arguments.hopeless,
    )
    fastest, ratios = speedups(rounds, OURS, peers, arguments.seed)
    tokens, flops = inputs[0].shape[0], experts_flops(shape)
    return {
        "model": model,
        "dtype": dtype,
        "device": device,
        "implementation": ours.config._experts_implementation,
        "tokens": tokens,
        "flops": flops,
        "contestants": performance(rounds, peaks, seed=arguments.seed, tokens=tokens, flops=flops),
        "peaks": peak_performance(rounds, peaks),
        "left_out": rounds.left_out,
        "fastest_peer": fastest,
        "speedups": ratios,
    }


def random_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `[N, D]`, experts `[N, K]`, weights `[N, K]`, and the output's gradient `[N, D]`."""
    random = torch.Generator().manual_seed(seed)
    tokens = shape.micro_batch_size * shape.sequence_length
    hidden_states, gradient = (torch.randn(tokens, shape.hidden_size, generator=random) for _ in range(2))
    scores = torch.randn(tokens, shape.num_experts, generator=random).softmax(dim=-1)
    weights, selected = scores.topk(shape.num_experts_per_tok)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    hidden_states, weights, gradient = (tensor.to(device, dtype) for tensor in (hidden_states, weights, gradient))
    return hidden_states.requires_grad_(), selected.to(device), weights.requires_grad_(), gradient


def experts_flops(shape: Shape) -> float:
    """Of the products: three matrices of `D F` for each selection, forward, and twice that backward."""
    selections = shape.micro_batch_size * shape.sequence_length * shape.num_experts_per_tok
    return 18 * selections * shape.hidden_size * shape.moe_intermediate_size
