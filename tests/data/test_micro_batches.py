"""Micro-batches: a function of seed and step alone, over ranks, resumes, domains on disk and streams."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.configuration import DataSettings
from equipoise.data import MicroBatches, PackedCorpus, load_tokenizer, open_corpus, pack, streams, train_tokenizer

STEPS = 6
ON_DISK = """
domains:
  code: {files: code.jsonl, weight: 3}
  law: {files: law.jsonl, weight: 1}
"""
MIXED = """
domains:
  code: {files: code.jsonl, streaming: true, weight: 3}
  law: {files: law.jsonl, weight: 2}
  prose: {files: prose.jsonl, streaming: true, weight: 1}
"""


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "WINDOW_DOCUMENTS", 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for domain, count in (("code", 90), ("law", 50), ("prose", 70)):
        rows = [{"text": f"{domain} {number} " + "abc cab " * (number % 9)} for number in range(count)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "disk.yaml").write_text(ON_DISK)
    (folder / "mixed.yaml").write_text(MIXED)
    plain = folder / "plain"
    for domain in ("code", "law"):
        (plain / domain).mkdir(parents=True)
        (plain / domain / "all.jsonl").write_text((folder / f"{domain}.jsonl").read_text())
    train_tokenizer(["abc cab bac law code prose"] * 10, 280).save_pretrained(folder / "tokenizer")
    return folder


def packed_of(folder: Path, name: str, block_size: int = 12, seed: int = 0) -> PackedCorpus:
    corpus = open_corpus(DataSettings(data=str(folder / name), validation_fraction=0.1), seed=0)
    return pack(corpus, load_tokenizer(folder / "tokenizer"), block_size, seed)


@pytest.fixture(scope="module")
def packed(folder: Path) -> dict[str, PackedCorpus]:
    return {name: packed_of(folder, name) for name in ("plain", "disk.yaml", "mixed.yaml")}


def run(
    packed: PackedCorpus,
    arguments: dict,
    steps: int = STEPS,
    first: int = 0,
    state: dict | None = None,
    ranks: int = 1,
) -> tuple[list[list[dict[str, Tensor]]], list[dict]]:
    """The steps of a run over simulated ranks, put together again; and rank 0's state after each."""
    sent: list[Tensor] = []
    collected: list[list[Any]] = [[None] * arguments["micro_batches_per_step"] for _ in range(steps)]
    states = []
    for rank in range(ranks):
        replay = iter(sent)

        def broadcast(tensor: Tensor, rank: int = rank, replay: Iterator[Tensor] = replay) -> Tensor:
            if rank == 0:
                sent.append(tensor.clone())
                return tensor
            received = next(replay)
            assert tensor.shape == received.shape, "every rank knows the shape"
            return received

        own = MicroBatches(packed, **arguments, rank=rank, world_size=ranks, broadcast=broadcast)
        iterator = own.steps(first, state if rank == 0 else None)
        for number, batches in enumerate(islice(iterator, steps)):
            assert len(batches) == arguments["micro_batches_per_step"] // ranks
            collected[number][rank::ranks] = batches
            if rank == 0:
                states.append(json.loads(json.dumps(own.state_dict())))
        iterator.close()
    return collected, states


def same(first: list[list[dict[str, Tensor]]], second: list[list[dict[str, Tensor]]]) -> bool:
    return len(first) == len(second) and all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for one, other in zip(first, second, strict=True)
        for left, right in zip(one, other, strict=True)
    )


shapes = st.fixed_dictionaries(
    {
        "micro_batch_size": st.integers(1, 4),
        "micro_batches_per_step": st.sampled_from([1, 2, 3, 4, 6, 12]),
        "seed": st.integers(0, 3),
        "micro_batch_domains": st.sampled_from(["mixed", "single"]),
    }
)


@settings(max_examples=25)
@given(arguments=shapes, name=st.sampled_from(["plain", "disk.yaml", "mixed.yaml"]), data=st.data())
def test_ranks_and_resumes_change_nothing(
    packed: dict[str, PackedCorpus], arguments: dict, name: str, data: Any
) -> None:
    alone, states = run(packed[name], arguments)
    divisors = [ranks for ranks in (2, 3, 4) if arguments["micro_batches_per_step"] % ranks == 0]
    for ranks in divisors:
        shared, shared_states = run(packed[name], arguments, ranks=ranks)
        assert same(shared, alone)
        assert shared_states == states
    done = data.draw(st.integers(0, STEPS - 1))
    ranks = data.draw(st.sampled_from([1, *divisors]))
    state = states[done - 1] if done else None
    resumed, resumed_states = run(packed[name], arguments, STEPS - done, done, state, ranks)
    assert same(resumed, alone[done:])
    assert resumed_states == states[done:]


@pytest.mark.parametrize("micro_batch_domains", ["mixed", "single"])
@pytest.mark.parametrize("name", ["plain", "mixed.yaml"])
def test_going_on_after_every_step(packed: dict[str, PackedCorpus], name: str, micro_batch_domains: str) -> None:
    arguments = {
        "micro_batch_size": 3,
        "micro_batches_per_step": 6,
        "seed": 1,
        "micro_batch_domains": micro_batch_domains,
    }
    alone, states = run(packed[name], arguments, 25)
    for done in range(1, 25):
        assert same(run(packed[name], arguments, 1, done, states[done - 1])[0], alone[done : done + 1])
    if name == "mixed.yaml":
        assert states[-1]["streams"]["code"]["reader"]["epoch"] >= 1, "the stream must have begun again"


@pytest.mark.parametrize("name", ["plain", "disk.yaml", "mixed.yaml"])
@pytest.mark.parametrize("micro_batch_domains", ["mixed", "single"])
def test_contents_are_what_a_step_holds(packed: dict[str, PackedCorpus], name: str, micro_batch_domains: str) -> None:
    own = packed[name]
    arguments = {
        "micro_batch_size": 3,
        "micro_batches_per_step": 4,
        "seed": 0,
        "micro_batch_domains": micro_batch_domains,
    }
    steps, _ = run(own, arguments, 10)
    batches = MicroBatches(own, **arguments)
    streamed: Counter = Counter()
    for number, step in enumerate(steps):
        contents = json.loads(json.dumps(batches.contents(number)))
        assert len(contents) == 4
        for batch, content in zip(step, contents, strict=True):
            assert [own.domains[domain] for domain in batch["domain"]] == content["domains"]
            if micro_batch_domains == "single":
                assert len(set(content["domains"])) == 1
            for row, (domain, block) in enumerate(zip(content["domains"], content["blocks"], strict=True)):
                if domain in own.blocks:
                    assert batch["input_ids"][row].tolist() == own.blocks[domain][block][0].tolist()
                else:
                    assert block == streamed[domain]
                    streamed[domain] += 1
            positions, labels = batch["position_ids"], batch["labels"]
            assert torch.equal(labels, torch.where(positions == 0, -100, batch["input_ids"]))
            assert all(tensor.dtype == torch.int64 for tensor in batch.values())
            assert batch["input_ids"].shape == (3, 12)
            assert batch["domain"].shape == (3,)


def test_without_weights_an_epoch_holds_every_block_once(packed: dict[str, PackedCorpus]) -> None:
    own = packed["plain"]
    total = sum(count or 0 for count in own.num_blocks.values())
    batches = MicroBatches(own, micro_batch_size=1, micro_batches_per_step=1, seed=0)
    for epoch in range(2):
        drawn = Counter()
        for step in range(epoch * total, (epoch + 1) * total):
            (content,) = batches.contents(step)
            drawn[content["domains"][0], content["blocks"][0]] += 1
        assert set(drawn.values()) == {1}
        assert len(drawn) == total
        assert batches.epochs((epoch + 1) * total) == dict.fromkeys(own.domains, epoch + 1.0)


def test_weights_are_the_shares_and_epochs_count_them(packed: dict[str, PackedCorpus]) -> None:
    own = packed["disk.yaml"]
    for micro_batch_domains in ("mixed", "single"):
        batches = MicroBatches(
            own, micro_batch_size=2, micro_batches_per_step=8, seed=0, micro_batch_domains=micro_batch_domains
        )
        drawn = Counter(
            name for step in range(200) for content in batches.contents(step) for name in content["domains"]
        )
        assert drawn["code"] / drawn.total() == pytest.approx(0.75, abs=0.04)
        expected = {name: drawn[name] / len(own.blocks[name]) for name in own.domains}
        assert batches.epochs(200) == pytest.approx(expected)


def test_a_far_step_starts_at_once(packed: dict[str, PackedCorpus]) -> None:
    batches = MicroBatches(packed["plain"], micro_batch_size=8, micro_batches_per_step=64, seed=0)
    step = next(batches.steps(1_000_000))
    assert len(step) == 64
    assert batches.state_dict() == {"step": 1_000_001, "streams": {}}


def test_epochs_of_a_stream_are_known_where_it_stands(packed: dict[str, PackedCorpus]) -> None:
    batches = MicroBatches(packed["mixed.yaml"], micro_batch_size=4, micro_batches_per_step=8, seed=0)
    iterator = batches.steps()
    for _ in range(12):
        next(iterator)
    assert batches.epochs(12)["code"] == batches.state_dict()["streams"]["code"]["reader"]["epoch"]
    assert batches.epochs(12)["code"] >= 1
    assert batches.epochs(11)["code"] is None
    assert packed["mixed.yaml"].num_blocks["code"] is None


def broadcast_from_first(tensor: Tensor) -> Tensor:
    dist.broadcast(tensor, src=0)
    return tensor


def stream_in_process(rank: int, world_size: int, folder: str, first: int, states: list[str]) -> dict[str, Any]:
    """Three steps of a run in a real process."""
    streams.WINDOW_DOCUMENTS = 16
    own = MicroBatches(
        packed_of(Path(folder), "mixed.yaml"),
        micro_batch_size=2,
        micro_batches_per_step=4,
        seed=0,
        rank=rank,
        world_size=world_size,
        broadcast=broadcast_from_first,
    )
    state = json.loads(states[0]) if rank == 0 and states else None
    iterator = own.steps(first, state)
    steps = list(islice(iterator, 3))
    iterator.close()
    return {
        "input_ids": [[batch["input_ids"] for batch in step] for step in steps],
        "state": json.dumps(own.state_dict()),
    }


@pytest.mark.processes
def test_real_processes_read_one_stream(
    folder: Path, packed: dict[str, PackedCorpus], run_processes: Callable[..., list[Any]]
) -> None:
    arguments = {"micro_batch_size": 2, "micro_batches_per_step": 4, "seed": 0}
    alone, _ = run(packed["mixed.yaml"], arguments)
    state: list[str] = []
    for first in (0, 3):
        answers = run_processes(2, stream_in_process, str(folder), first, state)
        for rank, answer in enumerate(answers):
            for number, step in enumerate(answer["input_ids"]):
                expected = alone[first + number][rank::2]
                assert all(torch.equal(one, two["input_ids"]) for one, two in zip(step, expected, strict=True))
        state = [answers[0]["state"]]


def test_a_stream_that_fails_fails_on_every_rank(
    packed: dict[str, PackedCorpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = packed["mixed.yaml"]
    arguments = {"micro_batch_size": 4, "micro_batches_per_step": 2, "seed": 0}
    sent: list[Tensor] = []

    def fail(self: Any) -> None:
        raise OSError("the network is gone")

    monkeypatch.setattr(streams.BlockReader, "next", fail)
    first = MicroBatches(
        own, **arguments, rank=0, world_size=2, broadcast=lambda tensor: sent.append(tensor) or tensor
    )
    with pytest.raises(OSError, match="the network is gone"):
        next(first.steps())
    second = MicroBatches(own, **arguments, rank=1, world_size=2, broadcast=lambda tensor: sent[0])
    with pytest.raises(RuntimeError, match="process 0 could not read a stream"):
        next(second.steps())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1; got 0"),
        ({"micro_batches_per_step": 0}, "micro_batches_per_step must be at least 1; got 0"),
        ({"micro_batches_per_step": 3, "world_size": 2}, r"micro_batches_per_step must be a multiple .* \(2\); got 3"),
        ({"rank": 1}, r"rank must be at least 0 and below world_size \(1\); got 1"),
        ({"micro_batch_domains": "some"}, "micro_batch_domains must be mixed or single; got some"),
        ({"world_size": 2}, r"broadcast must be given where a domain streams \(\['code', 'prose'\]\)"),
    ],
)
def test_errors_name_field_and_value(packed: dict[str, PackedCorpus], changes: dict, words: str) -> None:
    arguments = {"micro_batch_size": 2, "micro_batches_per_step": 2, "seed": 0} | changes
    with pytest.raises(ValueError, match=words):
        MicroBatches(packed["mixed.yaml"], **arguments)


def test_a_state_of_another_place_is_refused(packed: dict[str, PackedCorpus]) -> None:
    arguments = {"micro_batch_size": 2, "micro_batches_per_step": 2, "seed": 0}
    _, states = run(packed["mixed.yaml"], arguments)
    batches = MicroBatches(packed["mixed.yaml"], **arguments)
    with pytest.raises(ValueError, match=r"state must be that of first_step \(3\); got one of step 2"):
        batches.steps(3, states[1])
    with pytest.raises(ValueError, match="state must be given to go on with streams at first_step 3; got None"):
        batches.steps(3)
    other = MicroBatches(packed["mixed.yaml"], **arguments | {"micro_batch_size": 3})
    with pytest.raises(ValueError, match=r"state must hold the place of block .* of code; got that of"):
        next(other.steps(3, states[2]))


def test_pack_errors_name_field_and_value(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"block_size must be at least 2.*; got 1"):
        packed_of(folder, "plain", block_size=1)
    with pytest.raises(ValueError, match=r"block_size must be at most .*; got 100000, and code has \d+$"):
        packed_of(folder, "plain", block_size=100_000)
