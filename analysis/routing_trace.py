"""Routing trace: which experts a model selects on held-out text, window by window.

Shapes: B sequences, T positions, L MoE layers, E experts, K experts per token; W windows.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..balancing import count_selections
from ..data import evaluation_windows, padded_batches
from ..integrations import RoutingRecorder
from .architecture import Architecture


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


@dataclass(frozen=True)
class RoutedBatch:
    """What one forward pass over some windows routed, on the model's device."""

    rows: Tensor
    """`[B]` int64, on the CPU: which windows these are."""
    input_ids: Tensor
    """`[B, T]`"""
    mask: Tensor
    """`[B, T]`, true for tokens."""
    router_logits: tuple[Tensor, ...]
    """L of `[B*T, E]`."""
    selected_experts: tuple[Tensor, ...]
    """L of int64 `[B*T, K]`."""
    scoring_func: str
    """`softmax` or `sigmoid`."""

    def scores(self, layer: int) -> Tensor:
        """One layer's scores over their sum: `[B*T, E]`, rows sum to 1; without what the selection bias adds."""
        logits = self.router_logits[layer].float()
        if self.scoring_func == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


class Observer(Protocol):
    """Sees every batch of a trace once, and keeps of it what it counts."""

    def observe(self, batch: RoutedBatch) -> None: ...


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
        model: a causal language model with routers, ours or any of Transformers.
        documents: columns `text` and `domain`.
        block_size: the longest window, in tokens.
        batch_size: windows in one forward pass; padding that it brings is not counted.

    Raises:
        ValueError: `documents` hold no text, a size is too small, or the model has no routers.
    """
    return trace_windows(model, evaluation_windows(documents, tokenizer, block_size), batch_size=batch_size)


def trace_windows(
    model: PreTrainedModel,
    windows: Dataset,
    *,
    batch_size: int = 16,
    observers: Sequence[Observer] = (),
    description: str = "tracing",
) -> RoutingTrace:
    """`trace_routing` of windows from `evaluation_windows`, with others who look on in the same pass.

    Raises:
        ValueError: as there.
    """
    names = windows["domain"][:]
    domains = sorted(set(names))
    shape = Architecture.of(model)
    load = torch.zeros(len(windows), shape.num_moe_layers, shape.num_experts, dtype=torch.int32)
    num_tokens = torch.zeros(len(windows), dtype=torch.int64)
    for batch in routed_batches(model, windows, batch_size=batch_size, description=description):
        load[batch.rows] = window_load(batch.selected_experts, shape.num_experts, batch.mask).int().cpu()
        num_tokens[batch.rows] = batch.mask.sum(-1).cpu()
        for observer in observers:
            observer.observe(batch)

    index = {name: position for position, name in enumerate(domains)}
    return RoutingTrace(
        load=load,
        num_tokens=num_tokens,
        domain=torch.tensor([index[name] for name in names]),
        document=torch.tensor(windows["document"][:]),
        domains=tuple(domains),
    )


@torch.no_grad()
def routed_batches(
    model: PreTrainedModel, windows: Dataset, *, batch_size: int = 16, description: str = "tracing"
) -> Iterator[RoutedBatch]:
    """Runs `model` over windows in evaluation mode, and yields what each batch routed.

    Raises:
        ValueError: there are no windows, `batch_size` is too small, or the model has no routers.
    """
    scoring_func = Architecture.of(model).scoring_func
    recorder = RoutingRecorder(model)
    with evaluating(model):
        try:
            for rows, batch in padded_batches(windows, batch_size, description):
                input_ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
                with recorder.forward() as routing:
                    # The routing is all that is read: the head need not run.
                    model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False)
                router_logits, selected_experts = routing.layers(input_ids.numel())
                yield RoutedBatch(
                    rows=rows,
                    input_ids=input_ids,
                    mask=mask.bool(),
                    router_logits=tuple(router_logits),
                    selected_experts=tuple(selected_experts),
                    scoring_func=scoring_func,
                )
        finally:
            recorder.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
