"""Stock models on real text under `transformers.Trainer`: their own balancing against this package's.

A small random Qwen3-MoE with Transformers' auxiliary loss, and with the global batch's at the same coefficient and at
the one that weighs as much; a small random DeepSeek-V3 as Transformers trains it, whose biases never move, and with
`loss_free` and `global_batch`. Held-out MaxVio and cross-entropy before, during and after; MaxVio of each global batch
and of its micro-batches.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 benchmarks/stock_fine_tuning.py --data CORPUS \
    --output RESULT.json --figure FIGURE.png
"""

import subprocess
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from equipoise import BalancingCallback
from equipoise.balancing import dead_experts, max_vio
from equipoise.data import evaluation_windows, read_documents, train_tokenizer, write_json

EXPERTS, CHOSEN, LAYERS = 16, 2, 4
COEFFICIENT = 0.01
WORLD_SIZE, ACCUMULATION = 2, 2
WEIGHT = WORLD_SIZE * ACCUMULATION * CHOSEN
"""What Transformers' loss weighs more under Trainer: it adds up over ranks and micro-steps, and its load sums to K."""

QWEN, DEEPSEEK = "Qwen3-MoE", "DeepSeek-V3"
ARMS: dict[tuple[str, str], dict[str, Any] | None] = {
    # None: nothing of ours.
    (QWEN, f"stock loss, {COEFFICIENT:g}"): None,
    (QWEN, f"global_batch, {COEFFICIENT:g}"): {
        "balancing_mode": "global_batch",
        "router_aux_loss_coef": COEFFICIENT,
    },
    (QWEN, f"global_batch, {COEFFICIENT * WEIGHT:g}"): {
        "balancing_mode": "global_batch",
        "router_aux_loss_coef": COEFFICIENT * WEIGHT,
    },
    (DEEPSEEK, "stock"): None,
    (DEEPSEEK, "loss_free, 0.01"): {"balancing_mode": "loss_free", "bias_update_rate": 0.01},
    (DEEPSEEK, f"global_batch, {COEFFICIENT:g}"): {
        "balancing_mode": "global_batch",
        "router_aux_loss_coef": COEFFICIENT,
    },
}


@dataclass
class Arguments:
    """What is trained, on what, and how long."""

    data: str = field(metadata={"help": "Folder with one sub-folder per domain."})
    output: str = field(metadata={"help": "JSON file to write."})
    figure: str = field(metadata={"help": "PNG file to write."})
    seeds: int = field(default=2, metadata={"help": "How many seeds, of weights and data order."})
    steps: int = field(default=150, metadata={"help": "Optimizer steps."})
    evaluation_steps: int = field(default=30, metadata={"help": "Optimizer steps between two evaluations."})
    micro_batch_size: int = field(default=4, metadata={"help": "Windows of one process in one forward pass."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a window."})
    held_out_windows: int = field(default=12, metadata={"help": "Held-out windows of each domain."})
    vocab_size: int = field(default=2048, metadata={"help": "Entries of the tokenizer."})
    train_bytes_per_domain: int = field(default=250_000, metadata={"help": "Training text of each domain."})


def read_windows(arguments: Arguments) -> tuple[Dataset, Dataset, PreTrainedTokenizerBase]:
    """Windows of exactly `block_size` tokens, to train on and held out."""
    documents = read_documents(
        arguments.data,
        max_train_bytes_per_domain=arguments.train_bytes_per_domain,
        max_validation_bytes_per_domain=60_000,
    )
    tokenizer = train_tokenizer(documents["train"]["text"][:], arguments.vocab_size)
    whole = []
    for split in ("train", "validation"):
        windows = evaluation_windows(documents[split], tokenizer, arguments.block_size)
        whole.append(windows.filter(lambda ids: len(ids) == arguments.block_size, input_columns="input_ids"))
    train, held_out = whole
    names = held_out["domain"][:]
    rows = [
        row
        for domain in sorted(set(names))
        for row in [row for row, name in enumerate(names) if name == domain][: arguments.held_out_windows]
    ]
    return train.select_columns(["input_ids", "labels"]), held_out.select(rows), tokenizer


def build(family: str, vocab_size: int, stock_loss: bool) -> PreTrainedModel:
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_experts_per_tok": CHOSEN,
        "max_position_embeddings": 512,
        "use_cache": False,
    }
    if family == QWEN:
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                num_hidden_layers=LAYERS,
                num_key_value_heads=4,
                head_dim=32,
                num_experts=EXPERTS,
                norm_topk_prob=True,
                output_router_logits=stock_loss,
                router_aux_loss_coef=COEFFICIENT,
            )
        )
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **common,
            num_hidden_layers=LAYERS + 1,
            first_k_dense_replace=1,
            num_key_value_heads=4,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=32,
        )
    )


class Loads:
    """Counts what the routers select, pass by pass; windows are whole, so every position is a token."""

    def __init__(self, model: nn.Module) -> None:
        routers = [module for module in model.modules() if type(module).__name__.lower().endswith("router")]
        self.micro_batches: list[Tensor] = []
        """One `[L, E]` for each forward pass."""
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda _, __, output, layer=layer: self._count(layer, output[2]))

    def _count(self, layer: int, experts: Tensor) -> None:
        if layer == 0:
            self.micro_batches.append(torch.zeros(LAYERS, EXPERTS, dtype=torch.long))
        self.micro_batches[-1][layer] = experts.flatten().bincount(minlength=EXPERTS)

    def take(self) -> Tensor:
        """`[M, L, E]` of the forward passes since the last call."""
        taken, self.micro_batches = torch.stack(self.micro_batches), []
        return taken


class Curves(TrainerCallback):
    """MaxVio of each step, and of the held-out text every few; means over layers."""

    def __init__(self, model: nn.Module, held_out: Dataset, every: int) -> None:
        self.model, self.held_out, self.every = model, held_out, every
        self.loads = Loads(model)
        self.max_vio_batch: list[float] = []
        self.max_vio_micro: list[float] = []
        self.evaluations: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loads = self.loads.take()
        micro = reduce(max_vio(loads).mean(), "mean")
        batch = max_vio(reduce(loads.sum(0), "sum")).mean()
        self.max_vio_micro.append(round(float(micro), 4))
        self.max_vio_batch.append(round(float(batch), 4))
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.evaluate(state.global_step)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        state = PartialState(cpu=True)
        self.model.eval()
        self.loads.micro_batches = []
        loss = torch.zeros(2)
        rows = self.held_out.with_format("torch")
        for start in range(16 * state.process_index, len(rows), 16 * state.num_processes):
            batch = rows[start : start + 16]
            labels = batch["labels"]
            tokens = int(labels[:, 1:].ne(-100).sum())
            outputs = self.model(input_ids=batch["input_ids"], labels=labels)
            # In evaluation Transformers adds its auxiliary loss to `loss` as well.
            aux = getattr(outputs, "aux_loss", None)
            cross_entropy = outputs.loss if aux is None else outputs.loss - COEFFICIENT * aux
            loss += torch.tensor([float(cross_entropy) * tokens, tokens])
        self.model.train()
        load = reduce(self.loads.take().sum(0), "sum")
        loss = reduce(loss, "sum")
        self.evaluations.append(
            {
                "step": step,
                "max_vio_global": round(float(max_vio(load).mean()), 4),
                "max_vio_global_worst": round(float(max_vio(load).max()), 4),
                "dead_experts": int(dead_experts(load).sum()),
                "cross_entropy": round(float(loss[0] / loss[1]), 4),
            }
        )


def train(
    arm: tuple[str, str], seed: int, arguments: Arguments, windows: Dataset, held_out: Dataset, vocab_size: int
) -> dict[str, Any]:
    settings = ARMS[arm]
    set_seed(seed)
    model = build(arm[0], vocab_size, stock_loss=settings is None)
    curves = Curves(model, held_out, arguments.evaluation_steps)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tempfile.gettempdir(),  # nothing is saved
            use_cpu=True,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.micro_batch_size,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.1,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        ),
        train_dataset=windows,
        callbacks=[curves] if settings is None else [BalancingCallback(**settings), curves],
    )
    trainer.train()
    late = slice(-max(1, arguments.steps // 10), None)
    return {
        "seed": seed,
        "before": curves.evaluations[0],
        "after": curves.evaluations[-1],
        "max_vio_batch_late": round(mean(curves.max_vio_batch[late]), 4),
        "max_vio_micro_late": round(mean(curves.max_vio_micro[late]), 4),
        "evaluations": curves.evaluations,
        "max_vio_batch": curves.max_vio_batch,
        "max_vio_micro": curves.max_vio_micro,
    }


def draw(results: dict[str, dict[str, list[dict[str, Any]]]]) -> Figure:
    """Held-out MaxVio and cross-entropy over training; a line a seed."""
    figure, axes = plt.subplots(2, len(results), figsize=(10, 6.5), sharex=True, sharey="row", layout="constrained")
    rows = {"max_vio_global": "MaxVio, held-out text", "cross_entropy": "cross-entropy, held-out text (nats)"}
    for column, (family, arms) in enumerate(results.items()):
        for row, (name, title) in enumerate(rows.items()):
            axis = axes[row, column]
            for color, (arm, runs) in zip(("#a03623", "#2a6fb0", "#17824e"), arms.items(), strict=True):
                for number, run in enumerate(runs):
                    steps = [each["step"] for each in run["evaluations"]]
                    values = [each[name] for each in run["evaluations"]]
                    axis.plot(steps, values, color=color, lw=1.6, label=arm if number == 0 else None)
            axis.grid(alpha=0.25)
            if column == 0:
                axis.set_ylabel(title)
        axes[0, column].set_title(family)
        axes[0, column].legend(frameon=False)
        axes[1, column].set_xlabel("optimizer step")
    axes[0, 0].set_ylim(bottom=0)
    return figure


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    state = PartialState(cpu=True)
    if state.num_processes != WORLD_SIZE:
        raise SystemExit(f"error: torchrun must start {WORLD_SIZE} processes; got {state.num_processes}")
    with state.main_process_first():
        windows, held_out, tokenizer = read_windows(arguments)
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {QWEN: {}, DEEPSEEK: {}}
    for seed in range(arguments.seeds):
        for arm in ARMS:
            run = train(arm, seed, arguments, windows, held_out, len(tokenizer))
            family, name = arm
            results[family].setdefault(name, []).append(run)
            if state.is_main_process:
                print(f"{family}, {name}, seed {seed}: {run['before']} -> {run['after']}", flush=True)
                write_json(
                    Path(arguments.output),
                    {
                        "command": "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 "
                        "benchmarks/stock_fine_tuning.py --data CORPUS --output RESULT.json --figure FIGURE.png",
                        "arguments": vars(arguments) | {"data": "CORPUS", "output": "RESULT", "figure": "FIGURE"},
                        "commit": commit,
                        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
                        "parameters": {
                            name: sum(weight.numel() for weight in build(name, len(tokenizer), False).parameters())
                            for name in results
                        },
                        "windows": len(windows),
                        "held_out_windows": len(held_out),
                        "tokens": arguments.steps
                        * WORLD_SIZE
                        * ACCUMULATION
                        * arguments.micro_batch_size
                        * arguments.block_size,
                        "runs": results,
                    },
                )
    if state.is_main_process:
        draw(results).savefig(arguments.figure, dpi=110)


if __name__ == "__main__":
    main()
