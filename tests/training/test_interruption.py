"""Stopping: signals, a time limit, a launcher that is gone, a process that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import launch, lines, settings, train_in_process, weights, written

from equipoise.configuration import parse_run_settings
from equipoise.training import RESUME_ME, checkpoints, train
from equipoise.training.interruption import Interruption

ROOT = Path(__file__).parents[2]


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has logged a step."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or (found := lines_so_far(run)) < step:
        assert time.monotonic() < deadline, f"no step {step} within two minutes"
        time.sleep(0.05)
    assert found >= step


def lines_so_far(run: Path) -> int:
    whole = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_says_so(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = settings(corpus, run, max_steps=100_000, logging_steps=1, checkpoint_steps=None)
    launched = launch(0, [written(tmp_path, values)])
    wait_for_step(run, 3)
    launched.send_signal(number)
    output, _ = launched.communicate(timeout=60)
    assert launched.returncode == RESUME_ME == 75, output[-3000:]
    stopped = status(run)
    assert (stopped["state"], stopped["reason"]) == ("stopped", number.name)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{stopped['step']:08d}"
    assert lines(run / "metrics.jsonl")[-1]["step"] == stopped["step"]
    assert not (run / "model").exists()
    # It goes on where it stopped, and ends.
    train(parse_run_settings([str(run / "settings.yaml"), "--resume", f"--max_steps={stopped['step'] + 2}"]))
    assert status(run)["state"] == "finished"
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, stopped["step"] + 3))


def test_the_time_limit_saves_and_stops(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run", max_steps=100_000, max_hours=0.5 / 3600)
    launched = launch(0, [written(tmp_path, values)])
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == RESUME_ME, output[-3000:]
    assert status(tmp_path / "run")["reason"] == "max_hours"
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_launcher_that_is_gone_is_a_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interruption() as interruption:
        assert interruption.reason() is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interruption.reason() == "the launcher is gone"


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def stop_one(rank: int, world_size: int, flags: list[str]) -> str | None:
    """The signal reaches the second process only, once it trains."""

    def tell(*_: object) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1:
        signal.signal(signal.SIGALRM, tell)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 0.5)
    return train_in_process(rank, world_size, flags)


@pytest.mark.processes
def test_one_process_that_is_told_stops_all_after_the_same_step(corpus: Path, tmp_path: Path, run_processes) -> None:
    values = settings(corpus, tmp_path / "run", max_steps=100_000, logging_steps=1, global_batch_size=4)
    reasons = run_processes(2, stop_one, [written(tmp_path, values)])
    assert reasons == ["SIGTERM", "SIGTERM"]
    assert status(tmp_path / "run")["state"] == "stopped"


@pytest.mark.processes
def test_a_process_that_dies_takes_the_others_down_and_the_run_resumes(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run", max_steps=60, logging_steps=1, checkpoint_steps=5, global_batch_size=4)
    flags = [written(tmp_path, values | {"output_dir": str(tmp_path / "straight")})]
    output, _ = (straight := launch(2, flags)).communicate(timeout=300)
    assert straight.returncode == 0, output[-3000:]

    flags = [written(tmp_path, values | {"output_dir": str(tmp_path / "run"), "max_steps": 60}), "--resume"]
    launched = launch(2, flags)
    wait_for_step(tmp_path / "run", 7)
    workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    died = time.monotonic()
    output, _ = launched.communicate(timeout=60)
    assert time.monotonic() - died < 60
    assert launched.returncode == 1
    assert "Signal 9 (SIGKILL) received" in output  # who died, in the launcher's report
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists()

    output, _ = (resumed := launch(2, flags)).communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    for name, weight in weights(tmp_path / "straight" / "model").items():
        assert torch.equal(weights(tmp_path / "run" / "model")[name], weight), name


@pytest.mark.processes
def test_the_launch_script_restarts_what_died_and_gives_a_status(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = settings(corpus, run, max_steps=40, logging_steps=1, checkpoint_steps=5, global_batch_size=4)
    del values["output_dir"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "scripts" / "launch.sh"), str(run), written(tmp_path, values)]
    launched = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_step(run, 6)
    (torchrun,) = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    worker = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    output, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, output[-12000:]
    assert status(run)["state"] == "finished"
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, 41))

    # The same command, to a longer end, and told to stop by a scheduler.
    launched = subprocess.Popen(
        [*command, "--max_steps", "100000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(run, 45)
    # As Slurm does: to every process of the job step, torchrun included.
    (torchrun,) = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    workers = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    for process in (launched.pid, int(torchrun), *map(int, workers)):
        os.kill(process, signal.SIGUSR1)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == RESUME_ME, output[-3000:]
    assert status(run)["state"] == "stopped"

    # What a run said before is not taken for what this launch says.
    refused = subprocess.run(
        [*command, "--block_size=32"], env=environment, capture_output=True, text=True, check=False
    )
    assert "error: block_size must stay as it was" in refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert status(run)["state"] == "stopped"


def test_a_signal_while_the_last_checkpoint_is_written_changes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers send signals twice, and a scheduler may be impatient."""
    hashed = checkpoints._sha256

    def slow(file: Path) -> str:
        if file.suffix == ".safetensors":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return hashed(file)

    monkeypatch.setattr(checkpoints, "_sha256", slow)
    values = settings(corpus, tmp_path / "run", max_steps=4, checkpoint_steps=None)
    run = train(parse_run_settings([written(tmp_path, values)]))
    assert run.stopped is None
    assert status(run.path)["state"] == "finished"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000004"]
