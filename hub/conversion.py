"""From Qwen3-MoE, Mixtral and GLM-4-MoE checkpoints to `MoEForCausalLM`, and back wherever that is exact."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration import BalancingFields, MoEConfig
from ..configuration.remote_code import write_remote_code
from ..data import write_whole
from .companions import copy_companions
from .shards import Shards, ShardWriter, defects
from .stock_configs import ARCHITECTURES, READERS, WRITERS, ConfigReader
from .stock_weights import EMBEDDING, lacking, lost_values, may_be_left_out, plan_own, plan_stock

Target = Literal["equipoise", "qwen3_moe", "glm4_moe"]
Dtype = Literal["float32", "bfloat16", "float16"]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Target = "equipoise",
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    config_overrides: Mapping[str, Any] | None = None,
    ignore_config_fields: Iterable[str] = (),
) -> list[str]:
    """Convert a saved model to another class with the same logits.

    A few tensors are in memory at a time, about `max_shard_size` of them. Weights are not changed, only named and laid
    out anew; tokenizer, generation settings and licence go along.

    Args:
        source: folder of the model, in safetensors: `qwen3_moe`, `mixtral` or `glm4_moe`, or `equipoise_moe` to
            leave it.
        target: folder to be written; there is nothing there, or an empty folder. It is there when all of it is.
        to: `equipoise` for [`MoEForCausalLM`] with its remote code, or the stock class.
        dtype: of the weights written; `None` keeps each one's own. The selection bias is always in fp32.
        max_shard_size: of a file.
        config_overrides: fields of [`BalancingFields`] for `equipoise`. (The stock coefficient is not carried over: it
            belongs to another loss.)
        ignore_config_fields: fields of the source's config.json that are unknown here and known to you to change
            nothing.

    Returns:
        What was left behind, a sentence each.

    Raises:
        ValueError: the conversion would not be exact, or cannot be made: all reasons; or a file cannot be read.
            Nothing has been written then.
        huggingface_hub.errors.StrictDataclassError: a value of balancing is impossible; the message names the field.
    """
    source, target = Path(source), Path(target)
    refuse_occupied(target)
    known = READERS if to == "equipoise" else {MoEConfig.model_type}
    reader = ConfigReader(source, known, ignore_config_fields)
    shards = Shards(source)
    config: PreTrainedConfig
    if to == "equipoise":
        values = READERS[reader.model_type](reader) | balancing(config_overrides)
        refuse(source, reader.close())
        config = MoEConfig(**values)
        planned = plan_own(config, shards, reader.model_type)
        unread = may_be_left_out(config, shards, extra_layers=reader["num_mtp_layers"] or 0)
    else:
        if config_overrides:
            raise ValueError(f"config_overrides must be left out: {to} has no balancing; got {config_overrides}")
        values = WRITERS[to](reader)
        refuse(source, reader.close() + lost_values(reader.config, shards, to))
        config = CONFIG_MAPPING[to](**values)
        planned = plan_stock(reader.config, to)
        unread = may_be_left_out(reader.config, shards) | lacking(reader.config, to)
    refuse(source, defects(shards, planned, unread))
    writer = ShardWriter(planned, shards, dtype=dtype and getattr(torch, dtype), max_shard_size=max_shard_size)
    write_model(source, target, config, writer)
    return reader.notes


def balancing(config_overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The overrides, if they are of balancing: anything else would change what the weights compute."""
    names = [field.name for field in fields(BalancingFields)]
    for name in config_overrides or {}:
        if name not in names:
            raise ValueError(f"config_overrides must be of balancing ({', '.join(names)}); got {name}")
    return dict(config_overrides or {})


def refuse_occupied(target: Path) -> None:
    """Raises ValueError unless nothing is there, or an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise ValueError(f"the output must be a folder that is new or empty; got {target}")


def refuse(source: Path, reasons: list[str]) -> None:
    """Raises ValueError with all the reasons, if there are any."""
    if reasons:
        raise ValueError("\n- ".join([f"{source} cannot be converted:", *reasons]))


def write_model(source: Path, target: Path, config: PreTrainedConfig, writer: ShardWriter) -> None:
    """Write a model's folder, whole or not at all: weights, configuration, code of ours, companions of the source."""
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.dtype = writer.dtypes[EMBEDDING]

    def write(folder: Path) -> None:
        folder.mkdir()
        writer.write(folder)
        config.save_pretrained(folder)
        copy_companions(source, folder)
        if isinstance(config, MoEConfig):
            write_remote_code(folder)

    write_whole(target, write)
