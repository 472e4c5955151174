"""How far the balancing gradient under each load estimate is from the one with the whole global batch's load.

Trains a preset on real text with `load_estimate: running`. At some steps the global batch is put through the model
once more, and the gradient of the load-balancing loss is taken under each estimate, as `ranks x accumulation` would
see it: ranks are consecutive micro-batches whose counts are summed, which is what the synchronizer does in processes.
The last three batches up to each of `--at` are measured.
About 10 minutes on one core with 8 micro-batches of 512 tokens.

python benchmarks/load_estimates.py --data CORPUS --output RESULT.json --layouts 1x8 2x4
"""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from small_training import SmallTraining, step
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import load_balancing_loss, load_fraction, mean_scores, routing_scores
from equipoise.data import write_json

ESTIMATES = ("running", "completed", "current", "micro_batch")
"""`micro_batch` is no estimate of the global batch: it shows what balancing each micro-batch asks for instead."""


@dataclass
class Arguments(SmallTraining):
    """What is trained and measured."""

    layouts: list[str] = field(
        default_factory=lambda: ["1x8", "2x4"], metadata={"help": "ranks x accumulation, all of one product."}
    )
    at: list[int] = field(default_factory=lambda: [10, 100, 500], metadata={"help": "Optimizer steps to measure at."})


def loads_under(estimate: str, loads: list[Tensor], ranks: int, previous: Tensor) -> list[Tensor]:
    """The load `[L, E]` that each micro-batch's loss would meet.

    Args:
        loads: of each micro-batch, in order; micro-step `j` holds those from `j * ranks` on.
        previous: of the global batch before.
    """
    steps = torch.stack(loads).unflatten(0, (-1, ranks)).sum(dim=1).double()  # [accumulation, L, E]
    if estimate == "micro_batch":
        return loads
    if estimate == "running":
        steps = steps.cumsum(dim=0)
    elif estimate == "completed":
        seen = steps.cumsum(dim=0)
        share = torch.arange(1, len(steps) + 1)[:, None, None] / len(steps)  # all micro-batches are equally large
        steps = seen + (1 - share) * previous
    elif estimate == "exact":
        steps = steps.sum(dim=0, keepdim=True).expand_as(steps)
    return list(steps.repeat_interleave(ranks, dim=0))


def gradients(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(weight) if gradient is None else gradient
        for gradient, weight in zip(found, weights, strict=True)
    ]


def compare(vector: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """Cosine with, and norm over the norm of, the reference."""
    one, other = (torch.cat([part.flatten().double() for part in parts]) for parts in (vector, reference))
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(one, other, dim=0)),
        "norm_ratio": float(one.norm() / other.norm()),
    }


def measure(model: MoEForCausalLM, batch: list[dict], layouts: list[str]) -> dict[str, dict]:
    """Cosine and norm ratio against `exact`, by layout and estimate: of the balancing gradient on the routers and on
    all weights, and of the whole loss's gradient on all weights."""
    assert model.balancer.synchronizer.previous is not None
    previous = model.balancer.synchronizer.previous.load
    config: MoEConfig = model.config
    names, weights = zip(*model.named_parameters(), strict=True)
    routers = [index for index, name in enumerate(names) if name.endswith("gate.weight")]
    model.eval()  # nothing of the Balancer takes part, and there is no dropout to differ

    with torch.no_grad():
        loads = []
        for micro_batch in batch:
            outputs = model(**micro_batch, output_router_logits=True, use_cache=False)
            experts = torch.stack(outputs.selected_experts).flatten(1)
            loads.append(
                torch.zeros(len(experts), config.num_experts).scatter_add_(1, experts, torch.ones(experts.shape))
            )
    wanted = {("exact", layouts[0]): loads_under("exact", loads, 1, previous)} | {
        (estimate, layout): loads_under(estimate, loads, int(layout.split("x")[0]), previous)
        for layout in layouts
        for estimate in ESTIMATES
    }
    balancing = {key: [torch.zeros_like(weight) for weight in weights] for key in wanted}
    language = [torch.zeros_like(weight) for weight in weights]
    for position, micro_batch in enumerate(batch):
        outputs = model(**micro_batch, output_router_logits=True, use_cache=False)
        scores = routing_scores(torch.stack(outputs.router_logits), config.scoring_func)
        mean_score = mean_scores(scores)
        for key, estimated in wanted.items():
            fraction = load_fraction(estimated[position].long() if key[0] == "micro_batch" else estimated[position])
            loss = load_balancing_loss(fraction, mean_score).mean() / len(batch)
            torch._foreach_add_(balancing[key], gradients(loss, list(weights)))
        torch._foreach_add_(language, gradients(outputs.loss / len(batch), list(weights)))
    model.train()

    exact = balancing[("exact", layouts[0])]
    whole = {
        key: [ce + config.router_aux_loss_coef * part for ce, part in zip(language, parts, strict=True)]
        for key, parts in balancing.items()
    }
    return {
        layout: {
            estimate: {
                "router": compare(
                    [balancing[estimate, layout][index] for index in routers], [exact[index] for index in routers]
                ),
                "all_weights": compare(balancing[estimate, layout], exact),
                "with_cross_entropy": compare(whole[estimate, layout], whole["exact", layouts[0]]),
            }
            for estimate in ESTIMATES
        }
        for layout in layouts
    }


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    products = {int(layout.split("x")[0]) * int(layout.split("x")[1]) for layout in arguments.layouts}
    if len(products) != 1:
        raise SystemExit(f"layouts must all have one product of ranks and accumulation; got {arguments.layouts}")
    (micro_batches,) = products
    packed, _ = arguments.packed()
    model = arguments.model(load_estimate="running")
    optimizer, schedule = arguments.optimizer(model)
    measured: dict[int, list[dict]] = {at: [] for at in arguments.at}
    losses: list[float] = []
    steps = max(arguments.at)
    batches = arguments.batches(packed, steps, micro_batches)
    for number, batch in enumerate(tqdm(batches, total=steps, unit="step"), start=1):
        for at in arguments.at:
            if at - 3 < number <= at:
                measured[at].append(measure(model, batch, arguments.layouts))
        losses.append(step(model, optimizer, schedule, batch))

    write_json(
        Path(arguments.output),
        {
            "arguments": vars(arguments) | {"data": "CORPUS", "output": "RESULT"},
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "tokens": steps * micro_batches * arguments.micro_batch_size * arguments.block_size,
            "lm_loss_end": mean(losses[-10:]),
            "steps": {str(at): found for at, found in measured.items()},
        },
    )
    print(json.dumps(measured[arguments.at[-1]][-1], indent=1))


if __name__ == "__main__":
    main()
