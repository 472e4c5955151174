"""Models that a command names, and what is read of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.evaluation import find_models, find_outputs, load_model, load_reader, set_num_threads


def described(model: str) -> dict[str, Any]:
    loaded = load_model(*find_models([model]))
    return {
        "starts": sorted({tensor.data_ptr() % 64 for tensor in (*loaded.parameters(), *loaded.buffers())}),
        "weights": dict(loaded.state_dict()),
        "tied": loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight,
    }


def on_one_of_three(rank: int, world_size: int, model: str) -> dict[str, Any]:
    with launched(rank, world_size):
        return described(model)


@pytest.mark.processes
@pytest.mark.parametrize("tied", [False, True])
def test_weights_lie_alike_in_every_process(
    run_processes: Callable[..., list[Any]], tiny_config: Callable[..., MoEConfig], tmp_path: Path, tied: bool
) -> None:
    """Mapped from the file by one process and copied by several, they began at other places of a cache line, and a
    model of 4 M parameters had other digits in 6 of 104 windows."""
    model = MoEForCausalLM(tiny_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    for found in (described(folder), *run_processes(3, on_one_of_three, folder)):
        assert found["starts"] == [0]
        assert found["tied"] is tied
        assert set(found["weights"]) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(found["weights"][name], tensor), name


def test_the_number_of_threads_is_set_and_told() -> None:
    before = torch.get_num_threads()
    try:
        assert set_num_threads(3) == 3 == torch.get_num_threads()
        assert set_num_threads(None) == 3
    finally:
        torch.set_num_threads(before)


def test_models_of_one_name_are_told_apart(saved_run: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shutil.copytree(saved_run, tmp_path / folder / "run")
    runs = [str(tmp_path / folder / "run") for folder in ("a", "b")]
    found = find_models([runs[0], runs[1], runs[0], "user/name"])
    assert [candidate.name for candidate in found] == [f"{runs[0]}/model", f"{runs[1]}/model", "user/name"]
    assert [candidate.run for candidate in found] == [Path(runs[0]), Path(runs[1]), None]
    outputs, comparison = find_outputs(found, None)
    assert outputs == {f"{run}/model": Path(run) / "evaluation.json" for run in runs}
    assert comparison == Path(runs[0]) / "comparison.json"
    assert find_outputs(found, "other.json")[1] == Path("other.json")
    assert find_outputs(found[:1], "other.json") == ({f"{runs[0]}/model": Path("other.json")}, None)


def test_a_model_reads_as_much_as_in_its_training(saved_run: Path, tmp_path: Path) -> None:
    """Of a run its block size; of no run 512 tokens of documents, and of tasks what its positions allow (128 here)."""
    run = tmp_path / "run"
    shutil.copytree(saved_run, run)
    (run / "settings.yaml").write_text(json.dumps({"block_size": 48}))
    (of_run,) = find_models([str(run)])
    reader = load_reader(of_run, None)
    assert (reader.block_size, reader.max_length) == (48, 48)
    shutil.copytree(run / "model", tmp_path / "alone" / "model")
    (alone,) = find_models([str(tmp_path / "alone" / "model")])
    assert alone.run is None
    reader = load_reader(alone, None)
    assert (reader.block_size, reader.max_length) == (512, 128)
    reader = load_reader(alone, 24)
    assert (reader.block_size, reader.max_length) == (24, 24)
