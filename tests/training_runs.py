"""A corpus of two domains, the settings of runs that take a second, and ways to run them."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml
from launched import launched
from safetensors.torch import load_file
from torch import Tensor

from equipoise.configuration import parse_run_settings
from equipoise.training import train

ROOT = Path(__file__).parents[1]
ARCHITECTURE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "moe_intermediate_size": 16,
}


def write_corpus(folder: Path) -> Path:
    """Two domains: Python's own sources and Python's own prose."""
    modules = sorted(module.name for module in pkgutil.iter_modules([str(Path(json.__file__).parents[1])]))
    files = [Path(spec.origin) for name in modules[:120] if (spec := find_spec(name)) and spec.origin]
    code = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".py"][:40]
    for domain, texts in (("code", code), ("prose", list(topics.values()))):
        (folder / domain).mkdir()
        for split, part in (("train", texts[8:]), ("validation", texts[:8])):
            lines = [json.dumps({"text": text}) for text in part]
            (folder / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(corpus: Path, output: Path, **changes: object) -> dict[str, Any]:
    """Settings of a run of 12 steps."""
    return {
        "preset": str(ROOT / "hub_configs" / "tiny"),
        "config_overrides": ARCHITECTURE | {"balancing_mode": "loss_free", "scoring_func": "sigmoid"},
        "data": str(corpus),
        "output_dir": str(output),
        "max_train_bytes_per_domain": 300_000,
        "block_size": 64,
        "micro_batch_size": 2,
        "max_steps": 12,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "micro_batch_domains": "single",
    } | changes


def written(folder: Path, values: dict[str, Any]) -> str:
    """The settings as a file, for the command line."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


def train_in_process(rank: int, world_size: int, flags: list[str]) -> str | None:
    """Train in a process of `run_processes`; returns why it was stopped."""
    with launched(rank, world_size):
        return train(parse_run_settings(flags)).stopped


def launch(processes: int, flags: list[str], **environment: str) -> subprocess.Popen:
    """Start the script under torchrun, or by itself where `processes` is 0."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "train.py"), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(model: Path) -> dict[str, Tensor]:
    """A saved model's."""
    return load_file(model / "model.safetensors")


def forget_after(run: Path, step: int) -> None:
    """Make of a finished run what a kill after `step` would have left: the checkpoint and everything written since."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "model")
    (run / "training.json").unlink()


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
