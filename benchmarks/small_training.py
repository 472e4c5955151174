"""A small training run in one process, for benchmarks that look inside: data, model, optimizer, one step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, set_seed

from equipoise import MoEForCausalLM
from equipoise.data import MicroBatchSampler, pack_documents, read_documents, sample_texts, train_tokenizer


@dataclass
class SmallTraining:
    """What is trained, and on what."""

    data: str = field(metadata={"help": "Folder with one sub-folder per domain."})
    output: str = field(metadata={"help": "JSON file to write."})
    preset: str = field(default="hub_configs/tiny", metadata={"help": "Folder with a config.json."})
    micro_batch_domains: str = field(default="mixed", metadata={"help": "mixed or single."})
    micro_batch_size: int = field(default=2, metadata={"help": "Blocks in a micro-batch."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a block."})
    max_train_bytes_per_domain: int = field(default=3_000_000, metadata={"help": "Training text of each domain."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW, after 50 steps of warm-up."})
    seed: int = field(default=0, metadata={"help": "Of weights and data order."})

    def blocks(self) -> tuple[Dataset, Dataset]:
        """Packed blocks, of training and of held-out text."""
        documents = read_documents(self.data, max_train_bytes_per_domain=self.max_train_bytes_per_domain)
        vocab_size = AutoConfig.from_pretrained(self.preset).vocab_size
        tokenizer = train_tokenizer(sample_texts(documents["train"]), vocab_size)
        domains = sorted(documents["train"].unique("domain"))
        train, held_out = (
            pack_documents(documents[split], tokenizer, self.block_size, domains=domains, seed=self.seed)
            for split in ("train", "validation")
        )
        return train, held_out

    def batches(self, blocks: Dataset, steps: int, accumulation: int) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each optimizer step."""
        sampler = MicroBatchSampler(
            blocks["domain"],
            self.micro_batch_size,
            steps * accumulation,
            seed=self.seed,
            micro_batch_domains=self.micro_batch_domains,  # type: ignore[arg-type]  # it refuses anything else
        )
        loader = iter(DataLoader(blocks.with_format("torch"), batch_sampler=sampler))
        for _ in range(steps):
            yield [inputs(next(loader)) for _ in range(accumulation)]

    def model(self, **changes: Any) -> MoEForCausalLM:
        """The preset's model with fields of its configuration changed."""
        set_seed(self.seed)
        return MoEForCausalLM(AutoConfig.from_pretrained(self.preset, **changes)).train()

    def optimizer(self, model: MoEForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """AdamW, and its warm-up."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))


def inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What of a batch of blocks the model takes."""
    return {name: batch[name] for name in ("input_ids", "position_ids", "labels")}


def step(
    model: MoEForCausalLM,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch: list[dict[str, Tensor]],
) -> float:
    """One optimizer step; returns the cross-entropy in nats per token."""
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
    return total
