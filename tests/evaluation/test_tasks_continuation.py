"""Continuation items: what each consists of, over random documents."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from equipoise.evaluation import continuation_items, plan_evaluation, plan_tokens
from equipoise.evaluation.continuations import FEWEST_ITEMS

WORDS = ["law", "übel", "数字", "f(x)", "\n\n", "🙂", "a" * 40, "\t", "and", "12"]


def made_documents(sizes: list[int], seed: int = 0, domain: str = "d") -> list[dict[str, str]]:
    """Documents of so many words, no two alike."""
    generator = random.Random(seed)
    return [
        {"text": f"{number} " + generator.choice(["", " "]).join(generator.choices(WORDS, k=size)), "domain": domain}
        for number, size in enumerate(sizes)
    ]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    context_bytes=st.integers(1, 60),
    continuation_bytes=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_an_item_is_a_place_in_a_document_and_three_elsewhere(
    sizes: list[int], context_bytes: int, continuation_bytes: int, seed: int
) -> None:
    rows = made_documents(sizes, seed)
    items, left_out = continuation_items(
        Dataset.from_list(rows),
        items_per_domain=30,
        context_bytes=context_bytes,
        continuation_bytes=continuation_bytes,
        seed=seed,
    )
    assert bool(items) is not bool(left_out)
    assert len(items) <= 30
    for item in items:
        text = rows[int(item.cluster.removeprefix("d/"))]["text"]
        true = item.choices[item.answer]
        assert item.context + true in text
        assert len(set(item.choices)) == 4
        lengths = {len(choice.encode()) for choice in item.choices}
        assert len(lengths) == 1  # no choice is longer, in bytes, than another
        assert continuation_bytes / 2 <= lengths.pop() <= continuation_bytes
        # The cut moves on to a space, if one is near.
        assert context_bytes <= len(item.context.encode()) <= context_bytes + 36
        for number, choice in enumerate(item.choices):
            assert number == item.answer or any(choice in row["text"] for row in rows)


def test_other_choices_come_from_other_documents_where_there_are_enough() -> None:
    rows = made_documents([500] * 6)
    items, _ = continuation_items(
        Dataset.from_list(rows), items_per_domain=40, context_bytes=40, continuation_bytes=30
    )
    assert len(items) == 40
    for item in items:
        own = int(item.cluster.removeprefix("d/"))
        for number, choice in enumerate(item.choices):
            if number != item.answer:
                places = [place for place, row in enumerate(rows) if choice in row["text"]]
                assert places != [own]


def test_one_document_is_enough() -> None:
    items, left_out = continuation_items(
        Dataset.from_list(made_documents([3000])), items_per_domain=25, context_bytes=60, continuation_bytes=30
    )
    assert (len(items), left_out) == (25, {})
    assert {item.cluster for item in items} == {"d/0"}


def test_items_are_of_as_many_documents_as_there_are_and_answers_stand_anywhere() -> None:
    rows = made_documents([900] * 30)
    items, _ = continuation_items(
        Dataset.from_list(rows), items_per_domain=60, context_bytes=64, continuation_bytes=32
    )
    clusters = [item.cluster for item in items]
    assert sorted(clusters) == sorted(2 * sorted(set(clusters)))  # 60 items of 30 documents: two of each
    positions = [item.answer for item in items]
    assert all(8 <= positions.count(place) <= 24 for place in range(4))


def test_a_small_domain_is_left_out_and_does_not_change_the_others() -> None:
    large = made_documents([800] * 10)
    small = made_documents([60] * 2, domain="small")
    options = {"context_bytes": 60, "continuation_bytes": 30}
    items, left_out = continuation_items(Dataset.from_list(large + small), **options)
    assert left_out == {
        "small": f"{left_out['small'].partition(' ')[0]} items could be made of its held-out documents; "
        f"it takes {FEWEST_ITEMS}"
    }
    assert int(left_out["small"].partition(" ")[0]) < FEWEST_ITEMS
    assert items == continuation_items(Dataset.from_list(large), **options)[0]


def test_the_seed_alone_draws() -> None:
    documents = Dataset.from_list(made_documents([500] * 8))
    options = {"items_per_domain": 30, "context_bytes": 50, "continuation_bytes": 25}
    items, _ = continuation_items(documents, seed=1, **options)
    assert items == continuation_items(documents, seed=1, **options)[0]
    assert items != continuation_items(documents, seed=2, **options)[0]


def drawn() -> str:
    items, _ = continuation_items(Dataset.from_list(made_documents([500] * 8)), context_bytes=50)
    return repr([(item.cluster, item.answer, item.choices) for item in items])


def test_another_process_draws_the_same() -> None:
    """Nothing hangs on Python's hashes, which differ from process to process."""
    code = "from tests.evaluation.test_tasks_continuation import drawn; print(drawn())"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == drawn()
    assert len(printed) > 1000


@pytest.mark.parametrize("max_length", [20, 70, 1000])
def test_choices_leave_room_for_a_context(max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that reads little is asked for less, in bytes: models with other tokenizers are asked the same."""
    rows = made_documents([900] * 8)
    plan = plan_evaluation(["continuation"], Dataset.from_list(rows), max_length=max_length)
    assert plan.continuation_bytes == min(96, max_length // 2)
    (requests,) = plan_tokens(plan, tokenizer, max_length=max_length)
    assert len(requests) == 100
    for request in requests:
        assert request.length <= max_length
        assert len(request.context) >= max_length // 4 or not request.truncated


@pytest.mark.parametrize("name", ["items_per_domain", "context_bytes", "continuation_bytes"])
def test_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        continuation_items(Dataset.from_list(made_documents([5])), **{name: 0})
