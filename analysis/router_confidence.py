"""Router confidence: how sharply a router tells the experts of a token from the others.

Shapes: B sequences, T positions, N tokens, L MoE layers, E experts, K experts per token; G domains.
"""

import math

import torch
from datasets import Dataset
from torch import Tensor

from .routing_trace import RoutedBatch

BINS = 200

MEASURES = ("entropy", "top_weight", "margin")


class RouterConfidence:
    """Counts three measures of each token's scores in `BINS` bins: an observer of `trace_windows`.

    With scores divided by their sum over the experts, per token and layer:

    - `entropy`: of the scores over all experts, over log E. From 0 (one expert has it all) to 1 (all alike).
    - `top_weight`: the largest of the K selected scores over the sum of these, from 1 / K to 1.
    - `margin`: the smallest selected score less the largest that was not selected, from -1 to 1. Near 0 the last
      place was a near tie; below 0 the selection bias, or a limit to groups, overruled the score. 0 where K = E.
    """

    def __init__(self, windows: Dataset, *, num_layers: int) -> None:
        names = windows["domain"][:]
        self.domains = tuple(sorted(set(names)))
        index = {name: position for position, name in enumerate(self.domains)}
        self._domain = torch.tensor([index[name] for name in names])
        self.sums = torch.zeros(len(MEASURES), num_layers, len(self.domains), dtype=torch.float64)
        """`[3, L, G]`: the measures, summed over tokens."""
        self.tokens = torch.zeros(len(self.domains), dtype=torch.int64)
        """`[G]`"""
        self.histogram = torch.zeros(len(MEASURES), num_layers, BINS, dtype=torch.int64)
        """`[3, L, BINS]`: tokens by value, from 0 to 1; for the margin from -1 to 1."""
        self.overruled = torch.zeros(num_layers, dtype=torch.int64)
        """`[L]`: tokens with a margin below 0."""

    def observe(self, batch: RoutedBatch) -> None:
        real = batch.mask.flatten()
        domain = self._domain[batch.rows].repeat_interleave(batch.mask.shape[1])[real.cpu()]
        self.tokens += domain.bincount(minlength=len(self.tokens))
        for layer, selected in enumerate(batch.selected_experts):
            values = _measures(batch.scores(layer)[real], selected[real]).double().cpu()  # [3, N]
            self.sums[:, layer].index_add_(1, domain, values)
            self.overruled[layer] += (values[2] < 0).sum()
            places = torch.stack([values[0], values[1], (values[2] + 1) / 2])
            places = (places * BINS).long().clamp(0, BINS - 1)
            for measure, place in enumerate(places):
                self.histogram[measure, layer] += place.bincount(minlength=BINS)

    def mean(self) -> Tensor:
        """`[3, L]` float64: means over all tokens."""
        return self.sums.sum(-1) / self.tokens.sum()

    def mean_by_domain(self) -> Tensor:
        """`[3, L, G]` float64."""
        return self.sums / self.tokens

    def quantile(self, share: float) -> Tensor:
        """`[3, L]` float64: the value below which `share` of the tokens lie, within a bin's width."""
        reached = self.histogram.cumsum(-1) >= share * self.tokens.sum()
        values = (reached.double().argmax(-1).double() + 0.5) / BINS
        values[2] = values[2] * 2 - 1
        return values

    def overruled_share(self) -> Tensor:
        """`[L]` float64: share of the tokens for which a selected expert scored below one that was not."""
        return self.overruled.double() / self.tokens.sum()


def _measures(scores: Tensor, selected: Tensor) -> Tensor:
    """Scores `[N, E]` and selected experts `[N, K]` -> `[3, N]`, in the order of `MEASURES`."""
    entropy = torch.special.entr(scores).sum(-1) / math.log(max(scores.shape[-1], 2))
    chosen = scores.gather(-1, selected)
    top_weight = chosen.amax(-1) / chosen.sum(-1).clamp_min(1e-20)
    left_out = scores.scatter(-1, selected, -1.0).amax(-1)
    margin = torch.where(left_out >= 0, chosen.amin(-1) - left_out, 0.0)
    return torch.stack([entropy, top_weight, margin])


__all__ = ["MEASURES", "RouterConfidence"]
