"""The presets, the commands in the heads of their recipes, and the files for Accelerate."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from training_runs import ARCHITECTURE, ROOT, lines
from transformers import AutoConfig

from equipoise.configuration import model_size
from equipoise.modeling.modeling_moe import MoEPreTrainedModel

tabulate = runpy.run_path(str(ROOT / "scripts/tabulate_presets.py"))
PRESETS = {preset.name: preset for preset in tabulate["presets"]()}
README = (ROOT / "hub_configs/README.md").read_text(encoding="utf-8")
LAUNCHES = [launch for preset in PRESETS.values() for launch in tabulate["launches"](preset)]
# Total and active parameters that the papers give, in units of the last digit's place.
PUBLISHED = {
    "global_batch_3.4b_a0.6b": (3.4e9, 0.6e9),
    "global_batch_15b_a2.5b": (15e9, 2.54e9),
    "global_batch_43b_a6.6b": (42.8e9, 6.6e9),
    "loss_free_1b": (1e9, None),  # to the one digit of the name
    "loss_free_3b": (3e9, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones_as_far_as_they_are_given(name: str) -> None:
    size = model_size(AutoConfig.from_pretrained(PRESETS[name]))
    total, active = PUBLISHED[name]
    assert size.total == pytest.approx(total, rel=0.1 if active is None else 0.02)
    assert active is None or size.active == pytest.approx(active, rel=0.05)


def test_the_table_of_sizes_is_up_to_date() -> None:
    assert tabulate["sizes_table"]() in README


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.preset} on {launch.processes}")
def test_every_command_is_in_the_table_and_fits_its_devices(launch: Any) -> None:
    row = re.search(rf"^\| .* \| `{re.escape(launch.command)}` \| ([\d.]+) \|$", README, flags=re.MULTILINE)
    assert row is not None, launch.command
    memory = launch.memory()
    assert memory.fits(launch.gigabytes)
    assert float(row[1]) == pytest.approx(memory.total / 1e9, rel=0.03, abs=0.06)


def test_every_preset_has_commands() -> None:
    assert {launch.preset for launch in LAUNCHES} == set(PRESETS) - {"tiny"}


def plugin_of(file: str, monkeypatch: pytest.MonkeyPatch) -> tuple[FullyShardedDataParallelPlugin, dict[str, str]]:
    """What Accelerate makes of a file, through the environment that its launcher gives each process."""
    arguments = launch_command_parser().parse_args(["--config_file", str(ROOT / "launch_configs" / file), "train.py"])
    defaults = load_config_from_file(arguments.config_file)
    for name, value in {**defaults.fsdp_config, **defaults.parallelism_config}.items():
        setattr(arguments, name, value)
    arguments.use_fsdp, arguments.use_parallelism_config = True, bool(defaults.parallelism_config)
    arguments.mixed_precision, arguments.num_processes = defaults.mixed_precision, defaults.num_processes
    arguments.num_machines, arguments.machine_rank, arguments.main_process_ip = 1, 0, "127.0.0.1"
    arguments.dynamo_backend, arguments.num_cpu_threads_per_process = "no", 1
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return FullyShardedDataParallelPlugin(), environment


@pytest.mark.parametrize("file", ["fsdp2.yaml", "hsdp.yaml"])
def test_accelerate_makes_of_it_what_is_meant(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, _ = plugin_of(file, monkeypatch)
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == MoEPreTrainedModel._no_split_modules
    assert not plugin.activation_checkpointing
    # bf16 given here would round what layers put out, router logits among it.
    assert load_config_from_file(str(ROOT / "launch_configs" / file)).mixed_precision == "no"
    if file == "hsdp.yaml":
        mesh = ParallelismConfig()
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "launch_configs").glob("*.yaml")))
def test_every_file_is_read_by_accelerate(file: str) -> None:
    config = load_config_from_file(str(ROOT / "launch_configs" / file))
    kinds = {"zero": "DEEPSPEED", "fsdp": "FSDP", "hsdp": "FSDP"}
    assert config.distributed_type == kinds.get(file[:4], "MULTI_GPU")
    assert config.num_processes == (16 if config.num_machines == 2 else 8)


def tiny_commands() -> list[str]:
    recipe = (PRESETS["tiny"] / "train.yaml").read_text(encoding="utf-8")
    return re.findall(r"^#   (.*)$", recipe, flags=re.MULTILINE)


@pytest.mark.processes
@pytest.mark.parametrize("command", tiny_commands())
def test_the_tiny_recipe_starts_by_its_commands(command: str, corpus: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 2, "block_size": 64, "micro_batch_size": 2, "global_batch_size": 8, "warmup_steps": 1}
    flags = " ".join(f"--{name} {value}" for name, value in changes.items())
    command = command.replace("runs/tiny", str(tmp_path / "run"))
    overrides = str({**ARCHITECTURE, "balancing_mode": "global_batch"}).replace("True", "true")
    run = subprocess.run(
        f'{command} {flags} --output_dir {tmp_path}/run --data {corpus} --config_overrides "{overrides}"',
        shell=True,
        cwd=ROOT,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2
    assert "2 processes" in run.stdout
