"""The order of micro-batches: pure, exact in length, and the same order however many processes share it."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from equipoise.data import MicroBatchSampler

runs = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(4, 13), min_size=1, max_size=4),
        "micro_batch_size": st.integers(1, 4),
        "num_micro_batches": st.integers(1, 40),
        "seed": st.integers(0, 5),
        "micro_batch_domains": st.sampled_from(["mixed", "single"]),
    }
)


def sampler_of(run: dict) -> tuple[list[int], MicroBatchSampler]:
    domains = [domain for domain, count in enumerate(run["counts"]) for _ in range(count)]
    return domains, MicroBatchSampler(domains, **{name: value for name, value in run.items() if name != "counts"})


@given(run=runs)
def test_micro_batches_cover_the_blocks_epoch_by_epoch(run: dict) -> None:
    domains, sampler = sampler_of(run)
    micro_batches = list(sampler)
    size = run["micro_batch_size"]
    assert len(micro_batches) == len(sampler) == run["num_micro_batches"]
    assert all(len(set(micro_batch)) == size for micro_batch in micro_batches)
    assert list(sampler) == micro_batches == list(sampler_of(run)[1])
    if run["micro_batch_domains"] == "single":
        assert all(len({domains[block] for block in micro_batch}) == 1 for micro_batch in micro_batches)
        per_epoch = sum(count // size for count in run["counts"])
    else:
        per_epoch = len(domains) // size
    for start in range(0, len(micro_batches), per_epoch):
        epoch = Counter(block for micro_batch in micro_batches[start : start + per_epoch] for block in micro_batch)
        assert max(epoch.values()) == 1, "a block twice in one epoch"


@given(run=runs, longer=st.integers(1, 20))
def test_a_longer_run_begins_like_a_shorter_one(run: dict, longer: int) -> None:
    _, short = sampler_of(run)
    _, long = sampler_of(run | {"num_micro_batches": run["num_micro_batches"] + longer})
    assert list(long)[: len(short)] == list(short)


@given(run=runs, num_processes=st.integers(1, 4))
def test_processes_share_one_order(run: dict, num_processes: int) -> None:
    _, sampler = sampler_of(run | {"num_micro_batches": run["num_micro_batches"] * num_processes})
    for rank in range(num_processes):
        shard = BatchSamplerShard(sampler, num_processes=num_processes, process_index=rank)
        assert list(shard) == list(sampler)[rank::num_processes]
        assert len(shard) == run["num_micro_batches"]


def test_a_remainder_is_dropped_on_every_process() -> None:
    sampler = MicroBatchSampler([0] * 9, 2, 7, seed=0, micro_batch_domains="mixed")
    for rank in range(2):
        assert list(BatchSamplerShard(sampler, num_processes=2, process_index=rank)) == list(sampler)[rank:6:2]


def test_seed_and_epoch_change_the_order() -> None:
    def order(seed: int) -> list[list[int]]:
        return list(MicroBatchSampler([0] * 32, 4, 16, seed=seed, micro_batch_domains="mixed"))

    assert order(0) != order(1)
    assert order(0)[:8] != order(0)[8:]


def test_mixed_micro_batches_mix() -> None:
    domains = [0] * 64 + [1] * 64
    micro_batches = list(MicroBatchSampler(domains, 8, 16, seed=0, micro_batch_domains="mixed"))
    assert sum(len({domains[block] for block in micro_batch}) == 2 for micro_batch in micro_batches) >= 14


def test_prepared_loader_yields_the_order_and_can_skip() -> None:
    blocks = Dataset.from_dict({"block": list(range(20)), "domain": [0] * 10 + [1] * 10}).with_format("torch")
    sampler = MicroBatchSampler(blocks["domain"], 3, 8, seed=1, micro_batch_domains="single")
    expected = list(sampler)
    loader = DataLoader(blocks, batch_sampler=sampler)
    prepared = Accelerator(cpu=True).prepare(loader)
    assert [batch["block"].tolist() for batch in prepared] == expected
    assert [batch["block"].tolist() for batch in skip_first_batches(prepared, 5)] == expected[5:]
    for rank in range(2):
        shard = prepare_data_loader(loader, device=torch.device("cpu"), num_processes=2, process_index=rank)
        # The sampler behind it: iterating the loader itself would wait for the other process.
        assert list(shard.batch_sampler) == expected[rank::2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1; got 0"),
        ({"num_micro_batches": 0}, "num_micro_batches must be at least 1; got 0"),
        ({"micro_batch_domains": "some"}, "micro_batch_domains must be mixed or single; got some"),
        ({"micro_batch_size": 9}, r"micro_batch_size must be at most the number of blocks \(8\); got 9"),
        ({"micro_batch_size": 4}, "micro_batch_size .* got 4, and domain 1 has 3"),
    ],
)
def test_errors_name_field_and_value(change: dict, message: str) -> None:
    arguments = {"micro_batch_size": 2, "num_micro_batches": 3, "seed": 0, "micro_batch_domains": "single"} | change
    with pytest.raises(ValueError, match=message):
        MicroBatchSampler([0] * 5 + [1] * 3, **arguments)
