"""How far the balancing gradient under each load estimate is from the one with the whole global batch's load.

Trains a preset on real text with `load_estimate: running`. At some steps the global batch is put through the model once
more, and the gradient of the load-balancing loss is taken under each estimate, as `ranks x accumulation` would see it:
ranks are consecutive micro-batches whose counts are summed, which is what the synchronizer does in processes. The last
three batches up to each of `--at` are measured. About 8 minutes on one core with 8 micro-batches of 512 tokens.

python benchmarks/load_estimates.py --data CORPUS --output RESULT.json --layouts 1x8 2x4
"""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser, set_seed

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import load_balancing_loss, load_fraction, mean_scores, routing_scores
from equipoise.data import MicroBatchSampler, pack_documents, read_documents, sample_texts, train_tokenizer, write_json

ESTIMATES = ("running", "completed", "current", "micro_batch")
"""`micro_batch` is no estimate of the global batch: it shows what balancing each micro-batch asks for instead."""


@dataclass
class Arguments:
    """What is trained and measured."""

    data: str = field(metadata={"help": "Folder with one sub-folder per domain."})
    output: str = field(metadata={"help": "JSON file to write."})
    layouts: list[str] = field(metadata={"help": "ranks x accumulation, all of one product, e.g. 1x8 2x4."})
    micro_batch_domains: str = field(default="mixed", metadata={"help": "mixed or single."})
    preset: str = field(default="hub_configs/tiny", metadata={"help": "Folder with a config.json."})
    at: list[int] = field(default_factory=lambda: [10, 100, 500], metadata={"help": "Optimizer steps to measure at."})
    micro_batch_size: int = field(default=2, metadata={"help": "Blocks in a micro-batch."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a block."})
    max_train_bytes_per_domain: int = field(default=3_000_000, metadata={"help": "Training text of each domain."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW, after 50 steps of warm-up."})
    seed: int = field(default=0, metadata={"help": "Of weights and data order."})


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
    config = AutoConfig.from_pretrained(arguments.preset)
    documents = read_documents(arguments.data, max_train_bytes_per_domain=arguments.max_train_bytes_per_domain)[
        "train"
    ]
    tokenizer = train_tokenizer(sample_texts(documents), config.vocab_size)
    domains = sorted(documents.unique("domain"))
    blocks = pack_documents(documents, tokenizer, arguments.block_size, domains=domains, seed=arguments.seed)
    steps = max(arguments.at)
    sampler = MicroBatchSampler(
        blocks["domain"],
        arguments.micro_batch_size,
        steps * micro_batches,
        seed=arguments.seed,
        micro_batch_domains=arguments.micro_batch_domains,
    )
    batches = iter(DataLoader(blocks.with_format("torch"), batch_sampler=sampler))
    set_seed(arguments.seed)
    model = MoEForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))

    measured: dict[int, list[dict]] = {step: [] for step in arguments.at}
    losses = []
    for step in tqdm(range(1, steps + 1), unit="step"):
        batch = [
            {name: value for name, value in next(batches).items() if name in ("input_ids", "position_ids", "labels")}
            for _ in range(micro_batches)
        ]
        for at in arguments.at:
            if at - 3 < step <= at:
                measured[at].append(measure(model, batch, arguments.layouts))
        items = sum(int(micro_batch["labels"][:, 1:].ne(-100).sum()) for micro_batch in batch)
        total = 0.0
        for micro_batch in batch:
            outputs = model(**micro_batch, num_items_in_batch=items, use_cache=False)
            outputs.loss.backward()
            total += float(outputs.lm_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.balancer.after_optimizer_step()
        losses.append(total)

    write_json(
        Path(arguments.output),
        {
            "arguments": vars(arguments) | {"data": "CORPUS", "output": "RESULT"},
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "tokens": steps * micro_batches * arguments.micro_batch_size * arguments.block_size,
            "lm_loss_end": mean(losses[-10:]),
            "steps": {str(step): found for step, found in measured.items()},
        },
    )
    print(json.dumps(measured[arguments.at[-1]][-1], indent=1))


if __name__ == "__main__":
    main()
