"""DeepSpeed ZeRO in two processes, launched by `accelerate launch` with the files of `launch_configs/`, against one
process without it. (On a machine without accelerators DeepSpeed runs over gloo.)"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch import Tensor

from equipoise import MoEConfig, MoEForCausalLM

ROOT = Path(__file__).parents[2]
STAGES = (1, 2, 3)
SEQUENCES, LENGTH, STEPS, MICRO_STEPS, MAX_NORM = 4, 16, 3, 2, 0.5
MODES: dict[str, dict[str, Any]] = {
    "global_batch": {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.5},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": 0.05},
}


@pytest.mark.parametrize("stage", STAGES)
def test_launch_configurations_are_read_as_meant(stage: int) -> None:
    read = load_config_from_file(str(ROOT / f"launch_configs/zero{stage}.yaml"))
    assert read.distributed_type == "DEEPSPEED"
    assert read.mixed_precision == "bf16"
    assert not read.use_cpu
    assert read.deepspeed_config["zero_stage"] == stage
    assert read.deepspeed_config["gradient_accumulation_steps"] == "auto"


def micro_batch(seed: int, rank: int, world_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (SEQUENCES, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([16, 3, 9, 12])[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.chunk(world_size)[rank] for name, value in batch.items()}


def build(config: MoEConfig) -> tuple[MoEForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = MoEForCausalLM(config).train()
    # A large epsilon: where a gradient is near zero, Adam's division would blow up its rounding.
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)


def labels_of(seeds: list[int]) -> Tensor:
    return torch.stack([micro_batch(seed, 0, 1)["labels"][:, 1:].ne(-100).sum() for seed in seeds]).sum()


def seeds_of(step: int) -> list[int]:
    return [MICRO_STEPS * step + micro_step for micro_step in range(MICRO_STEPS)]


def one_process(config: MoEConfig) -> dict[str, Any]:
    model, optimizer = build(config)
    norms, loads = [], []
    for step in range(STEPS):
        for seed in seeds_of(step):
            loss = model(**micro_batch(seed, 0, 1), num_items_in_batch=labels_of(seeds_of(step)), use_cache=False).loss
            loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
        model.balancer.after_optimizer_step()
        loads.append(model.balancer.metrics()["load"])
    return {"norms": torch.stack(norms), "loads": torch.stack(loads), "weights": model.state_dict()}


def train_with_zero(accelerator: Any, config: MoEConfig) -> dict[str, Any]:
    """What a loop does under DeepSpeed."""
    from equipoise.integrations import configure_zero, zero_weights

    rank, world_size = accelerator.process_index, accelerator.num_processes
    model, optimizer = build(config)
    configure_zero(accelerator, micro_batch_size=SEQUENCES // world_size, max_grad_norm=MAX_NORM)
    # Parameters below this size ZeRO-3 leaves whole: all of so small a model.
    accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    prepared, optimizer = accelerator.prepare(model, optimizer)
    norms, loads, counted = [], [], []
    for step in range(STEPS):
        for seed in seeds_of(step):
            with accelerator.accumulate(prepared):
                batch = micro_batch(seed, rank, world_size)
                labels = labels_of(seeds_of(step))
                outputs = prepared(**batch, num_items_in_batch=labels, output_router_logits=True, use_cache=False)
                accelerator.backward(outputs.loss * MICRO_STEPS * world_size)
                kept = batch["attention_mask"].flatten().bool()
                counted.append(
                    torch.stack([layer[kept].flatten().bincount(minlength=8) for layer in outputs.selected_experts])
                )
                if accelerator.sync_gradients:  # the step is made
                    norms.append(torch.tensor(accelerator.clip_grad_norm_(prepared.parameters(), MAX_NORM)))
                    model.balancer.after_optimizer_step(skipped=accelerator.optimizer_step_was_skipped)
                    loads.append(model.balancer.metrics()["load"])
                optimizer.step()
                optimizer.zero_grad()
    weights = zero_weights(prepared)
    local = model.model.layers[1].mlp.experts.down_proj
    return {
        "norms": torch.stack(norms),
        "loads": torch.stack(loads),
        "counted": accelerator.reduce(torch.stack(counted).unflatten(0, (STEPS, MICRO_STEPS)).sum(1), "sum"),
        "weights": weights,
        "dtype": str(local.dtype),
        "kept here": local.numel(),
        "model": str(type(prepared).__name__),
    }


def main(configs: str, folder: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    torch.set_num_threads(1)
    results = {}
    for precision in ("no", "bf16"):
        for mode, fields in json.loads(configs).items():
            AcceleratorState._reset_state()
            GradientState._reset_state()
            accelerator = Accelerator(
                mixed_precision=precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=MICRO_STEPS, sync_with_dataloader=False
                ),
                # Without accelerators Accelerate finds no backend of its own under DeepSpeed.
                kwargs_handlers=[] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")],
            )
            results[f"{mode} {precision}"] = train_with_zero(accelerator, MoEConfig(**fields))
    torch.save(results, f"{folder}/{accelerator.process_index}.pt")


@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
def test_zero_trains_as_one_process(stage: int, tiny_config: Callable[..., MoEConfig], tmp_path: Path) -> None:
    # Guards against a norm of Accelerate's own choice, shares of the loss that DeepSpeed's averaging undoes, counts
    # that a step inside the backward pass loses, and biases cast with the model.
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: it is needed by no other part")
    configs = {mode: tiny_config(**fields) for mode, fields in MODES.items()}
    described = json.dumps({mode: config.to_dict() for mode, config in configs.items()})
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / f"launch_configs/zero{stage}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", __file__, described, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for mode, config in configs.items():
        expected = one_process(config)
        assert (expected["norms"] > MAX_NORM).all()  # clipping acts
        for rank in ranks:
            got = rank[f"{mode} no"]
            assert got["model"] == "DeepSpeedEngine"
            assert torch.equal(got["loads"], expected["loads"])
            torch.testing.assert_close(got["norms"], expected["norms"], atol=1e-5, rtol=1e-5)
            assert got["weights"].keys() == expected["weights"].keys()
            for name, weight in expected["weights"].items():
                if name.endswith("e_score_correction_bias"):
                    assert torch.equal(got["weights"][name], weight), name
                else:
                    torch.testing.assert_close(got["weights"][name], weight, atol=1e-5, rtol=1e-5)

            rounded = rank[f"{mode} bf16"]
            assert rounded["dtype"] == "torch.bfloat16"
            assert (rounded["kept here"] == 0) == (stage == 3)
            assert torch.equal(rounded["loads"], rounded["counted"])
            for name, weight in rounded["weights"].items():
                assert weight.dtype == torch.float32, name
                assert torch.equal(weight, ranks[0][f"{mode} bf16"]["weights"][name]), name
                if name.endswith(("e_score_correction_bias", "down_proj")) and weight.any():
                    assert (weight.bfloat16().float() != weight).any(), name  # what bf16 cannot hold is kept


if __name__ == "__main__":
    main(*sys.argv[1:])
