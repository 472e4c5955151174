"""Whether ours and the peer's make the same losses from the same weights, step after step.

`python scripts/benchmark.py losses` calls `benchmark_losses`. Nothing is timed.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from contestants import OURS, Pair, Training, peer_name
from measuring import MODELS, Comparison, Shape, check_at_least, origin
from torch import Tensor
from tqdm.auto import tqdm

from equipoise.data import write_json


@dataclass
class LossesArguments(Comparison):
    """Trains ours and Qwen3-MoE of Transformers from the same weights on the same text, none of them balanced, and
    compares their losses; and those of the peer's implementations with one another, which is what rounding does."""

    steps: int = field(default=50, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, constant."})
    micro_batch_size: int | None = field(default=None, metadata={"help": "Sequences a step. Default: the model's."})
    skip_logits: bool = field(default=False, metadata={"help": "Have our forward pass return a loss and no logits."})

    def check(self) -> None:
        """Also the fields of its own."""
        super().check()
        check_at_least(1, steps=self.steps)
        if self.micro_batch_size is not None:
            check_at_least(1, micro_batch_size=self.micro_batch_size)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0; got {self.learning_rate}")


def benchmark_losses(arguments: LossesArguments) -> None:
    """Trains each model in each dtype, prints the largest difference and writes `losses_MODEL_DTYPE_DEVICE.json`.

    Raises:
        ValueError: arguments that cannot be, before anything starts.
    """
    arguments.check()
    torch.set_num_threads(1)
    for model in arguments.models:
        for dtype in arguments.dtypes:
            shape = MODELS[model]
            losses = train_all(arguments, shape, dtype)
            compared = [
                {"of": one, "and": other} | largest_difference(losses[one], losses[other])
                for one, other in combinations(losses, 2)
            ]
            found = {"model": model, "dtype": dtype, "losses": losses, "largest_differences": compared}
            first, last = losses[OURS][0], losses[OURS][-1]
            print(f"\nlosses, {model}, {dtype}, {arguments.device}: from {first:.4f} to {last:.4f}")
            for pair in compared:
                print(
                    f"{pair['of']} and {pair['and']}: {pair['relative']:.2e} apart at most, at step {pair['at_step']}"
                )
            file = Path(arguments.output) / f"losses_{model}_{dtype}_{arguments.device}.json"
            write_json(file, origin(arguments, shape) | found)
            print(f"all figures: {file}")


def largest_difference(ones: list[float], others: list[float]) -> dict[str, float]:
    """Of the losses of two, relative to the second's, and the step of it, from 1."""
    differences = [abs(one / other - 1) for one, other in zip(ones, others, strict=True)]
    return {"relative": max(differences), "at_step": 1 + differences.index(max(differences))}


def train_all(arguments: LossesArguments, shape: Shape, dtype: str) -> dict[str, list[float]]:
    """The losses of each, by contestant, ours first."""
    device = arguments.device
    with Pair(shape, seed=arguments.seed, dtype=dtype, device=device) as pair:
        ours = partial(
            pair.ours, arguments.experts_implementation, arguments.attn_implementation, balancing_mode="none"
        )
        makers = {OURS: ours} | {peer_name(name): partial(pair.peer, name) for name in arguments.peer_implementations}
        trainings = {
            name: Training(
                make,
                dtype=dtype,
                device=device,
                skip_logits=arguments.skip_logits and name == OURS,
                learning_rate=arguments.learning_rate,
            )
            for name, make in makers.items()
        }
    text = Text(shape, arguments.micro_batch_size or shape.micro_batch_size, arguments.seed)
    losses: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in tqdm(range(arguments.steps), unit="step", leave=False):
        batch = text.micro_batch().to(device)
        for name, training in trainings.items():
            losses[name].append(training.step(batch).item())
    return losses


class Text:
    """Text that is soon learnt: of 64 tokens, each followed by one of four of its own."""

    def __init__(self, shape: Shape, batch_size: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.batch_size, self.length, self.tokens = batch_size, shape.sequence_length, min(64, shape.vocab_size)
        self.followers = torch.randint(self.tokens, (self.tokens, 4), generator=self.random)

    def micro_batch(self) -> Tensor:
        """Token ids, int64 `[B, T]`."""
        tokens = [torch.randint(self.tokens, (self.batch_size,), generator=self.random)]
        for choice in torch.randint(4, (self.length - 1, self.batch_size), generator=self.random):
            tokens.append(self.followers[tokens[-1], choice])
        return torch.stack(tokens, dim=1)
