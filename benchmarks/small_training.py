"""A small training run in one process, for benchmarks that look inside: data, model, optimizer, one step."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, set_seed

from equipoise import MoEForCausalLM
from equipoise.configuration import DataSettings
from equipoise.data import Corpus, MicroBatches, PackedCorpus, open_corpus, pack, train_tokenizer


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

    def packed(self) -> tuple[PackedCorpus, PackedCorpus]:
        """Packed blocks, of training and of held-out text."""
        settings = DataSettings(data=self.data, max_train_bytes_per_domain=self.max_train_bytes_per_domain)
        corpus = open_corpus(settings, self.seed)
        tokenizer = train_tokenizer(corpus.sample_texts(), AutoConfig.from_pretrained(self.preset).vocab_size)
        held_out = {
            name: replace(domain, train=domain.held_out, key=domain.held_out_key, train_bytes=domain.held_out_bytes)
            for name, domain in corpus.documents.items()
        }
        train, evaluation = (
            pack(part, tokenizer, self.block_size, self.seed)
            for part in (corpus, Corpus(held_out, {}, None, {}, self.seed))
        )
        return train, evaluation

    def batches(self, packed: PackedCorpus, steps: int, accumulation: int) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each optimizer step."""
        batches = MicroBatches(
            packed,
            micro_batch_size=self.micro_batch_size,
            micro_batches_per_step=accumulation,
            seed=self.seed,
            micro_batch_domains=self.micro_batch_domains,  # type: ignore[arg-type]  # it refuses anything else
        )
        for micro_batches in islice(batches.steps(), steps):
            yield [inputs(batch) for batch in micro_batches]

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
