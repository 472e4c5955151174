"""Where each tensor of [`MoEForCausalLM`] stands in a stock checkpoint, read in either direction.

Stock checkpoints hold a tensor for each expert and projection, the layout that inference engines read too;
Transformers 5 fuses them at load. Some were saved fused, under the names that the models have here.
"""

import re
from dataclasses import dataclass

import torch

from ..configuration import MoEConfig
from ..modeling import MoEForCausalLM
from .shards import Index, Piece, PlannedTensor, Shape, Shards, some

EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

# An expert's gate, up and down projection.
_EXPERT_NAMES = {
    "qwen3_moe": tuple(f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")),
    "glm4_moe": tuple(f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")),
    "mixtral": tuple(f"block_sparse_moe.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2")),
}
_RENAMED = {"mixtral": {"mlp.gate.weight": "block_sparse_moe.gate.weight"}}
SELECTION_BIAS, OUTPUT_BIAS = "mlp.gate.e_score_correction_bias", "self_attn.o_proj.bias"
_LACKING = {"qwen3_moe": SELECTION_BIAS, "mixtral": SELECTION_BIAS, "glm4_moe": OUTPUT_BIAS}


@dataclass(frozen=True)
class StockTensor:
    """A tensor of a stock checkpoint, and the part of one of ours that it is."""

    name: str
    shape: Shape
    part: Index = ()


def own_tensors(config: MoEConfig) -> dict[str, Shape]:
    """Names and shapes of what `MoEForCausalLM.save_pretrained` writes."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    return shapes


def stock_tensors(name: str, shape: Shape, model_type: str) -> list[StockTensor]:
    """What a tensor of ours is in a stock checkpoint: another, one for each expert, or none."""
    layer = _LAYER.match(name)
    prefix = layer.group() if layer else ""
    inner = name.removeprefix(prefix)
    gate, up, down = (prefix + expert for expert in _EXPERT_NAMES[model_type])
    if inner == "mlp.experts.gate_up_proj":
        width = shape[1] // 2
        halves = ((gate, slice(0, width)), (up, slice(width, 2 * width)))
        experts = range(shape[0])
        return [StockTensor(half.format(e), (width, shape[2]), (e, rows)) for e in experts for half, rows in halves]
    if inner == "mlp.experts.down_proj":
        return [StockTensor(down.format(e), shape[1:], (e,)) for e in range(shape[0])]
    if inner == _LACKING[model_type]:
        return []
    return [StockTensor(prefix + _RENAMED.get(model_type, {}).get(inner, inner), shape)]


def plan_own(config: MoEConfig, shards: Shards, model_type: str) -> list[PlannedTensor]:
    """Our tensors, made from those of a stock checkpoint."""
    planned = []
    for name, shape in own_tensors(config).items():
        parts = stock_tensors(name, shape, model_type)
        if parts and name in shards.shapes:  # so named there too, or saved fused
            parts = [StockTensor(name, shape)]
        pieces = tuple(Piece(part.name, part.shape, place=part.part) for part in parts)
        planned.append(own_tensor(name, shape, pieces))
    return planned


def own_tensor(name: str, shape: Shape, pieces: tuple[Piece, ...] = ()) -> PlannedTensor:
    """A tensor of ours: zeros without pieces; a selection bias is in fp32."""
    dtype = torch.float32 if name.endswith(SELECTION_BIAS) else None
    return PlannedTensor(name, shape, pieces, dtype=dtype, like=EMBEDDING)


def plan_stock(config: MoEConfig, model_type: str) -> list[PlannedTensor]:
    """The tensors of a stock checkpoint, made from ours."""
    planned = []
    for name, shape in own_tensors(config).items():
        dtype = torch.float32 if name.endswith(SELECTION_BIAS) else None
        for part in stock_tensors(name, shape, model_type):
            planned.append(PlannedTensor(part.name, part.shape, (Piece(name, shape, part=part.part),), dtype=dtype))
        if name.endswith("mlp.gate.weight") and model_type == "glm4_moe" and not config.num_shared_experts:
            # Its class always has shared experts: these are of no width.
            prefix, width = name.removesuffix("gate.weight") + "shared_experts.", config.hidden_size
            for projection, empty in (("gate", (0, width)), ("up", (0, width)), ("down", (width, 0))):
                planned.append(PlannedTensor(f"{prefix}{projection}_proj.weight", empty, like=EMBEDDING))
    return planned


def lacking(config: MoEConfig, model_type: str) -> set[str]:
    """Our tensors that a stock checkpoint has no place for."""
    return {name for name, shape in own_tensors(config).items() if not stock_tensors(name, shape, model_type)}


def lost_values(config: MoEConfig, shards: Shards, model_type: str) -> list[str]:
    """Why what a stock checkpoint has no place for cannot be left out: values that change the logits."""
    biases: dict[str, list[str]] = {SELECTION_BIAS: [], OUTPUT_BIAS: []}
    for name in sorted(lacking(config, model_type) & shards.shapes.keys()):
        values = shards.read(name)
        if name.endswith(OUTPUT_BIAS) and values.any():
            biases[OUTPUT_BIAS].append(name)
        if name.endswith(SELECTION_BIAS) and values.min() < values.max():
            biases[SELECTION_BIAS].append(name)
    musts = {
        SELECTION_BIAS: f"be the same for all experts of a layer: {model_type} selects without it",
        OUTPUT_BIAS: f"be zeros: {model_type} has none",
    }
    return [f"{some(names)} must {musts[bias]}; got other values" for bias, names in biases.items() if names]


def may_be_left_out(config: MoEConfig, shards: Shards, *, extra_layers: int = 0) -> set[str]:
    """Tensors of a checkpoint that Transformers does not load either.

    Args:
        extra_layers: layers behind the last, which predict further tokens.
    """
    behind = range(config.num_hidden_layers, config.num_hidden_layers + extra_layers)
    found = set()
    for name, shape in shards.shapes.items():
        layer = _LAYER.match(name)
        if (layer and int(layer[1]) in behind) or name.endswith("rotary_emb.inv_freq") or 0 in shape:
            found.add(name)
    both_there = config.tie_word_embeddings and {EMBEDDING, _HEAD} <= shards.shapes.keys()
    if both_there and torch.equal(shards.read(EMBEDDING), shards.read(_HEAD)):
        found.add(_HEAD)
    return found
