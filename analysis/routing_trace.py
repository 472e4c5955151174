"""Routing trace: which experts a model selects on held-out text, window by window.

Shapes: B sequences, T positions, L MoE layers, E experts, K experts per token; W windows.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..balancing import count_selections
from ..data import evaluation_windows, padded_batches


@dataclass(frozen=True)
class RoutingTrace:
    """Integer counts of the experts selected in each window; each window is part of one document of one domain."""

    load: Tensor
    """`[W, L, E]` int32: tokens of the window that selected the expert."""
    num_tokens: Tensor
    """`[W]` int64: tokens in the window; padding is not counted."""
    domain: Tensor
    """`[W]` int64: the window's domain, an index into `domains`."""
    document: Tensor
    """`[W]` int64: the document that the window was cut from."""
    domains: tuple[str, ...]
    """Names of the domains, in alphabetical order; each has at least one window."""

    @property
    def num_experts_per_tok(self) -> int:
        return int(self.load[0, 0].sum() // self.num_tokens[0])

    def save(self, path: str | Path) -> None:
        """Writes the trace as one `.safetensors` file."""
        tensors = {"load": self.load, "num_tokens": self.num_tokens, "domain": self.domain, "document": self.document}
        save_file(tensors, path, metadata={"domains": json.dumps(self.domains)})

    @classmethod
    def load_file(cls, path: str | Path) -> "RoutingTrace":
        """Reads what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return cls(**tensors, domains=tuple(json.loads(file.metadata()["domains"])))


@torch.no_grad()
def trace_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    *,
    block_size: int = 512,
    batch_size: int = 16,
) -> RoutingTrace:
    """Runs `model` over `documents` and counts the experts that it selects.

    Args:
        model: a causal language model whose output holds `selected_experts`, one int64 `[B*T, K]` per MoE layer.
        documents: columns `text` and `domain`.
        block_size: the longest window, in tokens.
        batch_size: windows in one forward pass; padding that it brings is not counted.

    Raises:
        ValueError: `documents` hold no text, a size is too small, or the model reports no selected experts.
    """
    windows = evaluation_windows(documents, tokenizer, block_size)
    names = windows["domain"][:]
    domains = sorted(set(names))
    load: Tensor | None = None
    num_tokens = torch.zeros(len(windows), dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for rows, batch in padded_batches(windows, batch_size, "tracing"):
            mask = batch["attention_mask"].to(model.device)
            output = model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=mask,
                output_router_logits=True,
                use_cache=False,
                logits_to_keep=1,  # the routing is all that is read
            )
            selected = getattr(output, "selected_experts", None)
            if not selected:
                raise ValueError(f"model must return selected_experts; got none from {type(model).__name__}")
            counts = window_load(selected, model.config.num_experts, mask.bool()).int().cpu()
            if load is None:
                load = torch.zeros(len(windows), *counts.shape[1:], dtype=torch.int32)
            load[rows] = counts
            num_tokens[rows] = batch["attention_mask"].sum(-1)
    finally:
        model.train(was_training)

    assert load is not None
    index = {name: position for position, name in enumerate(domains)}
    return RoutingTrace(
        load=load,
        num_tokens=num_tokens,
        domain=torch.tensor([index[name] for name in names]),
        document=torch.tensor(windows["document"][:]),
        domains=tuple(domains),
    )


def window_load(selected_experts: tuple[Tensor, ...], num_experts: int, real: Tensor) -> Tensor:
    """Load of each sequence: L tensors [B*T, K] and `real` [B, T], true for tokens -> [B, L, E] int64."""
    batch_size, length = real.shape
    sequence = torch.arange(batch_size, device=real.device).repeat_interleave(length)[:, None]
    layers = [
        # Expert e of sequence b is number b*E + e, so that one count serves the whole batch.
        count_selections(experts + sequence * num_experts, batch_size * num_experts, real.flatten())
        for experts in selected_experts
    ]
    return torch.stack(layers).view(len(layers), batch_size, num_experts).transpose(0, 1)
