"""Micro-batches: the packed corpus, and what each optimizer step of a run takes from it.

What a step holds is a function of the seed and the step alone, whatever the number of processes. Shapes: M
micro-batches in a step over all processes, R processes, B blocks in a micro-batch, T tokens in a block.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .blocks import Blocks, labels_of, tokenize
from .corpus import Corpus
from .keys import tokenizer_key
from .order import BlockOrder, DomainOrder
from .streams import BlockReader, TextStream


@dataclass(frozen=True)
class PackedCorpus:
    """The blocks of every domain; from `pack`."""

    domains: list[str]
    """Sorted; a block's `domain` is an index into them."""
    blocks: dict[str, Blocks]
    """Of the domains on disk."""
    streams: dict[str, TextStream]
    """Of the others."""
    weights: dict[str, float] | None
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    seed: int

    @property
    def num_blocks(self) -> dict[str, int | None]:
        """Domain -> how many blocks it has; None where it streams."""
        return {name: len(self.blocks[name]) if name in self.blocks else None for name in self.domains}


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int) -> PackedCorpus:
    """Tokenises the domains on disk, through a cache that knows text and tokenizer by their content.

    Args:
        corpus: From `open_corpus`.
        tokenizer: A fast tokenizer with an eos token; where it has no bos token, eos stands for it.
        block_size: Tokens per block, at least 2.
        seed: Shuffles the documents within their domain.

    Raises:
        ValueError: `block_size` is below 2; the tokenizer has no eos token; a domain has fewer than `block_size`
            tokens.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, for a token to be predicted from another; got {block_size}")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos token to end documents with; got one without")
    key = tokenizer_key(tokenizer)
    blocks = {}
    for number, name in enumerate(corpus.domains):
        if name in corpus.documents:
            tokens = tokenize(corpus.documents[name], tokenizer, key)
            blocks[name] = Blocks(tokens, block_size, seed=seed, domain=number)
            if not len(blocks[name]):
                raise ValueError(
                    f"block_size must be at most the number of tokens of every domain; "
                    f"got {block_size}, and {name} has {blocks[name].num_tokens}"
                )
    return PackedCorpus(corpus.domains, blocks, corpus.streams, corpus.weights, tokenizer, block_size, seed)


class MicroBatches:
    """The micro-batches of a run, for one of its processes.

    Process r of R takes micro-batches r, r + R, ... of each step. Domains on disk are read by every process for
    itself. Those that stream are read by process 0, one step ahead in a thread, and broadcast.

    Args:
        packed: From `pack`.
        micro_batch_size: B.
        micro_batches_per_step: M.
        seed: Of the order.
        micro_batch_domains: `mixed` draws the domain of each block, `single` that of each micro-batch.
        rank: This process.
        world_size: R, which divides M.
        broadcast: Given an int64 tensor on the CPU, of a shape that every process knows, returns process 0's. Needed
            where a domain streams and there are several processes.

    Raises:
        ValueError: a number is out of its range; `broadcast` is missing.
    """

    def __init__(
        self,
        packed: PackedCorpus,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int,
        seed: int,
        micro_batch_domains: Literal["mixed", "single"] = "mixed",
        rank: int = 0,
        world_size: int = 1,
        broadcast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for field, value in (
            ("micro_batch_size", micro_batch_size),
            ("micro_batches_per_step", micro_batches_per_step),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ValueError(f"{field} must be at least 1; got {value}")
        if micro_batches_per_step % world_size:
            raise ValueError(
                f"micro_batches_per_step must be a multiple of world_size ({world_size}); got {micro_batches_per_step}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and below world_size ({world_size}); got {rank}")
        if micro_batch_domains not in ("mixed", "single"):
            raise ValueError(f"micro_batch_domains must be mixed or single; got {micro_batch_domains}")
        if packed.streams and world_size > 1 and broadcast is None:
            raise ValueError(f"broadcast must be given where a domain streams ({list(packed.streams)}); got none")
        self._packed, self._seed = packed, seed
        self._size, self._per_step = micro_batch_size, micro_batches_per_step
        self._single = micro_batch_domains == "single"
        self._rank, self._world_size, self._broadcast = rank, world_size, broadcast
        counts = packed.num_blocks
        if packed.weights is None:
            # Only domains on disk go without weights.
            self._order = DomainOrder([counts[name] or 0 for name in packed.domains], seed=seed, exact=True)
        else:
            self._order = DomainOrder([packed.weights[name] for name in packed.domains], seed=seed)
        self._block_orders = [
            None if count is None else BlockOrder(count, seed=seed, domain=number)
            for number, count in enumerate(counts[name] for name in packed.domains)
        ]
        self._state: dict[str, Any] = {"step": 0, "streams": {}}

    def steps(self, first_step: int = 0, state: dict[str, Any] | None = None) -> Iterator[list[dict[str, Tensor]]]:
        """Yields this process' micro-batches of each step, without end.

        Args:
            first_step: Steps that came before.
            state: What `state_dict` gave after them; process 0 needs it where a domain streams.

        Yields:
            M / R micro-batches: `input_ids`, `position_ids`, `labels` `[B, T]` and `domain` `[B]`, int64. Positions
            begin at 0 at each document and at each block; labels are -100 there.

        Raises:
            ValueError: `state` is missing or is of another step; a stream cannot be read.
            RuntimeError: process 0 could not read a stream.
        """
        if first_step < 0:
            raise ValueError(f"first_step must be at least 0; got {first_step}")
        if state is not None and state.get("step") != first_step:
            raise ValueError(f"state must be that of first_step ({first_step}); got one of step {state.get('step')}")
        if not self._packed.streams:
            return self._steps_on_disk(first_step)
        if self._rank == 0 and first_step and not (state or {}).get("streams"):
            raise ValueError(f"state must be given to go on with streams at first_step {first_step}; got {state}")
        return self._steps_with_streams(first_step, state)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands after the last step yielded, JSON-able: `step`, and on process 0 `streams`, the place
        in each."""
        return copy.deepcopy(self._state)

    def contents(self, step: int) -> list[dict[str, Any]]:
        """Which blocks the M micro-batches of a step hold, JSON-able: `domains`, their names, and `blocks`, each
        block's index in its domain; in a domain that streams, how many of its blocks came before it."""
        return [
            {
                "domains": [self._packed.domains[domain] for domain, _ in draws],
                "blocks": [self._block_number(domain, k) for domain, k in draws],
            }
            for draws in self._draws(step)
        ]

    def epochs(self, step: int) -> dict[str, float | None]:
        """How often each domain has been gone through after so many steps. Of a domain that streams it is a whole
        number and known on process 0 for the last step yielded; None otherwise."""
        drawn = self._order.drawn_before(step * self._per_step * (1 if self._single else self._size))
        drawn = drawn * (self._size if self._single else 1)
        places = self._state["streams"] if self._state["step"] == step else {}
        passed: dict[str, float | None] = {}
        for name, blocks, count in zip(self._packed.domains, drawn, self._packed.num_blocks.values(), strict=True):
            if count is not None:
                passed[name] = int(blocks) / count
            else:
                passed[name] = float(places[name]["reader"]["epoch"]) if name in places else None
        return passed

    def _draws(self, step: int) -> list[list[tuple[int, int]]]:
        """Per micro-batch of the step, the domain of each block and how many of its blocks were drawn before."""
        size = self._size
        if not self._single:
            start = step * self._per_step * size
            flat = [self._order.draw(start + offset) for offset in range(self._per_step * size)]
            return [flat[first : first + size] for first in range(0, len(flat), size)]
        draws = []
        for number in range(step * self._per_step, (step + 1) * self._per_step):
            domain, earlier = self._order.draw(number)
            draws.append([(domain, earlier * size + offset) for offset in range(size)])
        return draws

    def _block_number(self, domain: int, k: int) -> int:
        order = self._block_orders[domain]
        return k if order is None else order[k]

    def _batch(self, draws: list[tuple[int, int]], streamed: Iterator[np.ndarray]) -> dict[str, Tensor]:
        blocks = []
        for domain, k in draws:
            order = self._block_orders[domain]
            blocks.append(
                next(streamed) if order is None else self._packed.blocks[self._packed.domains[domain]][order[k]]
            )
        batch = np.stack(blocks)
        return {
            "input_ids": torch.from_numpy(batch[:, 0].copy()),
            "position_ids": torch.from_numpy(batch[:, 1].copy()),
            "labels": torch.from_numpy(labels_of(batch)),
            "domain": torch.tensor([domain for domain, _ in draws]),
        }

    def _steps_on_disk(self, step: int) -> Iterator[list[dict[str, Tensor]]]:
        while True:
            own = self._draws(step)[self._rank :: self._world_size]
            batches = [self._batch(draws, iter(())) for draws in own]
            step += 1
            self._state = {"step": step, "streams": {}}
            yield batches

    def _steps_with_streams(self, step: int, state: dict[str, Any] | None) -> Iterator[list[dict[str, Tensor]]]:
        reading = self._rank == 0
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="streams")
        readers: dict[int, BlockReader] = {}
        ahead: Future | None = None
        try:
            if reading:
                ahead = executor.submit(self._read_first, readers, step, state)
            while True:
                draws = self._draws(step)
                streamed, places = self._receive(draws, ahead)
                if reading:
                    ahead = executor.submit(self._read, readers, step + 1)
                batches = []
                for number, of_micro_batch in enumerate(draws):
                    count = self._num_streamed([of_micro_batch])
                    if number % self._world_size == self._rank:
                        batches.append(self._batch(of_micro_batch, iter(streamed[:count])))
                    streamed = streamed[count:]
                step += 1
                self._state = {"step": step, "streams": places}
                yield batches
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _num_streamed(self, draws: list[list[tuple[int, int]]]) -> int:
        return sum(self._block_orders[domain] is None for of_micro_batch in draws for domain, _ in of_micro_batch)

    def _read_first(self, readers: dict[int, BlockReader], step: int, state: dict[str, Any] | None) -> Any:
        """Opens the streams at their places, then reads a step."""
        drawn = self._order.drawn_before(step * self._per_step * (1 if self._single else self._size))
        for number, name in enumerate(self._packed.domains):
            if name not in self._packed.streams:
                continue
            place = None if not step else state["streams"].get(name) if state else None
            before = int(drawn[number]) * (self._size if self._single else 1)
            if step and (place is None or place["block"] != before):
                got = None if place is None else place["block"]
                raise ValueError(f"state must hold the place of block {before} of {name}; got that of {got}")
            readers[number] = BlockReader(
                self._packed.streams[name],
                # The main thread may use the tokenizer too, and a fast one cannot be used twice at once.
                copy.deepcopy(self._packed.tokenizer),
                self._packed.block_size,
                seed=self._packed.seed,
                domain=number,
                state=place,
            )
        return self._read(readers, step)

    def _read(self, readers: dict[int, BlockReader], step: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The step's blocks of domains that stream, in order, `[blocks, 2, T]`, and the places after them."""
        draws = [draw for of_micro_batch in self._draws(step) for draw in of_micro_batch]
        blocks = [readers[domain].next() for domain, _ in draws if domain in readers]
        shape = (len(blocks), 2, self._packed.block_size)
        places = {self._packed.domains[number]: reader.state_dict() for number, reader in readers.items()}
        return np.array(blocks, dtype=np.int64).reshape(shape), places

    def _receive(self, draws: list[list[tuple[int, int]]], ahead: Future | None) -> tuple[np.ndarray, dict[str, Any]]:
        """What process 0 read, on every process."""
        shape = (self._num_streamed(draws), 2, self._packed.block_size)
        failed = torch.full(shape, -1, dtype=torch.int64)
        try:
            streamed, places = (None, {}) if ahead is None else ahead.result()
        except BaseException:
            if self._world_size > 1 and shape[0]:
                assert self._broadcast is not None
                self._broadcast(failed)  # the others wait for it
            raise
        if self._world_size == 1 or not shape[0]:
            return np.zeros(shape, np.int64) if streamed is None else streamed, places
        assert self._broadcast is not None
        received = self._broadcast(failed if streamed is None else torch.from_numpy(streamed)).cpu()
        if (received < 0).any():
            raise RuntimeError("process 0 could not read a stream; its own error says why")
        return received.numpy(), places
