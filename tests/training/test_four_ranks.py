"""Two hundred steps of four processes on real text, a checkpoint, and two processes that go on from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from equipoise import MoEConfig, MoEForCausalLM

STEPS, MORE, LENGTH, MICRO_BATCHES = 200, 5, 48, 4


def real_text() -> Tensor:
    """Bytes of Python's own sources, `[micro-batches, LENGTH]`."""
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[: (STEPS + MORE) * MICRO_BATCHES * LENGTH]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, LENGTH)


def train(
    rank: int, world_size: int, config: MoEConfig, checkpoint: str, first: int, last: int, resume: bool
) -> dict[str, Any]:
    """Steps `first` to `last`, of four micro-batches each whatever the number of ranks; saves after `STEPS`."""
    torch.manual_seed(0)
    model = MoEForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        model.balancer.load_state_dict(state["balancer"])
    prepared = DistributedDataParallel(model)
    text = real_text()
    loads = []
    for step in range(first, last):
        batch = text[step * MICRO_BATCHES :][:MICRO_BATCHES]
        items = batch[:, 1:].numel()
        for micro_batch in batch[rank::world_size]:
            ids = micro_batch[None]
            (prepared(ids, labels=ids, num_items_in_batch=items, use_cache=False).loss * world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.balancer.after_optimizer_step()
        loads.append(model.balancer.metrics()["load"])
        if step + 1 == STEPS and rank == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "balancer": json.loads(json.dumps(model.balancer.state_dict())),
            }
            torch.save(state, checkpoint)
    dist.barrier()
    return {
        "biases": torch.stack(model.selection_biases()),
        "loads": torch.stack(loads),
        "steps": model.balancer.steps,
    }


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["sign", "tanh_momentum", "quantile"])
def test_the_bias_is_one_on_all_ranks_and_resumes_on_others(
    tiny_config: Callable[..., MoEConfig], tmp_path: Path, run_processes: Callable[..., list[Any]], rule: str
) -> None:
    config = tiny_config(
        vocab_size=256,
        hidden_size=16,
        balancing_mode="loss_free",
        scoring_func="sigmoid",
        bias_update_rule=rule,
        bias_update_rate=0.2 if rule == "quantile" else 0.01,
        complementary_balancing_mode="global_batch",
    )
    checkpoint = str(tmp_path / "checkpoint.pt")
    straight = run_processes(4, train, config, checkpoint, 0, STEPS + MORE, False)
    resumed = run_processes(2, train, config, checkpoint, STEPS, STEPS + MORE, True)
    for run in (straight, resumed):
        assert run[0]["biases"].abs().max() > 0.01
        for rank in run:
            assert torch.equal(rank["biases"].view(torch.int32), run[0]["biases"].view(torch.int32))
            assert torch.equal(rank["loads"], run[0]["loads"])
            assert rank["steps"] == STEPS + MORE
    # The first step after the checkpoint has the same weights and text: the same load, to the token. Then sums over
    # two ranks instead of four round otherwise, and a near-tie may fall the other way.
    assert torch.equal(resumed[0]["loads"][0], straight[0]["loads"][STEPS])
    moved = (resumed[0]["loads"] - straight[0]["loads"][STEPS:]).abs().sum() / straight[0]["loads"][STEPS:].sum()
    assert moved < 0.02
    torch.testing.assert_close(resumed[0]["biases"], straight[0]["biases"], atol=0.03, rtol=0)
