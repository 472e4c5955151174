"""The presets, the commands in the heads of their recipes, and the files for Accelerate."""

import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from training_runs import ARCHITECTURE, ROOT, lines
from transformers import AutoConfig

from equipoise.configuration import model_size, parse_run_settings
from equipoise.modeling import MoEPreTrainedModel
from equipoise.training.memory import AllToAllEP

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


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_is_what_is_saved(name: str, tmp_path: Path) -> None:
    """Guards against fields that are misspelt or left out: Transformers keeps and fills them without a word."""
    AutoConfig.from_pretrained(PRESETS[name]).save_pretrained(tmp_path)
    saved, kept = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, PRESETS[name]))
    assert saved | {"transformers_version": ""} == kept | {"transformers_version": ""}


def test_the_table_of_sizes_is_up_to_date() -> None:
    assert tabulate["sizes_table"]() in README


def test_the_table_of_layouts_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all presets their recipes' batch, of the smallest what it takes in one layout."""
    rows = dict(re.findall(r"^\| `(\w[\w.]*)` \| (\d+ x \d+ \|.*)$", README, flags=re.MULTILINE))
    assert set(rows) == set(PRESETS)
    for name, preset in PRESETS.items():
        _, data, training = parse_run_settings([str(preset / "train.yaml")])
        assert rows[name].startswith(f"{training.micro_batch_size} x {data.block_size} |"), name
    some = {"FSDP2, 8": tabulate["LAYOUTS"]["FSDP2, 8"]}
    column = 1 + list(tabulate["LAYOUTS"]).index("FSDP2, 8")
    table = tabulate["layouts_table"]
    monkeypatch.setitem(table.__globals__, "LAYOUTS", some)
    monkeypatch.setitem(table.__globals__, "presets", lambda: [PRESETS["tiny"]])
    for row in table().splitlines()[2:]:
        name, _, cell = (cell.strip(" `") for cell in row.strip("|").split("|"))
        figures, now = (re.findall(r"[\d.]+", text) for text in (rows[name].split("|")[column], cell))
        assert [float(f) for f in now] == pytest.approx([float(f) for f in figures], rel=0.03, abs=0.06)


def in_table(launch: Any) -> float:
    row = re.search(rf"^\| (.*) \| `{re.escape(launch.command)}` \| ([\d.]+) \|$", README, flags=re.MULTILINE)
    assert row is not None, launch.command
    assert row[1] == f"{launch.processes} x {launch.gigabytes} GB"
    return float(row[2])


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.preset} on {launch.processes}")
def test_a_command_starts_what_its_recipe_says(launch: Any) -> None:
    assert in_table(launch) <= 0.9 * launch.gigabytes
    words = shlex.split(launch.command)
    for word in words:
        if word.startswith(("scripts/", "launch_configs/", "hub_configs/")):
            assert (ROOT / word).is_file(), word
    assert (PRESETS[launch.preset] / "train.yaml").samefile(ROOT / next(w for w in words if w.endswith("train.yaml")))
    (model, data, training), _ = launch.settings()
    assert (ROOT / model.preset).samefile(PRESETS[launch.preset])
    assert (ROOT / data.data).is_file() or launch.preset == "tiny"
    training.micro_batches_per_step(launch.processes)  # raises if the batch cannot be dealt out

    # The number of processes that the command itself asks for.
    machines = int(words[words.index("--nodes") + 1]) if "--nodes" in words else 1
    started = 8 * machines
    if "--config_file" in words:
        started = load_config_from_file(str(ROOT / words[words.index("--config_file") + 1])).num_processes
    if words[0].startswith("PROCESSES="):
        started = int(words[0].removeprefix("PROCESSES="))
    assert started == launch.processes


def of_each_kind() -> list[Any]:
    """The last command of each layout: all of them would take minutes."""
    kinds: dict[Any, Any] = {}
    for launch in LAUNCHES:
        (_, _, training), stage = launch.settings()
        kinds[training.sharding, training.expert_parallel_size > 1, stage > 0] = launch
    return list(kinds.values())


@pytest.mark.parametrize("launch", of_each_kind(), ids=lambda launch: f"{launch.preset} on {launch.processes}")
def test_the_table_of_commands_is_up_to_date(launch: Any) -> None:
    if launch.settings()[0][2].expert_parallel_size > 1 and AllToAllEP is None:
        pytest.skip("this Transformers does not send tokens to experts")
    assert in_table(launch) == pytest.approx(launch.memory().total / 1e9, rel=0.03, abs=0.06)


def test_every_preset_has_commands() -> None:
    assert {launch.preset for launch in LAUNCHES} == set(PRESETS) - {"tiny"}


def test_tables_are_written_into_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    main = tabulate["main"]
    monkeypatch.setitem(main.__globals__, "PRESETS", tmp_path)
    tables = {name: re.search(tabulate["marked"](name), README)[2].rstrip("\n") for name in tabulate["TABLES"]}
    monkeypatch.setitem(main.__globals__, "TABLES", {name: lambda: "| other |" for name in tables})
    main()
    other = readme.read_text(encoding="utf-8")
    assert other.count("| other |\n<!-- end -->") == len(tables)
    monkeypatch.setitem(main.__globals__, "TABLES", {name: lambda kept=kept: kept for name, kept in tables.items()})
    main()
    assert readme.read_text(encoding="utf-8") == README


def launched_with(file: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` gives each process; it is this process' afterwards."""
    flags = ["--config_file", str(ROOT / "launch_configs" / file), "--machine_rank=0", "--main_process_ip=127.0.0.1"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*flags, "train.py"]))
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.mark.parametrize("file", ["fsdp2.yaml", "hsdp.yaml"])
def test_accelerate_makes_of_it_what_is_meant(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = launched_with(file, monkeypatch)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == MoEPreTrainedModel._no_split_modules
    assert not plugin.activation_checkpointing
    assert (environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true") == (file == "hsdp.yaml")
    if file == "hsdp.yaml":
        mesh = ParallelismConfig()
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)
    # Computed as it is stored: asked for bf16, Accelerate would round what layers put out, router logits among it.
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "launch_configs").glob("*.yaml")))
def test_every_file_is_read_by_accelerate(file: str) -> None:
    config = load_config_from_file(str(ROOT / "launch_configs" / file))
    kinds = {"zero": "DEEPSPEED", "fsdp": "FSDP", "hsdp": "FSDP"}
    assert config.distributed_type == kinds.get(file[:4], "MULTI_GPU")
    assert config.num_processes == (16 if config.num_machines == 2 else 8)


def tiny_commands() -> list[str]:
    recipe = (PRESETS["tiny"] / "train.yaml").read_text(encoding="utf-8")
    return re.findall(r"^#   (.*)$", recipe, flags=re.MULTILINE)


def started(command: str, corpus: Path, run: Path, **environment: str) -> subprocess.Popen[str]:
    """A command of the tiny recipe as it stands there, but for a smaller model and two steps."""
    changes = {"max_steps": 2, "block_size": 64, "micro_batch_size": 2, "global_batch_size": 8, "warmup_steps": 1}
    flags = " ".join(f"--{name} {value}" for name, value in changes.items())
    overrides = json.dumps(ARCHITECTURE | {"balancing_mode": "global_batch"})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        f"{command.replace('runs/tiny', str(run))} {flags} --output_dir {run} --data {corpus} "
        f"--config_overrides {shlex.quote(overrides)}",
        shell=True,
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.processes
@pytest.mark.parametrize("command", tiny_commands())
def test_the_tiny_recipe_starts_by_its_commands(command: str, corpus: Path, tmp_path: Path) -> None:
    process = started(command, corpus, tmp_path / "run")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2
    assert "2 processes" in output


@pytest.mark.processes
def test_two_machines_meet_by_their_file(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        "accelerate launch --config_file launch_configs/multi_node.yaml --num_processes 2 --main_process_ip 127.0.0.1 "
        f"--main_process_port {port} --machine_rank %d scripts/train.py hub_configs/tiny/train.yaml"
    )
    machines = [started(command % rank, corpus, tmp_path / "run", ACCELERATE_USE_CPU="true") for rank in range(2)]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "2 processes" in "".join(outputs)
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2
