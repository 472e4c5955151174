"""Configurations of stock models read as [`MoEConfig`], and [`MoEConfig`] written as one of theirs.

Each reading names every field that can change the logits. What it did not ask for must stand at its class's default,
so that a field which a later version of Transformers brings is refused, not ignored.
"""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from ..configuration import BalancingFields, MoEConfig
from .reading import read_config, read_mapping

CONFIG_FILE = "config.json"

# Of one name and one meaning in every decoder here.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# What can stand in a config.json without a word to say about the logits.
_HARMLESS = {
    *(field.name for field in fields(BalancingFields)),
    *vars(GenerationConfig()),  # Transformers drops them from a model's configuration
    *("architectures", "auto_map", "dtype", "torch_dtype", "model_type", "_name_or_path"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_router_logits"),
    *("attn_implementation", "experts_implementation", "ignore_keys_at_rope_validation"),
    # Read by Transformers into rope_parameters.
    *("rope_theta", "rope_scaling", "partial_rotary_factor"),
    # Of the dense models that share a tokenizer with them; no class here reads these two.
    *("max_window_layers", "pretraining_tp"),
}

# Written by some, and read by none of the classes here: there is nothing of the kind where they are false.
_HARMLESS_IF_FALSE = {
    *("add_cross_attention", "attention_bias", "is_decoder", "mlp_bias", "tie_encoder_decoder"),
    *("tf_legacy_loss", "torchscript", "use_bfloat16", "use_bidirectional_attention", "use_mrope"),
}


class ConfigReader:
    """A configuration in a folder, whose fields are asked for one by one.

    Args:
        folder: with a config.json.
        known: which model types to read.
        ignored: names of fields that the caller knows to change nothing.

    Attributes:
        config: as its class reads it.
        refusals: why the model cannot be converted; reading goes on after the first.
        notes: what will be left behind.

    Raises:
        ValueError: there is no config.json, it cannot be read, its model type is not `known`, or its layers differ in
            their fields.
    """

    def __init__(self, folder: Path, known: Iterable[str], ignored: Iterable[str] = ()) -> None:
        file = folder / CONFIG_FILE
        if not file.is_file():
            hint = (
                ""
                if folder.exists()
                else "; `hf download USER/NAME --local-dir FOLDER` makes one of a model of the Hub"
            )
            raise ValueError(f"the model must be a folder with a {CONFIG_FILE}; got {folder}{hint}")
        self._written = read_mapping(file)
        self.model_type = str(self._written.get("model_type"))
        if self.model_type not in known:
            why = _KEEP_THEIR_CLASS.get(self.model_type, "other models keep their own class")
            raise ValueError(f"the model's type must be {' or '.join(sorted(known))}; got {self.model_type} ({why})")
        if self._written.get("per_layer_config"):
            raise ValueError(
                "per_layer_config must be absent: here all layers have the same fields; got some that differ"
            )
        self._class: type[PreTrainedConfig] = CONFIG_MAPPING[self.model_type]
        self.config: Any = read_config(self._class, folder)
        self._asked = set(ignored)
        self.refusals: list[str] = []
        self.notes: list[str] = []
        if self["quantization_config"]:
            self.refusals.append("quantization_config must be absent: convert the weights before they are quantised")
        # No class declares it, and Transformers asks every configuration for it when it makes the attention mask.
        is_causal = self._written.get("is_causal", True)
        self._asked.add("is_causal")
        self.require(is_causal is True, "is_causal", "be true: here attention sees nothing after it", repr(is_causal))

    def __getitem__(self, name: str) -> Any:
        """The field's value as its class reads it; `None` where there is none."""
        self._asked.add(self._stored(name))
        return getattr(self.config, name, None)

    def require(self, holds: bool, name: str, must: str, got: Any = None) -> None:
        """Note a refusal unless `holds`: the field, what it must be, what it is."""
        if not holds:
            self.refusals.append(f"{name} must {must}; got {self[name] if got is None else got}")

    def close(self) -> list[str]:
        """All refusals, those of fields too that nobody asked for and that do not stand at their default."""
        asked = self._asked | {self._stored(name) for name in _HARMLESS}
        declared = {self._stored(field.name): field for field in fields(self._class)}
        for name, field in declared.items():
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if name not in asked and getattr(self.config, name) != default:
                self._refuse_unknown(name, getattr(self.config, name))
        for name, value in self._written.items():
            # What is empty says nothing; what is false or 0 may well turn something off.
            empty = value is None or value in ([], {}) or (value is False and name in _HARMLESS_IF_FALSE)
            if not empty and self._stored(name) not in {*asked, *declared}:
                self._refuse_unknown(name, value)
        return self.refusals

    def _refuse_unknown(self, name: str, value: Any) -> None:
        self.refusals.append(
            f"{name} ({value}) is a field unknown here: if it changes no logits, name it in ignore_config_fields"
        )

    def _stored(self, name: str) -> str:
        return self._class.attribute_map.get(name, name)


_KEEP_THEIR_CLASS = {
    "qwen2_moe": "it keeps its own class: its shared expert has a gate",
    "olmoe": "it keeps its own class: it normalises queries and keys over their whole width, and may clip them",
    "gpt_oss": "it keeps its own class: its attention has sinks and windows, its experts have biases",
    **dict.fromkeys(("llama", "qwen2", "qwen3"), "it is dense: scripts/upcycle.py makes experts of its MLPs"),
}


# --- From stock ---


def read_decoder(stock: ConfigReader, *, partial_rotary: bool = False, windowed: bool = True) -> dict[str, Any]:
    """The fields of everything but MLPs, experts, norms of queries and keys, and biases.

    Args:
        partial_rotary: whether the stock class rotates a part of each head, where its configuration says so.
        windowed: whether any layer of it attends to a sliding window, where its configuration gives one.
    """
    found = {name: stock[name] for name in _SAME}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    found["head_dim"] = stock["head_dim"] or found["hidden_size"] // found["num_attention_heads"]
    found["attention_dropout"] = stock["attention_dropout"] or 0.0
    found["rope_parameters"] = rope = dict(stock["rope_parameters"])
    stock.require("rope_type" in rope, "rope_parameters", "be the same in every layer")
    if not partial_rotary:
        share = rope.pop("partial_rotary_factor", 1.0)
        stock.require(share == 1, "partial_rotary_factor", f"be 1: {stock.model_type} rotates whole heads", share)

    stock["use_sliding_window"]  # without it, its class makes the window null
    window, longest = stock["sliding_window"], found["max_position_embeddings"]
    if windowed and window is not None:
        must = f"be null, or at least max_position_embeddings ({longest}): here attention sees everything before it"
        stock.require(window >= longest, "sliding_window", must)
        stock.notes.append(f"sliding_window ({window}) is not carried: nothing is further back")
    return found


def _note_coefficient(stock: ConfigReader) -> None:
    stock.notes.append(
        f"router_aux_loss_coef ({stock['router_aux_loss_coef']}) is not carried: it belongs to another loss; "
        "balancing is by MoEConfig's defaults and config_overrides"
    )


def _read_qwen3_moe(stock: ConfigReader) -> dict[str, Any]:
    decoder = read_decoder(stock)
    _note_coefficient(stock)
    layers = range(decoder["num_hidden_layers"])
    sparse_step, mlp_only = stock["decoder_sparse_step"], stock["mlp_only_layers"]
    stock.require(sparse_step > 0, "decoder_sparse_step", "be at least 1")
    dense = [layer for layer in layers if layer in mlp_only or (layer + 1) % max(sparse_step, 1)]
    must = "be the first layers, all of them (mlp_only_layers, decoder_sparse_step)"
    stock.require(dense == list(layers[: len(dense)]), "dense layers", must, dense)
    return {
        **decoder,
        "first_k_dense_replace": len(dense),
        "use_qk_norm": True,
        "attention_bias": stock["attention_bias"],
        "num_experts": stock["num_experts"],
        "num_experts_per_tok": stock["num_experts_per_tok"],
        "moe_intermediate_size": stock["moe_intermediate_size"],
        "scoring_func": "softmax",
        "norm_topk_prob": stock["norm_topk_prob"],
    }


def _read_mixtral(stock: ConfigReader) -> dict[str, Any]:
    _note_coefficient(stock)
    if stock["router_jitter_noise"]:
        stock.notes.append(
            f"router_jitter_noise ({stock['router_jitter_noise']}) is not carried: it acts in training only"
        )
    return {
        **read_decoder(stock),
        "num_experts": stock["num_local_experts"],
        "num_experts_per_tok": stock["num_experts_per_tok"],
        "moe_intermediate_size": stock["intermediate_size"],
        "scoring_func": "softmax",
        "norm_topk_prob": True,
    }


def _read_glm4_moe(stock: ConfigReader) -> dict[str, Any]:
    if stock["num_mtp_layers"]:
        stock.notes.append(
            f"num_nextn_predict_layers ({stock['num_mtp_layers']}): layers that predict further tokens are left out, "
            "as Transformers leaves them out of the model"
        )
    if stock["attention_bias"]:
        stock.notes.append(
            "self_attn.o_proj.bias is added, zeros: glm4_moe, which has none, takes the model back while they stay so"
        )
    same = ("attention_bias", "use_qk_norm", "first_k_dense_replace", "moe_intermediate_size", "norm_topk_prob")
    grouping = ("routed_scaling_factor", "n_group", "topk_group")
    return {
        **read_decoder(stock, partial_rotary=True),
        **{name: stock[name] for name in (*same, *grouping)},
        "num_experts": stock["n_routed_experts"],
        "num_experts_per_tok": stock["num_experts_per_tok"],
        "num_shared_experts": stock["n_shared_experts"],
        "scoring_func": "sigmoid",
    }


READERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "qwen3_moe": _read_qwen3_moe,
    "mixtral": _read_mixtral,
    "glm4_moe": _read_glm4_moe,
}


# --- To stock ---


def _write_decoder(ours: ConfigReader) -> dict[str, Any]:
    same = ("head_dim", "attention_dropout", "attention_bias", "moe_intermediate_size", "num_experts_per_tok")
    return {name: ours[name] for name in (*_SAME, *same, "norm_topk_prob")} | {
        "rope_parameters": dict(ours["rope_parameters"])
    }


def _write_qwen3_moe(ours: ConfigReader) -> dict[str, Any]:
    found = _write_decoder(ours)
    share = found["rope_parameters"].pop("partial_rotary_factor", 1.0)
    ours.require(share == 1, "partial_rotary_factor", "be 1: qwen3_moe rotates whole heads", share)
    ours.require(ours["scoring_func"] == "softmax", "scoring_func", "be softmax for qwen3_moe")
    ours.require(ours["use_qk_norm"], "use_qk_norm", "be true: qwen3_moe always normalises queries and keys")
    ours.require(ours["num_shared_experts"] == 0, "num_shared_experts", "be 0: qwen3_moe has no shared experts")
    ours.require(ours["routed_scaling_factor"] == 1, "routed_scaling_factor", "be 1: qwen3_moe has no such factor")
    must = f"be n_group ({ours['n_group']}): qwen3_moe selects among all experts"
    ours.require(ours["topk_group"] == ours["n_group"], "topk_group", must)
    return {
        **found,
        "num_experts": ours["num_experts"],
        "mlp_only_layers": list(range(ours["first_k_dense_replace"])),
    }


def _write_glm4_moe(ours: ConfigReader) -> dict[str, Any]:
    found = _write_decoder(ours)
    found["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # its class's own default is 0.5
    ours.require(ours["scoring_func"] == "sigmoid", "scoring_func", "be sigmoid for glm4_moe")
    same = ("use_qk_norm", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group")
    return {
        **found,
        **{name: ours[name] for name in same},
        "n_routed_experts": ours["num_experts"],
        "n_shared_experts": ours["num_shared_experts"],
        "num_mtp_layers": 0,
    }


WRITERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "qwen3_moe": _write_qwen3_moe,
    "glm4_moe": _write_glm4_moe,
}
ARCHITECTURES = {
    MoEConfig.model_type: "MoEForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
