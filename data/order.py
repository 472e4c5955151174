"""Order: which blocks each micro-batch of a run holds, as a pure function of seed and position."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Sampler


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
