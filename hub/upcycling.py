"""From a dense Llama, Qwen2 or Qwen3 checkpoint to `MoEForCausalLM`: experts copied or sliced from its MLPs.

Each dense MLP of width `I` is cut into `granularity` slices of width `F = I / granularity`. The first
`num_shared_experts` slices become the shared experts, which every token goes through. The others are routed, in
several copies: expert `e` is slice `e % R` of copy `e // R`, with `R = granularity - num_shared_experts`. The rows of
the router are the same for all slices of a copy, so that a token which selects `K = k R` experts selects `k` whole
copies. Their weights sum to 1 and each slice of a copy has the same, so `routed_scaling_factor = R` makes the sum over
slices that of the dense MLP. (Copies: Sparse Upcycling, arXiv 2212.05055. Slices with equal router rows: "virtual
groups", arXiv 2410.07524.)
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration import MoEConfig, ScoringFunction
from .conversion import Dtype, balancing, refuse, refuse_occupied, write_model
from .shards import Piece, PlannedTensor, Shape, Shards, ShardWriter, defects
from .stock_configs import ConfigReader, read_decoder
from .stock_weights import OUTPUT_BIAS, SELECTION_BIAS, may_be_left_out, own_tensor, own_tensors


def upcycle(
    source: str | Path,
    target: str | Path,
    *,
    num_experts: int,
    num_experts_per_tok: int,
    num_shared_experts: int = 0,
    granularity: int = 1,
    first_k_dense_replace: int = 0,
    scoring_func: ScoringFunction = "softmax",
    noise: float = 0.0,
    seed: int = 0,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    config_overrides: Mapping[str, Any] | None = None,
    ignore_config_fields: Iterable[str] = (),
) -> list[str]:
    """Make a Mixture-of-Experts model of a dense one, with the same logits to begin with.

    Args:
        source: folder of a `llama`, `qwen2` or `qwen3` model, in safetensors.
        target: folder to be written; there is nothing there, or an empty folder. It is there when all of it is.
        num_experts: routed experts, `E`; a multiple of the routed slices.
        num_experts_per_tok: experts selected for each token, `K`; a multiple of the routed slices.
        num_shared_experts: slices that every token goes through.
        granularity: slices that each dense MLP is cut into; 1 copies it whole.
        first_k_dense_replace: first layers that stay dense.
        scoring_func: how router logits become scores.
        noise: standard deviation of what is added to the weights of each routed expert, in units of the standard
            deviation of those weights. Above 0 the experts differ from the start, and the logits from the dense ones.
        seed: of the routers, drawn from a normal distribution with the model's `initializer_range`, and of the noise.
        dtype: of the weights written; `None` keeps each one's own. The selection bias is always in fp32.
        max_shard_size: of a file.
        config_overrides: fields of [`BalancingFields`].
        ignore_config_fields: fields of the source's config.json that are unknown here and known to you to change
            nothing.

    Returns:
        What is worth knowing about the result, a sentence each.

    Raises:
        ValueError: the logits would not be the same, or the model cannot be made: all reasons. Nothing has been
            written then.
        huggingface_hub.errors.StrictDataclassError: a value is impossible; the message names the field.
    """
    source, target = Path(source), Path(target)
    refuse_occupied(target)
    reader = ConfigReader(source, _READERS, ignore_config_fields)
    dense = _READERS[reader.model_type](reader)
    width, routed = dense["intermediate_size"], granularity - num_shared_experts
    require, must = reader.require, f"be at least 1 and divide intermediate_size ({width})"
    require(granularity >= 1 and width % granularity == 0, "granularity", must, granularity)
    must = f"be at least 0 and below granularity ({granularity}): some slices are routed"
    require(0 <= num_shared_experts < granularity, "num_shared_experts", must, num_shared_experts)
    must = f"be a multiple of granularity - num_shared_experts ({routed}): a token selects whole copies"
    for name, number in (("num_experts", num_experts), ("num_experts_per_tok", num_experts_per_tok)):
        require(routed < 1 or number % routed == 0, name, must, number)
    require(0 <= noise < math.inf, "noise", "be at least 0 and finite", noise)
    overrides = balancing(config_overrides)
    refuse(source, reader.close())
    values = {
        "first_k_dense_replace": first_k_dense_replace,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "num_shared_experts": num_shared_experts,
        "moe_intermediate_size": width // granularity,
        "scoring_func": scoring_func,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(routed),
    }
    config = MoEConfig(**dense | values | overrides)
    shards = Shards(source)
    planned = [
        _planned(name, shape, config, routed, reader.model_type, noise, _generator(seed, name))
        for name, shape in own_tensors(config).items()
    ]
    refuse(source, defects(shards, planned, may_be_left_out(config, shards)))
    writer = ShardWriter(planned, shards, dtype=dtype and getattr(torch, dtype), max_shard_size=max_shard_size)
    write_model(source, target, config, writer)
    if num_experts_per_tok == 1:
        reader.notes.append("num_experts_per_tok is 1: its weight is 1, so only balancing trains the routers")
    if noise:
        reader.notes.append(f"noise is {noise}: the logits are not those of the dense model")
    return reader.notes


# --- The dense models ---


def _read_llama(dense: ConfigReader) -> dict[str, Any]:
    dense.require(not dense["mlp_bias"], "mlp_bias", "be false: experts have no biases")
    return {**read_decoder(dense), "attention_bias": dense["attention_bias"]}


def _read_qwen2(dense: ConfigReader) -> dict[str, Any]:
    # Its queries, keys and values always have a bias, its output has none.
    return {**read_decoder(dense, windowed=_windowed(dense)), "attention_bias": True}


def _read_qwen3(dense: ConfigReader) -> dict[str, Any]:
    decoder = read_decoder(dense, windowed=_windowed(dense))
    return {**decoder, "attention_bias": dense["attention_bias"], "use_qk_norm": True}


def _windowed(dense: ConfigReader) -> bool:
    types = set(dense["layer_types"])
    dense.require(types <= {"full_attention", "sliding_attention"}, "layer_types", "be full attention")
    return "sliding_attention" in types


_READERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "llama": _read_llama,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
}


# --- The weights ---


def _planned(
    name: str,
    shape: Shape,
    config: MoEConfig,
    routed: int,
    model_type: str,
    noise: float,
    generator: torch.Generator,
) -> PlannedTensor:
    """One of our tensors, made from those of a dense checkpoint.

    Args:
        routed: slices of an MLP that are routed, `R`.
    """
    mlp = name.split("mlp.")[0] + "mlp."
    dense_width, width, hidden = config.intermediate_size, config.moe_intermediate_size, config.hidden_size
    wide = (dense_width, hidden)

    def rows(expert: int) -> slice:
        first = (config.num_shared_experts + expert % routed) * width
        return slice(first, first + width)

    if name.endswith("mlp.experts.gate_up_proj"):
        pieces = [
            Piece(f"{mlp}{half}_proj.weight", wide, (rows(expert),), (expert, place))
            for expert in range(config.num_experts)
            for half, place in (("gate", slice(0, width)), ("up", slice(width, 2 * width)))
        ]
        return _noisy(own_tensor(name, shape, tuple(pieces)), noise, generator)
    if name.endswith("mlp.experts.down_proj"):
        pieces = [
            Piece(f"{mlp}down_proj.weight", wide[::-1], (slice(None), rows(expert)), (expert,))
            for expert in range(config.num_experts)
        ]
        return _noisy(own_tensor(name, shape, tuple(pieces)), noise, generator)
    if "mlp.shared_experts." in name:
        source = name.replace("shared_experts.", "")
        shared = slice(0, config.num_shared_experts * width)
        if name.endswith("down_proj.weight"):
            return own_tensor(name, shape, (Piece(source, wide[::-1], (slice(None), shared)),))
        return own_tensor(name, shape, (Piece(source, wide, (shared,)),))
    if name.endswith("mlp.gate.weight"):
        draw = partial(_draw_router, routed=routed, std=config.initializer_range, generator=generator)
        return replace(own_tensor(name, shape), finish=draw)
    if name.endswith(SELECTION_BIAS) or (model_type == "qwen2" and name.endswith(OUTPUT_BIAS)):
        return own_tensor(name, shape)
    return own_tensor(name, shape, (Piece(name, shape),))


def _draw_router(weight: Tensor, routed: int, std: float, generator: torch.Generator) -> None:
    """Fill a router `[E, D]`: a random row for each copy, repeated for its slices."""
    copies = torch.randn(len(weight) // routed, weight.shape[1], generator=generator) * std
    weight.copy_(copies.repeat_interleave(routed, dim=0))


def _noisy(planned: PlannedTensor, noise: float, generator: torch.Generator) -> PlannedTensor:
    """The same tensor with noise on each piece, in units of the piece's own standard deviation."""

    def add(tensor: Tensor) -> None:
        for piece in planned.pieces:
            values = tensor[piece.place].float()
            values += noise * values.std() * torch.randn(values.shape, generator=generator)
            tensor[piece.place] = values.to(tensor.dtype)

    return replace(planned, finish=add) if noise else planned


def _generator(seed: int, name: str) -> torch.Generator:
    """Each tensor's own: what is drawn depends on no order, and on no other tensor."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
