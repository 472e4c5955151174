"""The two models that are compared: `Qwen3MoeForCausalLM` of Transformers, and ours with its weights, converted."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from measuring import MICRO_BATCH, Shape
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from equipoise import MoEForCausalLM
from equipoise.hub import convert

OURS, UNBALANCED = "ours", "ours, balancing off"


def peer_name(implementation: str) -> str:
    """What the peer is called with such experts."""
    return f"Qwen3-MoE, {implementation}"


class Pair:
    """The two models in a folder, until it is closed.

    Args:
        shape: of both; there are no shared experts, which the peer does not have.
        seed: of the weights.
    """

    def __init__(self, shape: Shape, *, seed: int, dtype: str, device: str) -> None:
        shape.config()  # names the field that cannot be
        self.dtype, self.device = dtype, device
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        set_seed(seed)
        others = ("num_shared_experts", *MICRO_BATCH)
        sizes = {name: value for name, value in shape.shape().items() if name not in others}
        # No token is for padding: the peer would not learn its embedding.
        config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, max_position_embeddings=shape.sequence_length)
        Qwen3MoeForCausalLM(config).save_pretrained(path / "peer")
        convert(path / "peer", path / "ours")

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *raised: object) -> None:
        self.folder.cleanup()

    def ours(self, experts: str | None, attention: str | None, **balancing: Any) -> MoEForCausalLM:
        """Ours, with what it takes by itself where `None` is given."""
        given = {"experts_implementation": experts, "attn_implementation": attention}
        return self._load(MoEForCausalLM, "ours", **balancing, **{k: v for k, v in given.items() if v is not None})

    def peer(self, experts: str) -> Qwen3MoeForCausalLM:
        """The peer, with the attention that it takes by itself: torch's fused one."""
        return self._load(Qwen3MoeForCausalLM, "peer", experts_implementation=experts)

    def _load(self, kind: type[PreTrainedModel], name: str, **settings: Any) -> Any:
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        model = kind.from_pretrained(Path(self.folder.name) / name, dtype=dtype, **settings)
        # Off the file that they were read from, as weights are that have been trained.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return model.to(self.device)


def autocast(dtype: str, device: str) -> AbstractContextManager:
    """What a forward pass stands in."""
    return torch.autocast(device, dtype=torch.bfloat16) if dtype == "autocast" else nullcontext()


class Training:
    """A model in training: AdamW (fused), and a step as any loop makes it.

    Args:
        make: gives the model.
        skip_logits: have the forward pass not return logits, which it then need not make.
        learning_rate: 0 does all the work and leaves the weights, so that every step sends tokens the same ways.
    """

    def __init__(
        self, make: Callable[[], Any], *, dtype: str, device: str, skip_logits: bool, learning_rate: float = 0.0
    ) -> None:
        self.model = make().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, fused=True)
        self.dtype, self.device = dtype, device
        self.arguments: dict[str, Any] = {"use_cache": False} | ({"skip_logits": True} if skip_logits else {})
        self.parallel: Any = None
        """What is called in the model's place: a wrapper for several processes."""

    def backward(self, batch: Tensor) -> Tensor:
        """Forward and backward pass on token ids `[B, T]`; returns the loss, detached."""
        with autocast(self.dtype, self.device):
            loss = (self.parallel or self.model)(input_ids=batch, labels=batch, **self.arguments).loss
        loss.backward()
        return loss.detach()

    def step(self, batch: Tensor) -> Tensor:
        """An optimizer step; returns its loss."""
        loss = self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss
