"""Balancing under wrappers that copy or shard the model over processes: DDP's buffer broadcast, FSDP2, distributed
checkpoints that come back on another number of ranks.

The oracle is one process that holds the whole batch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import Observation
from equipoise.integrations import follow

pytestmark = pytest.mark.processes

Make = Callable[..., MoEConfig]
Run = Callable[..., list[Any]]
EXPERTS, SEQUENCES, LENGTH, LEARNING_RATE = 8, 6, 16, 0.1
MODES: dict[str, dict[str, Any]] = {
    "global_batch": {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.5},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": 0.05},
    # Keeps state from step to step, which a checkpoint must bring back.
    "tanh_momentum": {
        "balancing_mode": "loss_free",
        "scoring_func": "sigmoid",
        "bias_update_rule": "tanh_momentum",
        "bias_update_rate": 0.05,
    },
}


def global_batch(seed: int) -> dict[str, Tensor]:
    """Sequences of different lengths, so that equal shares of sequences hold unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (SEQUENCES, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([16, 3, 9, 12, 5, 16])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def share(batch: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    size = SEQUENCES // world_size
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def build(config: MoEConfig, seed: int = 0) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(config).train()


def labels_in(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:].ne(-100).sum()


def counted(experts: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    kept = mask.flatten().bool()
    return torch.stack([layer[kept].flatten().bincount(minlength=EXPERTS) for layer in experts])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def bits(biases: Tensor) -> list[list[int]]:
    return biases.contiguous().view(torch.int32).tolist()


def optimizer_of(model: MoEForCausalLM) -> torch.optim.Optimizer:
    """With momentum, so that a checkpoint has something to forget; without Adam's division, which would blow up the
    rounding of a gradient near zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    follow(model.balancer, optimizer)
    return optimizer


def train_step(model: MoEForCausalLM, optimizer: torch.optim.Optimizer, seed: int, rank: int, world_size: int) -> Any:
    """One optimizer step; returns what balancing made of it and the whole gradients."""
    batch = global_batch(seed)
    loss = model(**share(batch, rank, world_size), num_items_in_batch=labels_in(batch), use_cache=False).loss
    (loss * world_size).backward()  # FSDP divides by the ranks
    gradients = {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return {
        "load": model.balancer.metrics()["load"],
        "biases": torch.stack(model.selection_biases()),
        "gradients": gradients,
        "weights": {name: whole(weight) for name, weight in model.named_parameters()},
    }


def assert_same_step(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(got["load"], expected["load"])
    assert bits(got["biases"]) == bits(expected["biases"])
    for kind in ("gradients", "weights"):
        assert got[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(
                got[kind][name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}"
            )


def one_process(config: MoEConfig, steps: int) -> list[dict[str, Any]]:
    model = build(config)
    optimizer = optimizer_of(model)
    return [train_step(model, optimizer, seed, 0, 1) for seed in range(steps)]


# --- DDP ---


def _train_with_ddp(rank: int, world_size: int, configs: dict[str, MoEConfig]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode, config in configs.items():
        for broadcast in (True, False):
            model = DistributedDataParallel(build(config), broadcast_buffers=broadcast)
            own = torch.zeros(2, EXPERTS, dtype=torch.long)
            # Each forward pass outside `no_sync` broadcasts rank 0's buffers: the second meets counts half-way.
            for seed in range(3):
                batch = share(global_batch(seed), rank, world_size)
                outputs = model(**batch, output_router_logits=True, use_cache=False)
                own += counted(outputs.selected_experts, batch["attention_mask"])
                outputs.loss.backward()
            model.module.balancer.after_optimizer_step()
            results[f"{mode} {broadcast}"] = {
                "own": own,
                "load": model.module.balancer.metrics()["load"],
                "biases": torch.stack(model.module.selection_biases()),
            }
    return results


def test_ddp_does_not_overwrite_the_counts_of_a_rank(tiny_config: Make, run_processes: Run) -> None:
    configs = {mode: tiny_config(**MODES[mode]) for mode in ("global_batch", "loss_free")}
    first, second = run_processes(2, _train_with_ddp, configs)
    for case in first:
        mode = case.split()[0]
        assert not torch.equal(first[case]["own"], second[case]["own"])  # an overwritten rank would show
        for rank in (first, second):
            assert torch.equal(rank[case]["load"], first[case]["own"] + second[case]["own"]), case
            assert bits(rank[case]["biases"]) == bits(first[case]["biases"]), case
        assert first[case]["biases"].any() == (mode == "loss_free")


# --- FSDP2 ---


def shard(model: MoEForCausalLM, world_size: int, policy: MixedPrecisionPolicy | None = None) -> MoEForCausalLM:
    """Each decoder layer, then what is left: the usual way."""
    mesh = init_device_mesh("cpu", (world_size,))
    policy = policy or MixedPrecisionPolicy()
    # Where layers in bf16 put out fp32, the head must be a group of its own, whose inputs are cast: otherwise fp32
    # hidden states meet its bf16 weight.
    for module in [*model.model.layers, *([model.lm_head] if policy.output_dtype else [])]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _train_sharded(rank: int, world_size: int, configs: dict[str, MoEConfig], folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode, config in configs.items():
        model = shard(build(config), world_size)
        optimizer = optimizer_of(model)
        results[mode] = [train_step(model, optimizer, seed, rank, world_size) for seed in range(2)]
        assert isinstance(model.model.layers[1].mlp.gate.weight, DTensor)  # really sharded
        save(model, optimizer, f"{folder}/{mode}")
    results["bf16"] = _train_in_bf16(rank, world_size, {mode: configs[mode] for mode in ("global_batch", "loss_free")})
    return results


def spy(model: MoEForCausalLM) -> list[Observation]:
    """What the Balancer is given above the layers; the model's outputs are cast once more on their way out."""
    observed: list[Observation] = []
    observe = model.balancer.observe

    def watch(*arguments: Any, **keywords: Any) -> Observation:
        observed.append(observe(*arguments, **keywords))
        return observed[-1]

    model.balancer.observe = watch
    return observed


def _train_in_bf16(rank: int, world_size: int, configs: dict[str, MoEConfig]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode, config in configs.items():
        for output_dtype in (torch.float32, None, torch.bfloat16):
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
            model = shard(build(config), world_size, policy)
            optimizer = optimizer_of(model)
            seen: set[torch.dtype] = set()
            for layer in model.model.layers[1:]:
                layer.mlp.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0].dtype))
            observed = spy(model)
            batch = share(global_batch(0), rank, world_size)
            outputs = model(**batch, output_router_logits=True, use_cache=False)
            own = counted(outputs.selected_experts, batch["attention_mask"])
            outputs.loss.backward()
            optimizer.step()
            dist.all_reduce(own)
            (observation,) = observed
            results[f"{mode} {output_dtype}"] = {
                "experts": str(*seen),
                "logits": str(observation.router_logits.dtype),
                "scores": str(observation.scores.dtype),
                "aux_loss": outputs.aux_loss.detach(),
                "biases": torch.stack(model.selection_biases()),
                "load": model.balancer.metrics()["load"],
                "counted": own,
            }
    return results


def save(model: MoEForCausalLM, optimizer: torch.optim.Optimizer, folder: str) -> None:
    weights, momenta = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": momenta, "balancer": model.balancer.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    if dist.get_rank() == 0:  # between optimizer steps it is the same on every rank
        torch.save(model.balancer.state_dict(), f"{folder}/balancer.pt")


def load(model: MoEForCausalLM, optimizer: torch.optim.Optimizer, folder: str, beside: bool) -> None:
    """As any other state: a distributed checkpoint is read into the state of a model that is new.

    Args:
        beside: the Balancer's state comes from a file of its own, rather than from the checkpoint.
    """
    weights, momenta = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": momenta}
    if not beside:
        state["balancer"] = model.balancer.state_dict()
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    balancer = torch.load(f"{folder}/balancer.pt", weights_only=True) if beside else state["balancer"]
    model.balancer.load_state_dict(balancer)


def _resume(rank: int, world_size: int, configs: dict[str, MoEConfig], folder: str, beside: bool) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode, config in configs.items():
        model = build(config, seed=1)  # other weights than those to be loaded
        if dist.is_initialized():
            model = shard(model, world_size)
        optimizer = optimizer_of(model)
        load(model, optimizer, f"{folder}/{mode}", beside)
        previous = model.balancer.synchronizer.previous
        results[mode] = {
            "weights": {name: whole(weight) for name, weight in model.named_parameters()},
            "biases": torch.stack(model.selection_biases()).clone(),
            "steps": model.balancer.steps,
            "load": None if previous is None else previous.load,
            "next": train_step(model, optimizer, 2, rank, world_size),
        }
    return results


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def configs(tiny_config: Make) -> dict[str, MoEConfig]:
    made = {mode: tiny_config(**MODES[mode]) for mode in MODES}
    # What a resumed run must remember: without the previous load, its first steps balance by another one.
    made["global_batch"].load_estimate = "completed"
    return made


@pytest.fixture(scope="module")
def sharded(configs: dict[str, MoEConfig], checkpoints: Path, run_processes: Run) -> list[Any]:
    """Two ranks, two steps of each mode, saved."""
    return run_processes(2, _train_sharded, configs, str(checkpoints))


@pytest.fixture(scope="module")
def uninterrupted(configs: dict[str, MoEConfig]) -> dict[str, list[dict[str, Any]]]:
    return {mode: one_process(config, steps=3) for mode, config in configs.items()}


@pytest.mark.parametrize("mode", MODES)
def test_fsdp_trains_as_one_process(mode: str, sharded: list[Any], uninterrupted: dict[str, Any]) -> None:
    # Guards against shares of the loss that FSDP's averaging undoes, and counters or biases that sharding reaches.
    for rank in sharded:
        for got, expected in zip(rank[mode], uninterrupted[mode], strict=False):
            assert_same_step(got, expected)
    assert uninterrupted[mode][0]["biases"].any() == (mode != "global_batch")


@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_fsdp_in_bf16_keeps_the_biases_in_fp32(mode: str, sharded: list[Any]) -> None:
    # FSDP2 casts parameters and the inputs of each group, and a layer's outputs only where `output_dtype` is given:
    # without it the router's fp32 logits arrive as they were computed (torch 2.13); with bf16, which Accelerate sets
    # when asked for bf16, they arrive rounded. Selections are made below, and lose nothing in any case.
    arrive = {"torch.float32": "torch.float32", "None": "torch.float32", "torch.bfloat16": "torch.bfloat16"}
    for output_dtype, logits_dtype in arrive.items():
        first, second = (rank["bf16"][f"{mode} {output_dtype}"] for rank in sharded)
        for rank in (first, second):
            assert rank["experts"] == "torch.bfloat16"  # the policy is really on
            assert rank["logits"] == logits_dtype, output_dtype
            assert rank["scores"] == "torch.float32"
            assert rank["biases"].dtype == torch.float32
            assert torch.isfinite(rank["aux_loss"])
            assert torch.equal(rank["load"], rank["counted"])
        assert bits(first["biases"]) == bits(second["biases"])
        # Moved by parts of the rate that bf16 cannot hold.
        assert (first["biases"].bfloat16().float() != first["biases"]).any() == (mode == "loss_free")


@pytest.mark.parametrize("beside", [False, True], ids=["balancer inside", "balancer beside"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_sharded_checkpoint_resumes_on_other_ranks(
    world_size: int,
    beside: bool,
    configs: dict[str, MoEConfig],
    checkpoints: Path,
    sharded: list[Any],
    uninterrupted: dict[str, Any],
    run_processes: Run,
) -> None:
    # Guards against state that only comes back into a model that has some already: a distributed checkpoint fills the
    # keys and shapes of a new model's state, and silently leaves out what that does not name.
    if world_size == 1:  # one process, not sharded
        ranks = [_resume(0, 1, configs, str(checkpoints), beside)]
    else:
        ranks = run_processes(world_size, _resume, configs, str(checkpoints), beside)
    for mode in MODES:
        saved, following = sharded[0][mode][1], uninterrupted[mode][2]
        for rank in ranks:
            got = rank[mode]
            for name, weight in saved["weights"].items():
                assert torch.equal(got["weights"][name], weight), name
            assert bits(got["biases"]) == bits(saved["biases"])
            assert got["steps"] == 2, mode
            assert got["load"] is not None, f"{mode}: the previous load is lost"
            assert torch.equal(got["load"], saved["load"])
            assert_same_step(got["next"], following)
