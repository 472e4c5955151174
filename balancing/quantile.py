"""The quantile rule: the bias at which an expert would get its share, read off one synchronised histogram.

`L` MoE layers, `N` tokens, `E` experts, `K` experts per token.
"""

import torch
from torch import Tensor

from .bias_updates import BiasUpdate, centred

BINS = 256
"""Between the two that hold everything below and above the window."""


class QuantileUpdate(BiasUpdate):
    """`b_i <- (1 - rho) b_i + rho Q_{K/E}(cutoff_{-i} - s_i)`, then the biases are centred.

    A token selects expert `i` if its score `s_i` plus `b_i` exceeds `cutoff_{-i}`, the `K`-th largest biased score
    among the *other* experts. So the `K/E` quantile over the tokens of the margin `cutoff_{-i} - s_i` is the bias that
    gives the expert a share of `K/E`, as long as the others stay where they are. They move too: the fixed point is
    balance, one update is not, and a damped one (`rho` below 1) comes closer. Not for group-limited routing, where the
    cutoff is another thing.

    The quantile comes from a histogram `[L, E, BINS + 2]`, summed over micro-batches and ranks, and interpolated
    within its bin. Each expert's window follows its quantile: it narrows to the margins around it, and widens fourfold
    when the quantile falls outside. Fixed bins would not do: with 256 experts and saturated sigmoids all margins fall
    into one of them.

    Source: Kimi K3 technical report, section 2.3.3, which takes one cutoff for all experts.
    """

    default_rate = 0.2
    needs_scores = True

    def __init__(self) -> None:
        self._low: Tensor | None = None
        """`[L, E]`, fp64: where each window begins, and `_high` ends."""
        self._high: Tensor | None = None
        self._counts: Tensor | None = None
        """int64 `[L, E, BINS + 2]`, of this rank since the last optimizer step."""

    def observe(self, scores: Tensor, biases: Tensor, num_experts_per_tok: int, mask: Tensor | None) -> None:
        biases = biases.double()
        if self._low is None or self._high is None:
            # Scores are between 0 and 1, so no margin lies outside.
            ones = torch.ones_like(biases)
            self._low, self._high = biases.amin(-1, True) - ones, biases.amax(-1, True) + ones
        self._low, self._high = self._low.to(scores.device), self._high.to(scores.device)
        layers = []
        for layer in range(len(scores)):  # one at a time: `[N, E]` in float64 is enough to hold
            position = self._margins(scores[layer].double(), biases[layer], num_experts_per_tok) - self._low[layer]
            position *= BINS / (self._high[layer] - self._low[layer])
            index = position.floor_().clamp_(-1, BINS).long().t() + 1  # [E, N]
            ones = torch.ones_like(index) if mask is None else mask.long().expand_as(index)
            counts = torch.zeros(len(index), BINS + 2, dtype=torch.long, device=scores.device)
            layers.append(counts.scatter_add_(-1, index, ones))
        found = torch.stack(layers)
        self._counts = found if self._counts is None else self._counts.to(found.device) + found

    @staticmethod
    def _margins(scores: Tensor, biases: Tensor, num_experts_per_tok: int) -> Tensor:
        """`cutoff_{-i} - s_i`, `[N, E]`: the bias above which the token would select the expert."""
        biased = scores + biases
        last, first_left_out = biased.topk(num_experts_per_tok + 1).values[..., -2:].split(1, dim=-1)
        # Without a selected expert, the first that was left out moves up to be the K-th of the others.
        # Not a number only where a masked position holds none: there any margin will do.
        return (torch.where(biased >= last, first_left_out, last) - scores).nan_to_num(0.0)

    def gathered(self) -> Tensor | None:
        return self._counts

    def update(self, biases: Tensor, load: Tensor, rate: float, gathered: Tensor | None) -> Tensor:
        assert gathered is not None
        assert self._low is not None
        assert self._high is not None
        counts = gathered
        tokens = counts.sum(dim=-1)
        share = load.sum(dim=-1, keepdim=True) / tokens.clamp(min=1) / load.shape[-1]  # K / E
        quantile, inside = self._quantile(counts, share)
        lower, _ = self._quantile(counts, share / 4)
        upper, _ = self._quantile(counts, torch.minimum(share * 4, (1 + share) / 2))
        width = self._high - self._low
        reach = 2 * torch.maximum(upper - quantile, quantile - lower)
        # Not narrower than a sixteenth at a time, nor than fp32 biases can tell apart.
        reach = torch.maximum(reach.maximum(width / 16), 1e-6 * (1 + quantile.abs()))
        reach = torch.where(inside, reach, 2 * width)
        moved = centred((1 - rate) * biases.double() + rate * quantile)

        # A batch without tokens says nothing.
        counted = tokens > 0
        self._low = torch.where(counted, quantile - reach, self._low)
        self._high = torch.where(counted, quantile + reach, self._high)
        return torch.where(counted, moved, biases.double()).float()

    def _quantile(self, counts: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The margin `[L, E]` below which `share` of the tokens lie, and whether it lies inside the window.

        Outside, it is the window's nearer end.
        """
        assert self._low is not None
        assert self._high is not None
        cumulative = counts.cumsum(dim=-1).double()
        wanted = (share * cumulative[..., -1])[..., None]
        index = (cumulative < wanted).sum(dim=-1, keepdim=True).clamp(max=BINS + 1)
        here = counts.gather(-1, index).double()
        fraction = (wanted - (cumulative.gather(-1, index) - here)) / here.clamp(min=1)
        position = (index - 1 + fraction).squeeze(-1).clamp(0, BINS) / BINS
        inside = ((index > 0) & (index <= BINS)).squeeze(-1)
        return self._low + position * (self._high - self._low), inside

    def forget(self) -> None:
        self._counts = None

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"low": self._low, "high": self._high, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self._low, self._high, counts = state["low"], state["high"], state["counts"]
        self._counts = None if counts is None else counts.long()
