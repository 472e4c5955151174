"""Order: which block each draw of a run takes, as a pure function of seed and position."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# What a generator is for; every generator is seeded with (seed, purpose, ...), four numbers in all.
DRAWS, BLOCKS, DOCUMENTS, WINDOWS, SAMPLE = range(1, 6)

# Draws of a round where weights decide: a weight is kept to within one part in so many.
_ROUND = 16_384


def generator(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """The generator of one purpose at one place, independent of all others."""
    # NumPy takes (1, 2) and (1, 2, 0) for the same seed: all have the same length.
    return np.random.default_rng((seed, purpose, *place, *(0,) * (2 - len(place))))


class DomainOrder:
    """Which domain each draw of an endless run takes, in its weights' proportion.

    Draws come in rounds. In each round every domain has the same whole number of draws, its quota, shuffled by a
    generator of `(seed, round)`; so how often a domain was drawn before any position is known without going there.

    Args:
        weights: Per domain, above 0.
        seed: Seeds every shuffle.
        exact: The weights are the whole numbers of draws in a round, if these are not too many: each domain is gone
            through exactly once a round.

    Raises:
        ValueError: a weight is not above 0, or there are more domains than draws in a round.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, exact: bool = False) -> None:
        for weight in weights:
            if not 0 < weight < np.inf:
                raise ValueError(f"weight must be above 0 and finite; got {weight}")
        if not 1 <= len(weights) <= _ROUND:
            raise ValueError(f"domains must be between 1 and {_ROUND}; got {len(weights)}")
        total = int(sum(weights)) if exact else 0
        self.quotas = quotas(weights, total if exact and total <= 4 * _ROUND else _ROUND)
        self.seed = seed
        self._round_length = int(self.quotas.sum())
        self._round = lru_cache(maxsize=2)(self._make_round)

    def draw(self, position: int) -> tuple[int, int]:
        """The domain of a draw, and how many draws before it took the same domain."""
        round_number, place = divmod(position, self._round_length)
        domains, earlier = self._round(round_number)
        domain = int(domains[place])
        return domain, round_number * int(self.quotas[domain]) + int(earlier[place])

    def drawn_before(self, position: int) -> np.ndarray:
        """How many draws before a position took each domain, `[domains]`."""
        round_number, place = divmod(position, self._round_length)
        domains, _ = self._round(round_number)
        return round_number * self.quotas + np.bincount(domains[:place], minlength=len(self.quotas))

    def _make_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The domain of each draw of a round, and how many draws of the round before it took the same."""
        domains = np.repeat(np.arange(len(self.quotas)), self.quotas)
        domains = generator(self.seed, DRAWS, number).permutation(domains)
        earlier = np.empty_like(domains)
        earlier[np.argsort(domains, kind="stable")] = np.concatenate([np.arange(quota) for quota in self.quotas])
        return domains, earlier


class BlockOrder:
    """Which block of a domain its k-th draw takes: each once per epoch, in an order of `(seed, domain, epoch)`."""

    def __init__(self, num_blocks: int, *, seed: int, domain: int) -> None:
        self.num_blocks, self.seed, self.domain = num_blocks, seed, domain
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, k: int) -> int:
        epoch, place = divmod(k, self.num_blocks)
        return int(self._epoch(epoch)[place])

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return generator(self.seed, BLOCKS, self.domain, epoch).permutation(self.num_blocks)


def quotas(weights: Sequence[float], draws: int) -> np.ndarray:
    """Whole numbers in the weights' proportion that sum to `draws`, by largest remainder, each at least 1."""
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum() * draws
    whole = np.maximum(np.floor(shares).astype(np.int64), 1)
    missing = draws - int(whole.sum())
    if missing > 0:
        whole[np.argsort(-(shares - whole), kind="stable")[:missing]] += 1
    for _ in range(-missing):  # the minimum of 1 took draws that are given back by those furthest above their share
        excess = np.where(whole > 1, whole - shares, -np.inf)
        whole[np.argmax(excess)] -= 1
    return whole
