"""`equipoise.balance` on stock models over real gloo processes, against one process and the loss written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

import equipoise
from tests.integrations.test_balance import SETTINGS, accumulate, assert_same, averages, ernie, micro_batch, seen
from tests.launched import launched
from tests.plain_loop import plain_gradient
from tests.stock_balancing import FAMILIES, deepseek_v3, qwen3_moe

pytestmark = pytest.mark.processes

Run = Callable[..., list[Any]]
# Micro-step by micro-step, of each rank. Ranks hold unequal numbers of tokens, the sequence loss alike many sequences.
BATCHES = [
    [micro_batch(1, [9, 4, 7]), micro_batch(2, [3, 9, 8])],
    [micro_batch(3, [9, 9, 9]), micro_batch(4, [5, 9, 3])],
]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_reentrant(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return DistributedDataParallel(model)


def fsdp(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_checkpointing(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return fsdp(model)


WRAPPINGS = {"ddp": ddp, "ddp_reentrant": ddp_reentrant, "fsdp": fsdp, "fsdp_checkpointing": fsdp_checkpointing}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gradients(rank: int, world_size: int, family: str, wrapping: str, first: str) -> dict[str, Any]:
    model = FAMILIES[family](output_router_logits=True).train()
    if first == "balance":
        balancer = equipoise.balance(model, **SETTINGS)
        wrapped = WRAPPINGS[wrapping](model)
    else:
        wrapped = WRAPPINGS[wrapping](model)
        balancer = equipoise.balance(wrapped, **SETTINGS)
    gradients = accumulate(wrapped, [step[rank] for step in BATCHES])
    load = balancer.synchronizer.running
    assert load is not None
    return {"gradients": {name: whole(each) for name, each in gradients.items()}, "tokens": int(load.tokens)}


@pytest.mark.parametrize(
    ("family", "wrapping", "first"),
    [
        ("qwen3_moe", "ddp", "balance"),
        ("deepseek_v3", "ddp", "wrap"),
        ("qwen3_moe", "ddp_reentrant", "wrap"),
        ("deepseek_v3", "fsdp", "balance"),
        ("qwen3_moe", "fsdp", "wrap"),
        ("qwen3_moe", "fsdp_checkpointing", "wrap"),
    ],
)
def test_gradient_over_two_ranks_and_two_micro_steps(
    run_processes: Run, family: str, wrapping: str, first: str
) -> None:
    """Where the stock loss would see one rank's micro-batch, and Megatron's shrink with the ranks."""
    expected = plain_gradient(seen(FAMILIES[family](), **SETTINGS), BATCHES, averages)
    tokens = sum(int(batch["attention_mask"].sum()) for step in BATCHES for batch in step)
    for rank in run_processes(2, _gradients, family, wrapping, first):
        assert rank["tokens"] == tokens
        assert_same(rank["gradients"], expected)


def _biases(rank: int, world_size: int, family: str, wrapping: str) -> list[Tensor]:
    model = (ernie() if family == "ernie" else FAMILIES[family]()).train()
    wrapped = WRAPPINGS[wrapping](model) if wrapping else model
    balancer = equipoise.balance(wrapped, "loss_free", bias_update_rule="proportional", bias_update_rate=0.3)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    for step in BATCHES:
        wrapped(**step[rank]).loss.backward()
        optimizer.step()
    found = [bias.clone() for bias in balancer.selection_biases()]
    assert balancer.steps == len(BATCHES)
    return found


@pytest.mark.parametrize(("family", "wrapping"), [("deepseek_v3", "ddp"), ("deepseek_v3", "fsdp"), ("ernie", "fsdp")])
def test_biases_are_those_of_one_process_on_both_ranks(run_processes: Run, family: str, wrapping: str) -> None:
    """DDP sends rank 0's buffers around; FSDP2 shards the biases that are parameters."""
    model = (ernie() if family == "ernie" else deepseek_v3()).train()
    balancer = equipoise.balance(model, "loss_free", bias_update_rule="proportional", bias_update_rate=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in BATCHES:
        accumulate(model, step)
        optimizer.step()
    for rank in run_processes(2, _biases, family, wrapping):
        for found, bias in zip(rank, balancer.selection_biases(), strict=True):
            torch.testing.assert_close(found, bias)
    assert any(bias.abs().sum() > 0 for bias in balancer.selection_biases())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("stock")
    qwen3_moe(output_router_logits=True).save_pretrained(folder)
    return str(folder)


DISPATCHES = "ep_dispatch_experts" in (Qwen3MoeForCausalLM.config_class.base_model_ep_plan or {}).values()


def _train(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    balancer = equipoise.balance(model.train(), **SETTINGS | {"complementary_balancing_mode": "none"})
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    gates = [layer.mlp.gate.weight.grad for layer in model.model.layers]
    assert balancer.synchronizer.running is not None
    return {
        "aux_loss": outputs.aux_loss.detach(),
        "gates": torch.stack([whole(gate) for gate in gates]),
        "load": balancer.synchronizer.running.load,
    }


def _split(rank: int, world_size: int, folder: str, layout: str) -> dict[str, Any]:
    with launched(rank, world_size):
        if layout == "tensor":
            model = Qwen3MoeForCausalLM.from_pretrained(folder, tp_plan="auto")
        elif DISPATCHES:
            model = Qwen3MoeForCausalLM.from_pretrained(
                folder, distributed_config=DistributedConfig(fsdp_size=world_size, ep_size=world_size)
            )
        else:
            model = Qwen3MoeForCausalLM.from_pretrained(
                folder, distributed_config=DistributedConfig(tp_size=world_size, enable_expert_parallel=True)
            )
    own_tokens = layout == "expert" and DISPATCHES
    return _train(model, BATCHES[0][rank if own_tokens else 0])


@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_plans_that_split_layers_and_experts(run_processes: Run, saved: str, layout: str) -> None:
    """Ranks that hold the same tokens count them once; those with other tokens add up. (Expert parallelism of
    Transformers 5.17 numbers a rank's own experts from 0 in what the router puts out.)"""
    batches = BATCHES[0] if layout == "expert" and DISPATCHES else BATCHES[0][:1]
    whole_batch = {name: torch.cat([batch[name] for batch in batches]) for name in BATCHES[0][0]}
    alone = _train(Qwen3MoeForCausalLM.from_pretrained(saved), whole_batch)
    ranks = run_processes(2, _split, saved, layout)
    for rank in ranks:
        assert torch.equal(rank["load"], alone["load"])
    if len(batches) == 1:
        for rank in ranks:
            torch.testing.assert_close(rank["aux_loss"], alone["aux_loss"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rank["gates"], alone["gates"], atol=1e-6, rtol=1e-4)
    else:
        expected = plain_gradient(
            seen(qwen3_moe(), **SETTINGS | {"complementary_balancing_mode": "none"}), [batches], averages
        )
        gates = torch.stack([each for name, each in expected.items() if "gate.weight" in name])
        for rank in ranks:
            torch.testing.assert_close(rank["gates"], gates, atol=1e-6, rtol=1e-4)
