"""Checkpoints: whole or not at all, found again, and never unpickled."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import forget_after, lines, settings, written

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration import parse_run_settings
from equipoise.integrations import whole_state_dict
from equipoise.training import Checkpoint, CheckpointError, Checkpoints, train

Make = Callable[..., MoEConfig]


@pytest.fixture
def trained(tiny_config: Make) -> tuple[MoEForCausalLM, torch.optim.Optimizer]:
    """A model that has made a step."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(2, 64, (2, 16))
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    return model, optimizer


def save(checkpoints: Checkpoints, step: int, trained: Any, **state: Any) -> None:
    model, optimizer = trained
    weights = whole_state_dict(model)
    save_model = partial(model.save_pretrained, state_dict=weights)
    checkpoints.save(step, model, optimizer, {"step": step, **state}, save_model)


def save_and_wait(checkpoints: Checkpoints, step: int, trained: Any) -> None:
    save(checkpoints, step, trained)
    checkpoints.wait()


def snapshot(trained: Any) -> dict[str, torch.Tensor]:
    model, optimizer = trained
    moments = {
        f"{number} {name}": value.clone()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {name: value.clone() for name, value in model.state_dict().items()} | moments


def loaded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    model = MoEForCausalLM.from_pretrained(checkpoint.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoint.load_optimizer(model, optimizer)
    return snapshot((model, optimizer))


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_is_what_was_when_it_was_asked_for(background: bool, trained: Any, tmp_path: Path) -> None:
    # Training goes on while a checkpoint is written: a view of the weights would follow it.
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, background=background)
    expected = snapshot(trained)
    save(checkpoints, 7, trained, loss=0.1 + 0.2)
    for weight in trained[0].parameters():
        weight.data.zero_()
    for state in trained[1].state.values():
        state["exp_avg"].zero_()
    checkpoints.close()
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert checkpoint.step == 7
    assert checkpoint.state() == {"step": 7, "loss": 0.1 + 0.2}
    assert_equal(loaded(checkpoint), expected)


def test_nothing_is_unpickled(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3, background=False)
    save(checkpoints, 1, trained)
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ".py"}  # the code that travels with the weights

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    loaded(checkpoint)


def test_only_the_newest_are_kept(trained: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=True)
    for step in (1, 2, 9, 10, 100):
        save(checkpoints, step, trained)
    checkpoints.close()
    assert [checkpoint.step for checkpoint in checkpoints.found()] == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 8)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda path: truncate(path / "model" / "model.safetensors"),
            r"model/model\.safetensors has \d+ bytes instead",
        ),
        (lambda path: truncate(next((path / "optimizer").iterdir())), r"optimizer/.* has \d+ bytes instead of \d+"),
        (lambda path: flip(path / "model" / "model.safetensors"), "has changed since it was written"),
        (lambda path: (path / "state.json").unlink(), r"state\.json is missing"),
        (lambda path: truncate(path / "checksums.json"), r"checksums\.json cannot be read"),
        (lambda path: shutil.rmtree(path / "optimizer"), "is missing"),
    ],
)
def test_a_defective_one_is_skipped_with_a_word(harm: Any, words: str, trained: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3, background=False)
    save(checkpoints, 1, trained)
    save(checkpoints, 2, trained)
    harm(tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match=f"step-00000002 is skipped: .*{words}"):
        found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    harm(tmp_path / "step-00000001")
    with (
        pytest.warns(UserWarning, match="step-00000001 is skipped"),
        pytest.raises(CheckpointError, match=f"must be whole; got .*{words}"),
    ):
        checkpoints.newest()


def test_a_defective_one_is_replaced_when_its_step_comes_again(trained: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3, background=False)
    save(checkpoints, 2, trained)
    truncate(tmp_path / "step-00000002" / "model" / "model.safetensors")
    again = Checkpoints(tmp_path, keep=3, background=False)
    save(again, 2, trained)
    assert again.newest() is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_clock_set_back_does_not_change_which_is_newest(trained: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False)
    for step, time in ((1, 3e9), (2, 2e9), (3, 1e9)):  # each step written, by the clock, before the one before it
        save(checkpoints, step, trained)
        for path in (tmp_path / f"step-{step:08d}").rglob("*"):
            os.utime(path, (time, time))
        os.utime(tmp_path / f"step-{step:08d}", (time, time))
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 3
    assert [checkpoint.step for checkpoint in checkpoints.found()] == [2, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A real file system of 4 MB, where this process may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs; the limit on file sizes is tested in any case")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(background: bool, trained: Any, small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk, keep=2, background=background)
    save(checkpoints, 1, trained)
    checkpoints.wait()
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 50_000))
    before = loaded(Checkpoint(small_disk / "step-00000001"))
    words = r"step-00000002 could not be written: .*No space left.*; the newest before it is step-00000001"
    with pytest.raises(CheckpointError, match=words):
        save_and_wait(checkpoints, 2, trained)
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "step-00000001"]
    newest = checkpoints.newest()
    assert newest is not None
    assert_equal(loaded(newest), before)


def limited() -> None:
    """Let no file of this process grow beyond 300 kB: writing a checkpoint then fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_training_that_cannot_save_ends_with_a_sentence_and_can_go_on(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run", max_steps=6, checkpoint_steps=2)
    file = written(tmp_path, values)
    train(parse_run_settings([file]))
    forget_after(tmp_path / "run", 2)
    straight = lines(tmp_path / "run" / "metrics.jsonl")
    command = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "train.py"), file, "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step-00000004 could not be written: ")
    assert last.endswith("; the newest before it is step-00000002")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    train(parse_run_settings([file, "--resume"]))  # there is room again
    again = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["lm_loss"] for line in again] == [line["lm_loss"] for line in straight]
