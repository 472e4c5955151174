"""Router saturation: how early in training a router settles where each token goes.

Shapes: L MoE layers, E experts, K experts per token, N tokens; S checkpoints.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .architecture import load_model
from .routing_trace import routed_batches

TOKENS = 16_384
"""About how many tokens are asked: what is kept of them, N * L * K numbers, is all that this takes."""


@dataclass(frozen=True)
class Saturation:
    """How many of a token's final experts earlier checkpoints select."""

    steps: tuple[int, ...]
    """S, rising; the final model is not among them."""
    share: Tensor
    """`[S, L]` float64: mean over tokens of `|experts then & experts at the end| / K` (OLMoE, arXiv 2409.02060,
    section 5). K / E if the two had nothing to do with each other and the load were even; 1 once settled."""
    tokens: int
    """How many tokens were asked."""


def measure_saturation(
    model: PreTrainedModel, checkpoints: dict[int, Path], windows: Dataset, *, batch_size: int = 16
) -> Saturation:
    """Compares the selection of earlier checkpoints with that of the final model, on a sample of the windows.

    Args:
        model: the final one.
        checkpoints: step -> a folder for `from_pretrained`.
        windows: from `evaluation_windows`; every n-th is taken, so that all domains are asked.
    """
    tokens = sum(len(ids) for ids in windows["input_ids"])
    sample = windows.select(range(0, len(windows), max(1, round(tokens / TOKENS))))
    final = _selections(model, sample, batch_size)
    shares = []
    for _, folder in tqdm(sorted(checkpoints.items()), desc="router saturation", unit="checkpoint", disable=None):
        earlier = load_model(folder).to(model.device)
        then = _selections(earlier, sample, batch_size)
        shares.append(_overlap(then, final).double().mean(0))
    return Saturation(steps=tuple(sorted(checkpoints)), share=torch.stack(shares), tokens=len(final))


def _selections(model: PreTrainedModel, windows: Dataset, batch_size: int) -> Tensor:
    """`[N, L, K]` int16, in the order of the batches, which depends on the windows alone."""
    return torch.cat(
        [
            torch.stack([layer[batch.mask.flatten()] for layer in batch.selected_experts], 1).short().cpu()
            for batch in routed_batches(model, windows, batch_size=batch_size, description="settled")
        ]
    )


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of the K experts that two selections `[N, L, K]` have in common: `[N, L]`."""
    return (first[..., :, None] == second[..., None, :]).any(-1).float().mean(-1)


__all__ = ["Saturation", "measure_saturation"]
