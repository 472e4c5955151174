"""MaxVio under each bias update rule, over a training run on real text.

The same model, data and seed for each rule; micro-batches of mixed domains. Every step gives the MaxVio of its global
batch, every 25th the MaxVio over held-out text (*global*). About 14 minutes a rule on one core with the defaults.

python benchmarks/bias_updates.py --data CORPUS --output RESULT.json
"""

from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from small_training import SmallTraining, step
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from equipoise import MoEForCausalLM
from equipoise.balancing import count_selections, dead_experts, max_vio
from equipoise.data import write_json

# Rates for hundreds of steps: at the papers' 0.001 a bias needs a thousand to cross the scores.
RUNS: dict[str, dict[str, Any]] = {
    "sign": {"bias_update_rate": 0.01},
    "centred_sign": {"bias_update_rate": 0.01},
    "sign, rate x 0.99 a step": {"bias_update_rate": 0.02, "bias_update_rate_decay": 0.99},
    "proportional": {"bias_update_rate": 0.03},
    "tanh_momentum": {"bias_update_rate": 0.01},
    "quantile": {"bias_update_rate": 0.2},
    "quantile, rate 1": {"bias_update_rate": 1.0},
}


@dataclass
class Arguments(SmallTraining):
    """What is trained and measured."""

    accumulation: int = field(default=4, metadata={"help": "Micro-batches in an optimizer step."})
    steps: int = field(default=500, metadata={"help": "Optimizer steps."})
    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": "Which of the runs to make."})
    held_out_blocks: int = field(default=96, metadata={"help": "Blocks of held-out text."})


def held_out_load(model: MoEForCausalLM, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Selections `[L, E]` over the held-out text."""
    model.eval()
    load = torch.zeros(model.config.num_moe_layers, model.config.num_experts, dtype=torch.long)
    with torch.no_grad():
        for batch in batches:
            experts = model(**batch, output_router_logits=True, use_cache=False, logits_to_keep=1, labels=None)
            load += count_selections(torch.stack(experts.selected_experts), model.config.num_experts)
    model.train()
    return load


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for name in arguments.runs:
        if name not in RUNS:
            raise SystemExit(f"runs must be among {', '.join(RUNS)}; got {name}")
    packed, held_out = arguments.packed()
    count = min(arguments.held_out_blocks, sum(map(len, held_out.blocks.values())))
    (evaluation,) = replace(arguments, micro_batch_size=1, micro_batch_domains="mixed").batches(held_out, 1, count)
    for batch in evaluation:
        del batch["labels"]
    results = {}
    for name in arguments.runs:
        rule = name.split(",")[0]
        model = arguments.model(
            balancing_mode="loss_free", scoring_func="sigmoid", bias_update_rule=rule, **RUNS[name]
        )
        optimizer, schedule = arguments.optimizer(model)
        batch_vio, global_vio, losses = [], {}, []
        batches = arguments.batches(packed, arguments.steps, arguments.accumulation)
        for number, batch in enumerate(tqdm(batches, desc=name, total=arguments.steps, unit="step"), start=1):
            losses.append(step(model, optimizer, schedule, batch))
            metrics = model.balancer.metrics()
            batch_vio.append(metrics["max_vio_batch"].tolist())
            if number % 25 == 0 or number == arguments.steps:
                load = held_out_load(model, evaluation)
                global_vio[number] = max_vio(load).tolist()
        results[name] = RUNS[name] | {
            "max_vio_batch": batch_vio,
            "max_vio_global": global_vio,
            "dead_experts": dead_experts(load).tolist(),
            "bias_range": metrics["bias_range"].tolist(),
            "lm_loss_end": mean(losses[-20:]),
        }
        write_json(
            Path(arguments.output),
            {
                "arguments": vars(arguments) | {"data": "CORPUS", "output": "RESULT"},
                "versions": {name: version(name) for name in ("torch", "transformers")},
                "tokens": arguments.steps * arguments.accumulation * arguments.micro_batch_size * arguments.block_size,
                "runs": results,
            },
        )


if __name__ == "__main__":
    main()
