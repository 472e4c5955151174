"""Experts shared out over real gloo processes by Transformers' `DistributedConfig`, against one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.integrations import clip_grad_norm_, data_parallel_group, shard_experts
from tests.launched import launched

Make = Callable[..., MoEConfig]
Run = Callable[..., list[Any]]
EXPERTS, SEQUENCES, LENGTH, STEPS, MICRO_STEPS, MAX_NORM = 8, 8, 16, 3, 2, 0.5
MODES: dict[str, dict[str, Any]] = {
    "global_batch": {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.5},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": 0.05},
}
DISPATCHES = "ep_dispatch_experts" in MoEConfig.base_model_ep_plan.values()
# A tensor-parallel plan that shards nothing: an empty one is refused (Transformers 5.23).
NO_PLAN = {"model.layers.*.mlp.gate.weight": "replicate"}
# Processes, sets of tokens that differ, and how the model is sharded: a size for `shard_experts`, or the fields of a
# DistributedConfig.
LAYOUTS: dict[str, tuple[int, int, Any]] = (
    {
        "2 of 2 ranks": (2, 2, 2),
        "2 of 4 ranks": (4, 4, 2),
        "4 of 4 ranks, pairs with the same tokens": (
            4,
            2,
            {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, "tp_plan": NO_PLAN},
        ),
        "2 of 2 ranks, replicated on 4": (4, 4, {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}),
    }
    if DISPATCHES
    else {"2 of 2 ranks": (2, 1, 2), "4 of 4 ranks": (4, 1, 4)}
)


def micro_batch(seed: int, index: int, size: int) -> dict[str, Tensor]:
    """Share `index` of `size` of a micro-step's sequences, whose lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (SEQUENCES, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([16, 3, 9, 12, 5, 16, 7, 10])[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: value.chunk(size)[index] for name, value in batch.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def bits(biases: Tensor) -> list[list[int]]:
    return biases.contiguous().view(torch.int32).tolist()


def build(config: MoEConfig, seed: int = 0) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(config).train()


def optimizer_of(model: MoEForCausalLM) -> torch.optim.Optimizer:
    """Without Adam's division, which would blow up the rounding of a gradient near zero."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_step(model: Any, optimizer: Any, step: int, index: int, size: int, clip: Callable) -> dict[str, Any]:
    """One optimizer step of `MICRO_STEPS` micro-steps on share `index` of `size` of its sequences."""
    seeds = [MICRO_STEPS * step + micro_step for micro_step in range(MICRO_STEPS)]
    labels = sum(micro_batch(seed, 0, 1)["labels"][:, 1:].ne(-100).sum() for seed in seeds)
    losses, logits = [], []
    for seed in seeds:
        outputs = model(**micro_batch(seed, index, size), num_items_in_batch=labels, use_cache=False)
        (outputs.loss * size).backward()  # FSDP averages over the ranks whose tokens differ
        losses.append(outputs.loss.detach())
        logits.append(outputs.logits.detach())
    gradients = {name: whole(weight.grad) for name, weight in model.named_parameters()}
    norm = clip(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    model.balancer.after_optimizer_step()
    return {
        "loss": torch.stack(losses),
        "logits": torch.stack(logits),
        "norm": norm.detach(),
        "load": model.balancer.metrics()["load"],
        "biases": torch.stack(model.selection_biases()).clone(),
        "gradients": gradients,
        "weights": {name: whole(weight) for name, weight in model.named_parameters()},
    }


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def save_optimizer(model: MoEForCausalLM, optimizer: torch.optim.Optimizer, folder: str) -> None:
    state = tensors(get_optimizer_state_dict(model, optimizer, options=FLAT))
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))


def load_optimizer(model: MoEForCausalLM, optimizer: torch.optim.Optimizer, folder: str) -> None:
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    read = tensors(state)
    dcp.load(read, storage_reader=HuggingFaceStorageReader(folder))
    set_optimizer_state_dict(model, optimizer, state | read, options=FLAT)


def shard(model: MoEForCausalLM, layout: Any, folder: str) -> MoEForCausalLM:
    if isinstance(layout, int):
        return shard_experts(model, layout)
    if dist.get_rank() == 0:
        model.save_pretrained(f"{folder}/start")
    dist.barrier()
    sharded = MoEForCausalLM.from_pretrained(f"{folder}/start", distributed_config=DistributedConfig(**layout))
    sharded.balancer.synchronizer.process_group = data_parallel_group(sharded)
    return sharded.train()


def _train(rank: int, world_size: int, configs: dict[str, MoEConfig], layout: Any, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode, config in configs.items():
        with launched(rank, world_size):
            model = shard(build(config), layout, folder)
        group = data_parallel_group(model)
        index, size = dist.get_rank(group), dist.get_world_size(group)
        optimizer = optimizer_of(model)
        results[mode] = {"index": index, "size": size, "steps": []}
        results[mode]["local experts"] = model.model.layers[1].mlp.experts.down_proj.to_local().shape[0]
        for step in range(STEPS):
            results[mode]["steps"].append(train_step(model, optimizer, step, index, size, clip_grad_norm_))
            if step == STEPS - 2:
                model.save_pretrained(f"{folder}/{mode}")
                save_optimizer(model, optimizer, f"{folder}/{mode}/optimizer")
                results[mode]["balancer"] = balancer = model.balancer.state_dict()
        # Another model goes on from what was saved.
        with launched(rank, world_size):
            resumed = shard(MoEForCausalLM.from_pretrained(f"{folder}/{mode}").train(), layout, folder)
        optimizer = optimizer_of(resumed)
        load_optimizer(resumed, optimizer, f"{folder}/{mode}/optimizer")
        resumed.balancer.load_state_dict(balancer)
        results[mode]["resumed"] = train_step(resumed, optimizer, STEPS - 1, index, size, clip_grad_norm_)
    return results


@pytest.fixture(scope="module")
def configs(tiny_config: Make) -> dict[str, MoEConfig]:
    return {mode: tiny_config(**fields) for mode, fields in MODES.items()}


@pytest.fixture(scope="module")
def one_process(configs: dict[str, MoEConfig]) -> dict[str, list[dict[str, Any]]]:
    results = {}
    for mode, config in configs.items():
        model = build(config)
        optimizer = optimizer_of(model)
        results[mode] = [
            train_step(model, optimizer, step, 0, 1, torch.nn.utils.clip_grad_norm_) for step in range(STEPS)
        ]
    return results


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda message: f"{name}: {message}")


def assert_same_step(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(got["load"], expected["load"])
    assert bits(got["biases"]) == bits(expected["biases"])
    assert_close(got["norm"], expected["norm"], "norm")
    for kind in ("gradients", "weights"):
        assert got[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert_close(got[kind][name], value, f"{kind} {name}")


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_experts_train_as_one_process(
    layout: str, configs: dict[str, MoEConfig], one_process: dict[str, Any], run_processes: Run, tmp_path: Path
) -> None:
    # Guards against tokens that peers count twice, indices that one rank numbers from its own first expert, gradients
    # that are averaged over the wrong ranks, and norms that count a whole gradient once per rank.
    world_size, different, how = LAYOUTS[layout]
    ranks = run_processes(world_size, _train, configs, how, str(tmp_path))
    for mode in MODES:
        assert one_process[mode][0]["norm"] > MAX_NORM  # clipping acts
        assert one_process[mode][0]["biases"].any() == (mode == "loss_free")
        for rank in ranks:
            got = rank[mode]
            assert got["size"] == different
            assert got["local experts"] < EXPERTS
            for mine, expected in zip(got["steps"], one_process[mode], strict=True):
                assert_same_step(mine, expected)
                share = expected["logits"].chunk(got["size"], dim=1)[got["index"]]
                assert_close(mine["logits"], share, "logits")
            assert_same_step(got["resumed"], one_process[mode][-1])
            for name, weight in got["steps"][-1]["weights"].items():  # peers do not drift apart
                assert torch.equal(weight, ranks[0][mode]["steps"][-1]["weights"][name]), name
        by_index = {rank[mode]["index"]: rank[mode]["steps"] for rank in ranks}
        for step, expected in enumerate(one_process[mode]):
            assert_close(sum(steps[step]["loss"] for steps in by_index.values()), expected["loss"], "loss")

        # What is on disk is whole: one process goes on from it too.
        saved = MoEForCausalLM.from_pretrained(tmp_path / mode).train()
        before_last = ranks[0][mode]["steps"][-2]
        for name, weight in saved.named_parameters():
            assert torch.equal(weight, before_last["weights"][name]), name
        assert bits(torch.stack(saved.selection_biases())) == bits(before_last["biases"])
        optimizer = optimizer_of(saved)
        load_optimizer(saved, optimizer, str(tmp_path / mode / "optimizer"))
        saved.balancer.load_state_dict(ranks[0][mode]["balancer"])
        resumed = train_step(saved, optimizer, STEPS - 1, 0, 1, torch.nn.utils.clip_grad_norm_)
        assert_same_step(resumed, one_process[mode][-1])


def _refusals(rank: int, world_size: int, config: MoEConfig) -> list[str]:
    messages = []
    for size in (0, 3, 8, 2):
        try:
            with launched(rank, world_size):
                shard_experts(MoEForCausalLM(config), size)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.processes
def test_sizes_that_cannot_be_are_refused(tiny_config: Make, run_processes: Run) -> None:
    for messages in run_processes(4, _refusals, tiny_config(num_hidden_layers=2)):
        assert messages[:3] == [
            "expert_parallel_size must divide num_experts (8); got 0",
            "expert_parallel_size must divide num_experts (8); got 3",
            "expert_parallel_size must divide the number of processes (4); got 8",
        ]
        assert len(messages) == (3 if DISPATCHES else 4)
        assert all("must be the number of processes (4)" in message for message in messages[3:])


def _train_in_bf16(rank: int, world_size: int, config: MoEConfig) -> dict[str, Any]:
    with launched(rank, world_size):
        model = shard_experts(build(config), world_size, bf16=True)
    seen: set[torch.dtype] = set()
    for layer in model.model.layers[1:]:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    batch = micro_batch(0, rank, world_size)
    outputs = model(**batch, output_router_logits=True, use_cache=False)
    outputs.loss.backward()
    model.balancer.after_optimizer_step()
    kept = batch["attention_mask"].flatten().bool()
    own = torch.stack([layer[kept].flatten().bincount(minlength=EXPERTS) for layer in outputs.selected_experts])
    dist.all_reduce(own)
    return {
        "experts": str(*seen),
        "logits": str(outputs.router_logits[0].dtype),
        "weights": str(model.model.layers[1].mlp.experts.down_proj.dtype),
        "gradients": all(bool(whole(weight.grad).isfinite().all()) for weight in model.parameters()),
        "counted": own,
        "load": model.balancer.metrics()["load"],
        "biases": torch.stack(model.selection_biases()),
    }


@pytest.mark.processes
@pytest.mark.skipif(not DISPATCHES, reason="this Transformers has no FSDP2 beside expert parallelism")
def test_bf16_leaves_weights_logits_and_biases_in_fp32(configs: dict[str, MoEConfig], run_processes: Run) -> None:
    first, second = run_processes(2, _train_in_bf16, configs["loss_free"])
    for rank in (first, second):
        assert rank["experts"] == "torch.bfloat16"
        assert rank["logits"] == rank["weights"] == str(rank["biases"].dtype) == "torch.float32"
        assert rank["gradients"]
        assert torch.equal(rank["load"], rank["counted"])
        assert bits(rank["biases"]) == bits(first["biases"])
        assert (rank["biases"].bfloat16().float() != rank["biases"]).any()
