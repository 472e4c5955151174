"""Real gloo processes against one process that holds the whole global batch.

Uneven padding, masked prompts, a rank with fewer sequences and one whose micro-batch bears no loss: the shares that
make the coefficient exact must hold under all of it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from equipoise import MoEConfig, MoEForCausalLM

SEQUENCES, LENGTH = 9, 16
COEFFICIENT = 0.5  # large: an error in the balancing part must not drown in the cross-entropy
Z_COEFFICIENT = 0.05


def global_batch(seed: int = 0) -> dict[str, Tensor]:
    """Sequences of very different lengths, prompts without loss; the last three are all prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (SEQUENCES, LENGTH), generator=generator)
    lengths = torch.tensor([16, 3, 9, 12, 5, 16, 7, 2, 11])
    prompts = torch.tensor([4, 1, 0, 9, 2, 0, 7, 2, 11])
    position = torch.arange(LENGTH)
    mask = (position < lengths[:, None]).long()
    labels = ids.masked_fill((position < prompts[:, None]) | (mask == 0), -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def share(batch: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Unequal shares, in order: the last rank has the sequences without loss."""
    bounds = {2: [0, 6, 9], 4: [0, 1, 4, 6, 9]}[world_size]
    return {name: value[bounds[rank] : bounds[rank + 1]] for name, value in batch.items()}


def build(config: MoEConfig) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(config).train()


def labels_in(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:].ne(-100).sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def _train_on_a_rank(rank: int, world_size: int, configs: dict[str, MoEConfig]) -> dict[str, Any]:
    batch = share(global_batch(), rank, world_size)
    results: dict[str, Any] = {}
    for loop in ("trainer", "plain"):
        model = DistributedDataParallel(build(configs["global_batch"]))
        items = labels_in(global_batch()) if loop == "trainer" else None
        loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
        # Trainer multiplies by the ranks what DDP will average; a plain loop leaves the mean.
        (loss * world_size if loop == "trainer" else loss).backward()
        results[loop] = gradients(model)

    for mode in ("loss_free", "micro_batch"):
        model = DistributedDataParallel(build(configs[mode]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(8):
            for seed in (2 * step, 2 * step + 1):
                shared = share(global_batch(seed), rank, world_size)
                with model.no_sync():
                    model(**shared, use_cache=False).loss.backward()
            for weight in model.parameters():
                if weight.grad is not None:
                    torch.distributed.all_reduce(weight.grad)
                    weight.grad /= world_size
            optimizer.step()
            optimizer.zero_grad()
            model.module.balancer.after_optimizer_step()
            if step == 0:
                results[f"{mode} first load"] = model.module.balancer.metrics()["load"]
        results[f"{mode} biases"] = torch.stack(model.module.selection_biases())
        results[f"{mode} load"] = model.module.balancer.metrics()["load"]
    return results


def balancing_by_hand(config: MoEConfig) -> tuple[Tensor, dict[str, Tensor], MoEForCausalLM]:
    """LBL and z-loss of the whole batch, written out from the routing alone; no Balancer in it."""
    model = build(config)
    batch = global_batch()
    outputs = model(**batch, output_router_logits=True, use_cache=False)
    tokens = batch["attention_mask"].flatten().bool()
    total = torch.zeros(())
    for logits, experts in zip(outputs.router_logits, outputs.selected_experts, strict=True):
        scores = logits[tokens].softmax(-1)
        selected = torch.nn.functional.one_hot(experts[tokens], config.num_experts).sum((0, 1))
        fraction = selected / selected.sum()
        lbl = config.num_experts * (fraction * scores.mean(0)).sum()
        z_loss = logits[tokens].logsumexp(-1).square().mean()
        total = total + (COEFFICIENT * lbl + Z_COEFFICIENT * z_loss) / len(outputs.router_logits)
    return total, batch, model


def cross_entropy(model: MoEForCausalLM, batch: dict[str, Tensor], items: Tensor) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return (
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        / items
    )


def one_process(config: MoEConfig, world_size: int) -> dict[str, dict[str, Tensor]]:
    expected = {}
    for loop in ("trainer", "plain"):
        balancing, batch, model = balancing_by_hand(config)
        if loop == "trainer":
            language = cross_entropy(model, batch, labels_in(batch))
        else:  # the mean of the ranks' means, a rank without labels counting as 0
            ranks = [share(batch, rank, world_size) for rank in range(world_size)]
            means = [cross_entropy(model, part, labels_in(part).clamp(min=1)) for part in ranks]
            language = torch.stack(means).mean()
        (balancing + language).backward()
        expected[loop] = gradients(model)
    return expected


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_equal_one_process(
    world_size: int, tiny_config: Callable[..., MoEConfig], run_processes: Callable[..., list[Any]]
) -> None:
    coefficients = {"router_aux_loss_coef": COEFFICIENT, "router_z_loss_coef": Z_COEFFICIENT}
    configs = {
        "global_batch": tiny_config(balancing_mode="global_batch", **coefficients),
        "micro_batch": tiny_config(balancing_mode="micro_batch", **coefficients),
        "loss_free": tiny_config(balancing_mode="loss_free", scoring_func="sigmoid", bias_update_rate=0.05),
    }
    ranks = run_processes(world_size, _train_on_a_rank, configs)

    expected = one_process(configs["global_batch"], world_size)
    for loop in ("trainer", "plain"):
        for name, gradient in expected[loop].items():
            for rank in range(world_size):
                error = (ranks[rank][loop][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert error < 1e-5, f"{loop} loop, {name}, rank {rank}: relative error {error:.1e}"

    # The bias: the same bits everywhere, and moved.
    biases = ranks[0]["loss_free biases"]
    assert biases.abs().max() >= 0.05
    for rank in range(1, world_size):
        assert torch.equal(biases.view(torch.int32), ranks[rank]["loss_free biases"].view(torch.int32))

    # The load of the first global batch, two micro-batches of every rank, is what one process counts, to the token.
    for mode in ("loss_free", "micro_batch"):
        model = build(configs[mode])
        for seed in (0, 1):
            model(**global_batch(seed), use_cache=False)
        model.balancer.after_optimizer_step()
        assert torch.equal(ranks[0][f"{mode} first load"], model.balancer.metrics()["load"])

    # The load of the last one: each token K times, padding never, and the same on every rank.
    tokens = 2 * global_batch()["attention_mask"].sum().item()
    for mode in ("loss_free", "micro_batch"):
        for rank in range(world_size):
            assert ranks[rank][f"{mode} load"].sum(-1).tolist() == [tokens * 2] * 2
            assert torch.equal(ranks[rank][f"{mode} load"], ranks[0][f"{mode} load"])
