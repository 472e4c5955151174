"""Kills a training of two processes with -9 at random moments, resumes it each time, and compares what comes out.

    python benchmarks/kills.py --data CORPUS --output runs/kills --kills 20

A run that nobody disturbs comes first. The other is killed: all of it at once, one of its processes, or its launcher
alone (its processes then notice, save and end); once in four while it prepares, else some moments after it has logged
a new step, so also while it writes a checkpoint. It is resumed until it ends. Fails unless the weights and the logged
losses are those of the first run to the bit, every checkpoint is whole after each kill, and nothing half-written is
left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from equipoise.data import write_json
from equipoise.training import Checkpoints

ROOT = Path(__file__).parents[1]
TARGETS = ("all", "process", "all", "process", "launcher")


@dataclass
class KillArguments:
    """What is trained, and how often it is killed."""

    data: str = field(metadata={"help": "Corpus to train on."})
    output: str = field(default="runs/kills", metadata={"help": "New folder for the two runs and the report."})
    kills: int = field(default=20, metadata={"help": "How many times."})
    max_steps: int = field(default=600, metadata={"help": "Steps of the run."})
    longest_wait: float = field(default=6.0, metadata={"help": "Most seconds from the first new step to a kill."})
    settings: str = field(default="hub_configs/tiny/train.yaml", metadata={"help": "Settings of the run."})
    extra: list[str] = field(default_factory=list, metadata={"help": "More flags for train.py, without the dashes."})
    seed: int = field(default=0, metadata={"help": "Of the moments and of whom is killed."})


def launch(arguments: KillArguments, run: Path, log: Path) -> subprocess.Popen:
    """Starts, or resumes, a run in two processes, in a session of its own."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(ROOT / "scripts" / "train.py"), arguments.settings),
        *("--data", arguments.data, "--output_dir", str(run), "--max_steps", str(arguments.max_steps), "--resume"),
        *(f"--{flag}" for flag in arguments.extra),
    ]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as scripts/launch.sh does
    }
    with log.open("a") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_a_moment(launched: subprocess.Popen, run: Path, longest_wait: float, chance: random.Random) -> str:
    """Until the moment of a kill; returns what the run was at."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(1, 10))
        return "preparing"
    before = last_step(run)
    while last_step(run) <= before and launched.poll() is None:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, longest_wait))
    return "training"


def last_step(run: Path) -> int:
    """The last step that a run has logged."""
    file = run / "metrics.jsonl"
    whole = [line for line in file.read_text().splitlines(True) if line.endswith("\n")] if file.is_file() else []
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for_the_end(workers: list[int]) -> None:
    """Until processes whose launcher is gone have ended by themselves."""
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        time.sleep(0.1)


def kill(launched: subprocess.Popen, target: str, chance: random.Random) -> str:
    """Kills with -9 whom it says; returns what was done. What is left over must end by itself."""
    workers = children(launched.pid)
    if target == "all" or not workers:
        os.killpg(launched.pid, signal.SIGKILL)
        for worker in workers:  # torchrun gives each a session of its own
            os.kill(worker, signal.SIGKILL)
        return "all"
    os.kill(launched.pid if target == "launcher" else chance.choice(workers), signal.SIGKILL)
    return target


def main() -> None:
    (arguments,) = HfArgumentParser(KillArguments).parse_args_into_dataclasses()
    chance, output = random.Random(arguments.seed), Path(arguments.output)
    if output.exists():
        sys.exit(f"error: output must be a new folder; got {output}")
    output.mkdir(parents=True)
    undisturbed, killed = output / "undisturbed", output / "killed"
    if launch(arguments, undisturbed, output / "undisturbed.log").wait():
        sys.exit(f"error: the undisturbed run failed; see {output / 'undisturbed.log'}")

    record: list[dict[str, Any]] = []
    for number in tqdm(range(arguments.kills), unit="kill"):
        launched = launch(arguments, killed, output / "killed.log")
        moment = wait_for_a_moment(launched, killed, arguments.longest_wait, chance)
        if launched.poll() is not None:
            sys.exit(f"error: the run ended, with {launched.returncode}, before kill {number + 1}: raise --max_steps")
        workers, step = children(launched.pid), last_step(killed)
        whom = kill(launched, TARGETS[number % len(TARGETS)], chance)
        being_written = [path.name for path in (killed / "checkpoints").glob(".step-*.saving")]
        struck = time.monotonic()
        launched.wait()
        ended = time.monotonic() - struck
        wait_for_the_end(workers)
        checkpoints = Checkpoints(killed / "checkpoints", keep=1, background=False)
        found = checkpoints.found()
        defects = [f"{one.path.name}: {defect}" for one in found if (defect := one.defect())]
        record.append(
            {
                "killed": whom,
                "while": moment,
                "last_logged_step": step,
                "newest_checkpoint": found[-1].step if found else None,
                "being_written": being_written,
                "launcher_ended_after_seconds": round(ended, 1),
                "unreadable": defects,
            }
        )
        tqdm.write(json.dumps(record[-1]))
    if launch(arguments, killed, output / "killed.log").wait():
        sys.exit(f"error: the run could not be ended; see {output / 'killed.log'}")

    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (undisturbed, killed)]
    losses = [
        [(line["step"], line["lm_loss"], line["domain_loss"]) for line in read_lines(run / "metrics.jsonl")]
        for run in (undisturbed, killed)
    ]
    hidden = [str(path) for run in (killed, killed / "checkpoints") for path in run.glob(".*") if path.name != ".lock"]
    report = {
        "kills": record,
        "weights_equal_to_the_bit": weights[0] == weights[1],
        "losses_equal_to_the_bit": losses[0] == losses[1],
        "unreadable_checkpoints": sum(len(kill["unreadable"]) for kill in record),
        "left_half_written": hidden,
    }
    write_json(output / "report.json", report)
    print(json.dumps({name: value for name, value in report.items() if name != "kills"}, indent=2))
    if not (weights[0] == weights[1] and losses[0] == losses[1]) or hidden or report["unreadable_checkpoints"]:
        sys.exit("error: the killed run is not the undisturbed one")


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
