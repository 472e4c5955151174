"""What of several runs can be compared, and what is said where it cannot."""

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from planted import DOMAINS, by_domain, planted_model

from equipoise.analysis import RunInput, RunRecord, comparable
from equipoise.data import read_held_out, train_tokenizer


@pytest.fixture
def inputs(planted_runs: dict[str, Path]) -> list[RunInput]:
    return [
        RunInput(name, run / "model", read_held_out(run / "validation.parquet"), 64, RunRecord.read(run))
        for name, run in planted_runs.items()
    ]


def of_domains(run: RunInput, *domains: str) -> RunInput:
    rows = [row for row in run.documents if row["domain"] in domains]
    return replace(run, documents=Dataset.from_list(rows))


def test_alike_runs_are_compared_as_they_are(inputs: list[RunInput]) -> None:
    runs, notes = comparable(inputs)
    assert runs == inputs
    assert notes == ["All runs are measured on the same 40 held-out documents."]


def test_a_run_by_itself_needs_no_word(inputs: list[RunInput]) -> None:
    assert comparable(inputs[:1]) == (inputs[:1], [])


def test_only_common_domains_are_measured(inputs: list[RunInput]) -> None:
    one, other = of_domains(inputs[0], *DOMAINS[:3]), of_domains(inputs[1], *DOMAINS[1:])
    runs, notes = comparable([one, other])
    assert all(set(run.documents["domain"][:]) == {"beech", "cedar"} for run in runs)
    assert notes == [
        "The runs have different domains. Measured are the 2 that all of them have (beech, cedar); left out are ash, "
        "damson.",
        "All runs are measured on the same 20 held-out documents.",
    ]


def test_without_common_domains_each_is_measured_on_its_own(inputs: list[RunInput]) -> None:
    runs, notes = comparable([of_domains(inputs[0], "ash", "beech"), of_domains(inputs[1], "beech", "cedar")])
    assert [set(run.documents["domain"][:]) for run in runs] == [{"ash", "beech"}, {"beech", "cedar"}]
    assert notes[0].startswith("The runs have fewer than two domains in common, so each is measured on its own.")
    assert notes[1].startswith("The held-out text differs between runs")


def test_other_differences_are_said(inputs: list[RunInput], tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["abcabcabc"] * 9, vocab_size=259)
    planted_model(tokenizer, [by_domain]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    record = replace(inputs[1].record, training={"tokens": 5}, data={"ash": {"key": "other"}})
    _, notes = comparable([inputs[0], replace(inputs[1], model=tmp_path / "model", block_size=32, record=record)])
    for words in (
        "The tokenizers differ: loss per token and vocabulary specialisation are not comparable",
        "The number of MoE layers differs (specialised 2, uniform 1)",
        "The windows differ in length (specialised 64, uniform 32 tokens)",
        "The runs saw different amounts of text (specialised 40,960, uniform 5 tokens)",
        "The runs were trained on different text.",
    ):
        assert any(note.startswith(words) for note in notes), words


def test_refuses(inputs: list[RunInput]) -> None:
    with pytest.raises(ValueError, match="run must name between 1 and 8 runs; got 9"):
        comparable([replace(inputs[0], name=str(number)) for number in range(9)])
    with pytest.raises(ValueError, match="run must name folders of different names; got uniform, uniform"):
        comparable([inputs[1], inputs[1]])
