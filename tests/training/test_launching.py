"""Several machines, and a scheduler: the launch scripts as they are called."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, settings, weights, written


def environment(**changes: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": path} | changes


@pytest.mark.processes
def test_two_machines_train_as_one(corpus: Path, tmp_path: Path) -> None:
    """Each machine runs the script; they meet at the first one's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = settings(corpus, tmp_path / "run", global_batch_size=4)
    del values["output_dir"]
    file = written(tmp_path, values)

    def machines(count: int, run: Path, processes: int) -> None:
        changes = {"PROCESSES": str(processes), "MAX_RESTARTS": "0"}
        if count > 1:
            changes |= {"NNODES": str(count), "RENDEZVOUS": f"127.0.0.1:{port}"}
        command = ["bash", str(ROOT / "scripts" / "launch.sh"), str(run), file]
        launched = [
            subprocess.Popen(
                command, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for _ in range(count)
        ]
        for machine in launched:
            output, _ = machine.communicate(timeout=300)
            assert machine.returncode == 0, output[-3000:]

    machines(2, tmp_path / "two machines", processes=1)
    machines(1, tmp_path / "one machine", processes=2)
    for name, weight in weights(tmp_path / "one machine" / "model").items():
        assert torch.equal(weights(tmp_path / "two machines" / "model")[name], weight), name


@pytest.mark.parametrize(("ends_with", "status", "requeued"), [(0, 0, False), (75, 0, True), (1, 1, False)])
def test_a_job_that_was_stopped_goes_back_into_the_queue(
    ends_with: int, status: int, requeued: bool, tmp_path: Path
) -> None:
    """Slurm's commands are stand-ins that note how they were called."""
    told = "nodes=$NNODES meet=$RENDEZVOUS id=$RENDEZVOUS_ID"
    clients = {
        "srun": f'echo "srun $@ {told}" >> {tmp_path}/calls; exit {ends_with}',
        "scontrol": f'echo "scontrol $@" >> {tmp_path}/calls; [ "$1" != show ] || printf "first\\nsecond\\n"',
    }
    for name, body in clients.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    changes = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "runs/mine", "settings.yaml"]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    started = "bash scripts/launch.sh runs/mine settings.yaml nodes=2 meet=first:29400 id=77"
    assert calls[1].startswith("srun ")
    assert calls[1].endswith(started)
    assert calls[2:] == (["scontrol requeue 77"] if requeued else [])


def test_the_launch_script_says_how_it_is_called(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "launch.sh"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage: launch.sh RUN" in done.stderr
