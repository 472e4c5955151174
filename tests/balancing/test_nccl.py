"""The asynchronous all-reduce on a GPU: NCCL, one rank, under a model's own forward and backward pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from equipoise import MoEConfig, MoEForCausalLM


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_the_reduction_runs_under_nccl(tiny_config: Callable[..., MoEConfig], tmp_path: Path, mode: str) -> None:
    def train() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = MoEForCausalLM(tiny_config(balancing_mode=mode, bias_update_rate=0.1)).cuda().train()
        for seed in range(4):
            ids = torch.randint(2, 64, (2, 16), generator=torch.Generator().manual_seed(seed)).cuda()
            model(ids, labels=ids).loss.backward()
            if seed % 2:
                model.balancer.after_optimizer_step()
        return (
            model.balancer.metrics()["load"],
            torch.stack(model.selection_biases()),
            model.model.layers[1].mlp.gate.weight.grad,
        )

    alone = train()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        together = train()
    finally:
        dist.destroy_process_group()
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])
    torch.testing.assert_close(alone[2], together[2], atol=1e-5, rtol=1e-4)
