"""The plans that Transformers splits the model by: tensor parallelism and pipelines, on real processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.integrations import data_parallel_group
from tests.launched import launched

Run = Callable[..., list[Any]]
IDS = torch.arange(2, 26).reshape(2, 12)


@pytest.fixture(scope="module")
def saved(tiny_config: Callable[..., MoEConfig], tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(balancing_mode="global_batch", router_aux_loss_coef=0.5))
    for bias in model.selection_biases():
        bias.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


def train_and_generate(model: MoEForCausalLM) -> dict[str, Any]:
    """A training step's logits, losses, gradients and load; then what the model generates."""
    outputs = model.train()(input_ids=IDS, labels=IDS, use_cache=False)
    outputs.loss.backward()
    gradients = {}
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        gradients[name] = whole(weight.grad)
    model.balancer.after_optimizer_step()
    return {
        "logits": outputs.logits.detach(),
        "loss": outputs.loss.detach(),
        "aux_loss": outputs.aux_loss.detach(),
        "gradients": gradients,
        "load": model.balancer.metrics()["load"],
        "generated": generate(model),
    }


def whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if type(tensor.placements[0]).__name__ != "_StridedShard":
        return tensor.full_tensor()
    # Packed: each rank holds a part of the gates and a part of the ups, which torch 2.11 cannot put together.
    parts = [torch.empty_like(tensor.to_local()) for _ in range(tensor.device_mesh.size())]
    dist.all_gather(parts, tensor.to_local().contiguous())
    gates, ups = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
    return torch.cat([*gates, *ups], dim=1)


def generate(model: MoEForCausalLM) -> Tensor:
    return model.eval().generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)


def _train_split(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    with launched(rank, world_size):
        model = MoEForCausalLM.from_pretrained(folder, tp_plan="auto")
    model.balancer.synchronizer.process_group = data_parallel_group(model)
    experts = model.model.layers[1].mlp.experts
    local = {name: getattr(experts, name).to_local().shape for name in ("gate_up_proj", "down_proj")}
    return train_and_generate(model) | {"local": {name: list(shape) for name, shape in local.items()}}


@pytest.mark.processes
def test_tensor_parallelism_trains_as_one_process(saved: str, run_processes: Run) -> None:
    """Every rank holds the same tokens: counted once, and a router's gradient neither halved nor doubled."""
    alone = train_and_generate(MoEForCausalLM.from_pretrained(saved))
    for rank in run_processes(2, _train_split, saved):
        assert rank.pop("local") == {"gate_up_proj": [8, 16, 32], "down_proj": [8, 32, 8]}
        assert torch.equal(rank.pop("generated"), alone["generated"])
        assert torch.equal(rank.pop("load"), alone["load"])
        for name, value in rank.pop("gradients").items():
            torch.testing.assert_close(value, alone["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)
        for name, value in rank.items():
            torch.testing.assert_close(value, alone[name], atol=1e-5, rtol=1e-5, msg=name)


def _generate_in_stages(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    with launched(rank, world_size):
        model = MoEForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=world_size)).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    held = [hasattr(layer, "mlp") for layer in model.model.layers]
    return {"logits": logits, "generated": generate(model), "held": held}


@pytest.mark.processes
def test_stages_of_a_pipeline_give_the_model_s_logits(saved: str, run_processes: Run) -> None:
    model = MoEForCausalLM.from_pretrained(saved).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    first, last = run_processes(2, _generate_in_stages, saved)
    assert (first["held"], last["held"]) == ([True, False, False], [False, True, True])
    for stage in (first, last):
        torch.testing.assert_close(stage["logits"], logits, atol=1e-6, rtol=1e-5)
        assert torch.equal(stage["generated"], generate(model))
