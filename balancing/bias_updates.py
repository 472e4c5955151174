"""Loss-free rules: how the selection bias follows the load.

`L` MoE layers, `N` tokens, `E` experts, `K` experts per token.

A rule sees the load of whole global batches and nothing else that differs between ranks: the same integers go in on
every rank, so the same biases come out, to the bit.
"""

from typing import ClassVar

import torch
from torch import Tensor

from .load import load_fraction


def centred(bias: Tensor) -> Tensor:
    """Biases `[..., E]` less their mean.

    Only differences between biases select; the part they share would drift until bf16, and then fp32, rounds the
    differences away.
    """
    return bias - bias.mean(dim=-1, keepdim=True)


def shortfall(load: Tensor) -> Tensor:
    """`(mean load - load_i) / mean load`: 1 for a dead expert, 0 at balance, `1 - E / K` at worst.

    Args:
        load: counts `[..., E]`.

    Returns:
        float32 `[..., E]`; 0 where nothing was counted.
    """
    relative = 1 - load_fraction(load, torch.float64) * load.shape[-1]
    return torch.where(load.sum(dim=-1, keepdim=True) > 0, relative, 0.0).float()


def load_sign(load: Tensor) -> Tensor:
    """`sign(mean load - load_i)`, float32 `[..., E]`.

    In integers: `sum - E * load` has the sign of `mean - load`, and no rounding decides a tie.
    """
    return (load.sum(dim=-1, keepdim=True) - load.shape[-1] * load).sign().float()


class BiasUpdate:
    """A rule: from biases `[L, E]` and the load of a global batch to new biases.

    A rule may keep state from batch to batch, and may look at each micro-batch's scores (`observe`); what it gathers
    there is summed over the ranks with the load.
    """

    default_rate: ClassVar[float]
    """The rate where none is given."""
    needs_scores: ClassVar[bool] = False
    """Whether the rule looks at each micro-batch's scores (`observe`)."""

    def observe(self, scores: Tensor, biases: Tensor, num_experts_per_tok: int, mask: Tensor | None) -> None:
        """Take in a micro-batch before its load is known; most rules need no more than the load.

        Args:
            scores: the router's `[L, N, E]`, without bias.
            biases: `[L, E]`, those that the selection saw.
            num_experts_per_tok: `K`.
            mask: boolean `[N]`, true for tokens.
        """

    def gathered(self) -> Tensor | None:
        """Integers to be summed over the ranks before `update`; `None` if the load is enough."""
        return None

    def update(self, biases: Tensor, load: Tensor, rate: float, gathered: Tensor | None) -> Tensor:
        """New biases.

        Args:
            biases: fp32 `[L, E]`.
            load: int64 `[L, E]`, selections in one global batch over all ranks.
            rate: `bias_update_rate`, decayed where asked.
            gathered: what `gathered` gave, summed over the ranks.

        Returns:
            fp32 `[L, E]`, a new tensor.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what was gathered since the last optimizer step: the step is over, or was not made."""

    def state_dict(self) -> dict[str, Tensor | None]:
        """What the rule keeps from batch to batch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """The inverse of `state_dict`; the tensors may come in float64 and on the CPU."""


class SignUpdate(BiasUpdate):
    """`b_i += u sign(mean load - load_i)`, then the biases are centred.

    Source: Loss-Free Balancing, arXiv 2408.15664, algorithm 1.
    """

    default_rate = 1e-3

    def update(self, biases: Tensor, load: Tensor, rate: float, gathered: Tensor | None) -> Tensor:
        return centred(biases + rate * load_sign(load))


class CentredSignUpdate(BiasUpdate):
    """`b_i += u (s_i - mean(s))` with `s_i = sign(mean load - load_i)`: the step is centred, not the biases.

    Selects as `sign` does. Biases that were centred stay so; those of a released model that were not keep the mean
    they were loaded with, and differ from the release by what was learnt since.
    """

    default_rate = 1e-3

    def update(self, biases: Tensor, load: Tensor, rate: float, gathered: Tensor | None) -> Tensor:
        return biases + rate * centred(load_sign(load))


class ProportionalUpdate(BiasUpdate):
    """`b_i += u (mean load - load_i) / mean load`, then the biases are centred.

    Source: Loss-Free Balancing, arXiv 2408.15664, section 4.3, there with the load in tokens; relative to the mean
    load a rate means the same for any batch size.
    """

    default_rate = 1e-2

    def update(self, biases: Tensor, load: Tensor, rate: float, gathered: Tensor | None) -> Tensor:
        return centred(biases + rate * shortfall(load))


class TanhMomentumUpdate(BiasUpdate):
    """Soft-clamped momentum: `d = u tanh(kappa v)`, centred; `m = beta m + (1 - beta) d`; `b += m`, with `v` the
    relative shortfall `(mean load - load_i) / mean load`.

    Source: SMEBU, Arcee Trinity Large technical report, arXiv 2602.17004.

    Args:
        kappa: how sharply the clamp sets in; large values make the rule `centred_sign` with momentum.
        momentum: `beta`.
    """

    default_rate = 1e-3

    def __init__(self, kappa: float = 2.0, momentum: float = 0.5) -> None:
        self.kappa = kappa
        self.momentum = momentum
        self._mean_step: Tensor | None = None

    def update(self, biases: Tensor, load: Tensor, rate: float, gathered: Tensor | None) -> Tensor:
        step = centred(rate * torch.tanh(self.kappa * shortfall(load)))
        before = torch.zeros_like(step) if self._mean_step is None else self._mean_step.to(step.device)
        self._mean_step = self.momentum * before + (1 - self.momentum) * step
        return biases + self._mean_step

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"mean_step": self._mean_step}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        mean_step = state["mean_step"]
        self._mean_step = None if mean_step is None else mean_step.float()
