"""The loss of a whole batch written out, in one process: the oracle of loops that split it.

`L` MoE layers, `B` sequences, `T` positions, `E` experts, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from equipoise import MoEForCausalLM

Batch = dict[str, Tensor]


@dataclass
class Routed:
    """What a forward pass of one rank's micro-batch came to."""

    loss: Tensor
    """Summed over the labels."""
    labels: int
    tokens: int
    mask: Tensor
    """`[B, T]`."""
    logits: Tensor
    """`[L, B, T, E]`."""
    scores: Tensor
    """`[L, B, T, E]`."""
    chosen: Tensor
    """`[L, B, T, E]`, 1 where an expert was selected."""

    def lbl(self, load: Tensor | None = None) -> Tensor:
        """`E * sum f P`, mean over layers, of this micro-batch's scores and a load `[L, E]`, or its own."""
        load = self.load() if load is None else load
        score = (self.scores * self.mask[..., None]).sum((1, 2)) / self.tokens
        return (load.shape[-1] * load / load.sum(-1, keepdim=True) * score).sum(-1).mean()

    def load(self) -> Tensor:
        return (self.chosen * self.mask[..., None]).sum((1, 2))

    def sequence_lbl(self) -> Tensor:
        sequences = [
            Routed(self.loss, 0, int(mask.sum()), mask[None], *(each[:, [row]] for each in self.values())).lbl()
            for row, mask in enumerate(self.mask)
        ]
        return torch.stack(sequences).mean()

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.scores, self.chosen

    def z_loss(self) -> Tensor:
        return (self.logits.logsumexp(-1).square() * self.mask).sum() / self.tokens / len(self.logits)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Over positions `[N, V]` and their labels `[N]`."""
    return cross_entropy(logits, labels, reduction="sum")


def route(model: MoEForCausalLM, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> Routed:
    model.eval()  # nothing of the Balancer takes part
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs, output_router_logits=True, use_cache=False)
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["labels"]).bool()
    shape = (len(outputs.router_logits), *mask.shape, model.config.num_experts)
    logits = torch.stack(outputs.router_logits).view(shape)
    scores = logits.softmax(-1) if model.config.scoring_func == "softmax" else logits.sigmoid()
    chosen = torch.zeros(shape).flatten(1, 2).scatter(-1, torch.stack(outputs.selected_experts), 1.0).view(shape)
    labels = batch["labels"][:, 1:].flatten()
    kept = labels.ne(-100)
    return Routed(
        loss(outputs.logits[:, :-1].flatten(0, 1)[kept], labels[kept]),
        int(kept.sum()),
        int(mask.sum()),
        mask,
        logits,
        scores / scores.sum(-1, keepdim=True),
        chosen,
    )


Shares = Callable[[list[list[Routed]], int, int], tuple[float, float]]
"""From the routed `[micro-step][rank]`, a micro-step and a rank: the weight on that rank's cross-entropy sum, and the
factor `c` in the weight `c * T_m / T_sync` on its balancing terms."""


def plain_gradient(
    model: MoEForCausalLM,
    batches: list[list[Batch]],
    shares: Shares,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum,
) -> dict[str, Tensor]:
    """The gradient of one optimizer step; under accumulation the load is that counted so far, over all ranks.

    Args:
        batches: `[micro-step][rank]`.
        shares: how the terms are weighted.
        loss: summed over positions.
    """
    config = model.config
    steps = [[route(model, batch, loss) for batch in step] for step in batches]
    total, load = torch.zeros(()), torch.zeros(())
    for number, step in enumerate(steps):
        load = load + torch.stack([routed.load() for routed in step]).sum(0)
        for rank, routed in enumerate(step):
            terms = {"global_batch": routed.lbl(load), "micro_batch": routed.lbl(), "sequence": routed.sequence_lbl()}
            by_labels, factor = shares(steps, number, rank)
            by_tokens = factor * routed.tokens / sum(each.tokens for each in step)
            # The sequence loss counts sequences, of which each rank has as many as the other.
            weights = {"global_batch": by_tokens, "micro_batch": by_tokens, "sequence": factor / len(step)}
            total = total + by_labels * routed.loss + config.router_z_loss_coef * by_tokens * routed.z_loss()
            for scope, coefficient in (
                (config.balancing_mode, config.router_aux_loss_coef),
                (config.complementary_balancing_mode, config.complementary_aux_loss_coef),
            ):
                if scope in terms:
                    total = total + coefficient * weights[scope] * terms[scope]
    model.zero_grad()
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def labels_in(steps: list[list[Routed]], rank: int | None = None) -> int:
    return sum(each.labels for step in steps for at, each in enumerate(step) if rank in (None, at))


def by_tokens(steps: list[list[Routed]], number: int, rank: int) -> tuple[float, float]:
    """What the whole batch in one forward pass comes to: each label and each token weigh alike."""
    tokens = [sum(each.tokens for each in step) for step in steps]
    return 1 / labels_in(steps), tokens[number] / sum(tokens)


def by_labels(steps: list[list[Routed]], number: int, rank: int) -> tuple[float, float]:
    """What the Balancer knows at a micro-step: its share of the labels stands for its share of the tokens."""
    return 1 / labels_in(steps), labels_in(steps[number : number + 1]) / labels_in(steps)


def by_rank(steps: list[list[Routed]], number: int, rank: int) -> tuple[float, float]:
    """`average_tokens_across_devices=False`: a mean over ranks of what each makes of its own labels alone."""
    ranks, labels = len(steps[0]), labels_in(steps, rank)
    return 1 / ranks / labels, labels_in(steps[number : number + 1]) / ranks / labels


def by_micro_step(steps: list[list[Routed]], number: int, rank: int) -> tuple[float, float]:
    """A mean over micro-steps: what a loop makes of it that averages."""
    return 1 / labels_in(steps), 1 / len(steps)
