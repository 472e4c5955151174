"""Order: which block each draw of a run takes, as a pure function of seed and position."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

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


class MicroBatchSampler(Sampler[list[int]]):
    """Yields the block indices of each micro-batch of a run, for `DataLoader(batch_sampler=...)`.

    Blocks are reshuffled each epoch by a generator seeded with `(seed, epoch)`; those that do not fill a last
    micro-batch wait for another epoch's shuffle. Position is all the state there is: to resume, skip. Under
    `accelerator.prepare`, process r of R takes micro-batches r, r + R, ... of this one order; choose
    `num_micro_batches` a multiple of R, for a remainder is dropped.

    Args:
        domains: Each block's domain, the `domain` column of `pack_documents`.
        micro_batch_size: Blocks per micro-batch.
        num_micro_batches: Length of the run in micro-batches, over all processes.
        seed: Seeds every shuffle.
        micro_batch_domains: `mixed` shuffles all blocks; `single` fills each micro-batch from one domain and
            shuffles the micro-batches.

    Raises:
        ValueError: A number is below 1, `micro_batch_domains` is neither, or there are fewer blocks (under
            `single`, of some domain) than a micro-batch holds.
    """

    # Read by accelerate's BatchSamplerShard: without `drop_last` it repeats the first blocks at the end.
    drop_last = True

    def __init__(
        self,
        domains: Sequence[int],
        micro_batch_size: int,
        num_micro_batches: int,
        *,
        seed: int,
        micro_batch_domains: Literal["mixed", "single"],
    ) -> None:
        for field, value in (("micro_batch_size", micro_batch_size), ("num_micro_batches", num_micro_batches)):
            if value < 1:
                raise ValueError(f"{field} must be at least 1; got {value}")
        if micro_batch_domains not in ("mixed", "single"):
            raise ValueError(f"micro_batch_domains must be mixed or single; got {micro_batch_domains}")
        if len(domains) < micro_batch_size:
            raise ValueError(
                f"micro_batch_size must be at most the number of blocks ({len(domains)}); got {micro_batch_size}"
            )
        self.batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        block_domains = np.asarray(domains[:], dtype=np.int64)
        # the blocks that a micro-batch may be filled from: all, or those of one domain
        self._pools = [np.arange(len(block_domains))]
        if micro_batch_domains == "single":
            self._pools = [np.flatnonzero(block_domains == domain) for domain in np.unique(block_domains)]
            for domain, pool in zip(np.unique(block_domains), self._pools, strict=True):
                if len(pool) < micro_batch_size:
                    raise ValueError(
                        f"micro_batch_size must be at most the number of blocks of every domain when "
                        f"micro_batch_domains is single; got {micro_batch_size}, and domain {domain} has {len(pool)}"
                    )

    def __len__(self) -> int:
        return self.num_micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        left, epoch = self.num_micro_batches, 0
        while left:
            for micro_batch in self._epoch(epoch)[:left]:
                left -= 1
                yield micro_batch.tolist()
            epoch += 1

    def _epoch(self, epoch: int) -> np.ndarray:
        """The micro-batches of one epoch, `[micro-batches, micro_batch_size]`."""
        generator = np.random.default_rng((self.seed, epoch))
        size = self.batch_size
        rows = [generator.permutation(pool)[: len(pool) // size * size].reshape(-1, size) for pool in self._pools]
        return generator.permutation(np.concatenate(rows))
