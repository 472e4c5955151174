"""The memory estimate, against what training really allocates."""

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from launched import launched
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from training_runs import ROOT, settings, written
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration import TrainingSettings, model_size, parse_run_settings
from equipoise.integrations import shard, shard_experts, sharding_mesh
from equipoise.modeling import modeling_moe
from equipoise.training import memory, prepare, train
from equipoise.training.memory import StepMemory, step_memory
from equipoise.training.prepare import read_config

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 96,
}
needs_exchange = pytest.mark.skipif(
    "ep_dispatch_experts" not in ALL_PARALLEL_STYLES, reason="this Transformers does not send tokens to experts"
)


def most_allocated(profiled: profile, between: str | None = None) -> int:
    """The most bytes allocated at once, by the allocator's own account: at any time, or between the first and the last
    operation of a name. Without what process groups allocate for themselves."""
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    for event in events:
        events.extend(event.children)
    times = [event.start_time_ns for event in events if between is not None and event.name.startswith(between)]
    alive: dict[int, int] = {}
    total, most = 0, 0
    allocations = (event for event in events if event.tag == _EventType.Allocation)
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        total -= alive.pop(pointer, 0)
        if size > 0 and not _communicates(event):
            alive[pointer] = size
            total += size
        if not times or min(times) < event.start_time_ns < max(times):
            most = max(most, total)
    return most


def _communicates(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(("c10d::", "gloo:")):
            return True
        event = event.parent
    return False


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["keeps layers", "computes layers again"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_step_of_one_process(mixed_precision: str, gradient_checkpointing: bool) -> None:
    config = MoEConfig(**ARCHITECTURE, experts_implementation="grouped_mm")  # as on a GPU
    model = MoEForCausalLM(config).train()
    if mixed_precision == "bf16":
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(config.vocab_size, (4, 128))
    positions = torch.cat([torch.arange(50), torch.arange(78)]).expand(4, -1)  # two documents in each block

    def micro_batch() -> None:
        inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
        model(**inputs, use_cache=False, skip_logits=True, output_token_losses=True).loss.backward()

    micro_batch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        micro_batch()
    kept = 4 * sum(weight.nbytes for weight in model.parameters())  # weights, gradients and two moments
    training = TrainingSettings(
        micro_batch_size=4, mixed_precision=mixed_precision, gradient_checkpointing=gradient_checkpointing
    )
    estimate = step_memory(config, 128, training, processes=1)
    assert estimate.weights + estimate.gradients + estimate.optimizer == kept
    assert estimate.total - kept == pytest.approx(most_allocated(profiled), rel=0.03)


def train_and_measure(rank: int, world_size: int, flags: list[str]) -> int:
    with (
        patch.object(prepare, "BLOCK_CAUSAL", "sdpa"),  # attention as the estimate has it, that of other devices
        patch.object(modeling_moe, "EXPERTS_IMPLEMENTATION", "grouped_mm"),  # likewise
        launched(rank, world_size),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        train(parse_run_settings(flags))
    return most_allocated(profiled, between="Optimizer.step")


@pytest.mark.processes
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"sharding": "fsdp", "mixed_precision": "bf16"},
        pytest.param({"expert_parallel_size": 2, "mixed_precision": "bf16"}, marks=needs_exchange),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_training_in_two_processes(run_processes: Any, corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The whole loop, accumulating: under FSDP no process may hold whole gradients meanwhile."""
    values = settings(corpus, tmp_path / "run", config_overrides=ARCHITECTURE, max_steps=2, warmup_steps=1)
    values |= {"block_size": 128, "micro_batch_size": 4, "global_batch_size": 16, "max_train_bytes_per_domain": 40_000}
    flags = [written(tmp_path, values | changes)]
    model, data, training = parse_run_settings(flags)
    estimate = step_memory(read_config(model), data.block_size, training, processes=2)
    measured = max(run_processes(2, train_and_measure, flags))
    # A new router sends some device more tokens than it sends out itself.
    assert measured == pytest.approx(estimate.total, rel=0.05 if training.expert_parallel_size == 1 else 0.15)


def local_bytes(rank: int, world_size: int, layout: str) -> list[int]:
    """Weights, gradients and moments that this process holds after a step."""
    model = MoEForCausalLM(MoEConfig(**ARCHITECTURE)).train()
    if layout == "experts":
        model = shard_experts(model, world_size)
    else:
        model = shard(model, sharding_mesh("cpu", None if layout == "fsdp" else world_size), bf16=True)
    model.gradient_checkpointing_enable()  # a layer must be computed in the same types again
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(1, 16, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [weight.grad for weight in model.parameters()]
    return [
        sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
        for tensors in (list(model.parameters()), gradients, moments)
    ]


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", pytest.param("experts", marks=needs_exchange)])
def test_shards_are_what_two_processes_hold(run_processes: Any, layout: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "fsdp": {"sharding": "fsdp"},
        "hsdp": {"sharding": "hsdp", "shard_size": 2},
        "experts": {"expert_parallel_size": 2},
    }
    training = TrainingSettings(micro_batch_size=1, **changes[layout])
    estimate = step_memory(MoEConfig(**ARCHITECTURE), 16, training, processes=2)
    held = run_processes(2, local_bytes, layout)
    assert held[0] == [estimate.weights, estimate.gradients, estimate.optimizer]


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({"mixed_precision": "bf16"}, 2),
        ({"sharding": "fsdp", "mixed_precision": "bf16", "gradient_checkpointing": True}, 8),
        ({"sharding": "hsdp", "shard_size": 2, "mixed_precision": "bf16", "gradient_checkpointing": True}, 4),
        pytest.param({"expert_parallel_size": 4, "mixed_precision": "bf16"}, 8, marks=needs_exchange),
    ],
    ids=str,
)
def test_all_layers_after_the_fourth_are_alike(
    changes: dict[str, Any], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MoEConfig(**ARCHITECTURE | {"num_hidden_layers": 8})
    training = TrainingSettings(micro_batch_size=2, **changes)
    extrapolated = step_memory(config, 64, training, processes)
    monkeypatch.setattr(memory, "_MORE", 100)
    assert extrapolated == step_memory(config, 64, training, processes)


def test_what_deepspeed_keeps() -> None:
    """Bytes for each parameter, of weights, gradients and optimizer; activations are those of bf16 weights."""
    config = MoEConfig(**ARCHITECTURE)
    parameters = model_size(config).total
    training = TrainingSettings(micro_batch_size=2, mixed_precision="bf16")
    sharded = step_memory(config, 64, TrainingSettings(micro_batch_size=2, mixed_precision="bf16", sharding="fsdp"), 8)
    stages: dict[memory.ZeroStage, tuple[float, ...]] = {
        1: (2, 2 + 4, 12 / 8),
        2: (2, 2 * 4 / 8, 12 / 8),
        3: (2 / 8, 4 / 8, 12 / 8),
    }
    for stage, per_parameter in stages.items():
        estimate = step_memory(config, 64, training, 8, zero_stage=stage)
        kept = (estimate.weights, estimate.gradients, estimate.optimizer)
        assert kept == pytest.approx([share * parameters for share in per_parameter], rel=1e-4)
        assert estimate.activations == pytest.approx(sharded.activations, rel=0.15)  # whose layers put out fp32


def test_parts_add_up() -> None:
    assert StepMemory(1, 2, 4, 8, 16, 32, 64).total == 127


def test_an_estimate_within_a_process_group_is_refused(tmp_path: Path) -> None:
    training = TrainingSettings(sharding="fsdp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="must be made outside of a process group"):
            step_memory(MoEConfig(**ARCHITECTURE), 16, training, 8)
    finally:
        dist.destroy_process_group()
    assert step_memory(MoEConfig(**ARCHITECTURE), 16, training, 8).total > 0
    assert not dist.is_initialized()


def test_sizes_must_fit_the_processes() -> None:
    with pytest.raises(ValueError, match=r"expert_parallel_size must divide the number of processes \(8\); got 3"):
        step_memory(MoEConfig(**ARCHITECTURE), 16, TrainingSettings(expert_parallel_size=3), 8)
    with pytest.raises(ValueError, match=r"shard_size must divide the number of processes \(8\); got 3"):
        step_memory(MoEConfig(**ARCHITECTURE), 16, TrainingSettings(sharding="hsdp", shard_size=3), 8)


def test_the_script_prints_every_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "estimate_memory.py"))
    small = settings(tmp_path, tmp_path / "run", config_overrides=ARCHITECTURE | {"num_hidden_layers": 2})
    flags = [written(tmp_path, small | {"mixed_precision": "bf16", "sharding": "fsdp"})]
    monkeypatch.setattr(sys, "argv", ["estimate_memory.py", "--processes", "2", *flags, "--gradient_checkpointing"])
    script["main"]()
    model, data, training = parse_run_settings([*flags, "--gradient_checkpointing"])
    as_set = step_memory(read_config(model), data.block_size, training, 2)
    printed = capsys.readouterr().out.splitlines()
    rows = {line[:38].strip(): line[38:].split() for line in printed[2 : printed.index("", 3)]}
    assert rows["as set"] == rows["FSDP2, layers computed again"]
    parts = [*vars(as_set).values(), as_set.total]
    assert rows["as set"] == [*(f"{part / 1e9:.2f}" for part in parts), "80", "GB"]
    assert {"DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"} <= set(rows)

    monkeypatch.setattr(sys, "argv", ["estimate_memory.py", "--processes", "3", *flags, "--global_batch_size", "4"])
    with pytest.raises(SystemExit, match="error: global_batch_size must give each process as many micro-batches"):
        script["main"]()
