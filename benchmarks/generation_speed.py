"""Decoding, ours against the peer's.

`python scripts/benchmark.py generate` calls `benchmark_generation`.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import OURS, Pair, autocast, peer_name
from measuring import MODELS, Comparison, check_at_least, origin
from rounds import in_rounds, performance, print_performance, speedups, timed
from torch import Tensor

from equipoise.data import write_json


@dataclass
class GenerateArguments(Comparison):
    """Measures greedy `generate` against that of Qwen3-MoE of Transformers with the same weights."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Sequences at once."})
    prompt_length: int = field(default=32, metadata={"help": "Tokens of each prompt."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens generated for each prompt."})
    peer_implementations: list[str] = field(
        default_factory=lambda: ["eager", "grouped_mm", "batched_mm"], metadata={"help": "Of the peer's experts."}
    )

    def check(self) -> None:
        """Also the fields of its own."""
        super().check()
        check_at_least(1, prompt_length=self.prompt_length, new_tokens=self.new_tokens)
        for size in self.batch_sizes:
            check_at_least(1, batch_sizes=size)


def benchmark_generation(arguments: GenerateArguments) -> None:
    """Measures each model in each dtype, prints it and writes `generate_MODEL_DTYPE_DEVICE.json`.

    Raises:
        ValueError: arguments that cannot be, before anything starts.
    """
    arguments.check()
    torch.set_num_threads(1)
    for model in arguments.models:
        for dtype in arguments.dtypes:
            found = measure(arguments, model, dtype)
            file = Path(arguments.output) / f"generate_{model}_{dtype}_{arguments.device}.json"
            write_json(file, origin(arguments, MODELS[model]) | found)
            print(f"all figures: {file}")


def measure(arguments: GenerateArguments, model: str, dtype: str) -> dict[str, Any]:
    """Every batch size in rounds of its own."""
    shape, device, seed = MODELS[model], arguments.device, arguments.seed
    longest = arguments.prompt_length + arguments.new_tokens
    positions = replace(shape, sequence_length=max(shape.sequence_length, longest))
    with Pair(positions, seed=seed, dtype=dtype, device=device) as pair:
        ours = pair.ours(arguments.experts_implementation, arguments.attn_implementation)
        models = {OURS: ours} | {peer_name(name): pair.peer(name) for name in arguments.peer_implementations}
    peers = [name for name in models if name != OURS]
    random = torch.Generator().manual_seed(seed)
    batches = {}
    for size in arguments.batch_sizes:
        prompts = torch.randint(shape.vocab_size, (size, arguments.prompt_length), generator=random).to(device)
        written: dict[str, Tensor] = {}

        def turn(name: str, prompts: Tensor = prompts, written: dict[str, Tensor] = written) -> float:
            def work() -> None:
                with autocast(dtype, device):
                    written[name] = models[name].generate(
                        prompts,
                        attention_mask=torch.ones_like(prompts),
                        do_sample=False,
                        pad_token_id=0,
                        min_new_tokens=arguments.new_tokens,
                        max_new_tokens=arguments.new_tokens,
                    )

            return timed(work, device)

        rounds = in_rounds(
            {name: partial(turn, name) for name in models},
            rounds=arguments.rounds,
            warmup=arguments.warmup,
            seed=seed,
            peers=peers,
            hopeless=arguments.hopeless,
        )
        fastest, ratios = speedups(rounds, OURS, peers, seed)
        new = [tokens[:, arguments.prompt_length :] for tokens in (written[OURS], written[fastest])]
        found = {
            "contestants": performance(rounds, {}, seed=seed, tokens=new[0].numel()),
            "left_out": rounds.left_out,
            "fastest_peer": fastest,
            "speedups": ratios,
            # Of random weights' near-ties roundings decide, and what follows is then another text.
            "same_tokens": (new[0] == new[1]).double().mean().item(),
        }
        batches[str(size)] = found
        print(f"\ngenerate, {model}, {dtype}, {device}, batch of {size}, same tokens: {found['same_tokens']:.1%}")
        print_performance(found)
    return {
        "model": model,
        "dtype": dtype,
        "device": device,
        "implementations": {
            "experts": ours.config._experts_implementation,
            "attention": ours.config._attn_implementation,
        },
        "batch_sizes": batches,
    }
