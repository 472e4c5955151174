"""Converts a saved Qwen3-MoE, Mixtral or GLM-4-MoE model to MoEForCausalLM, or back, with the same logits.

python scripts/convert.py --model models/qwen3-30b-a3b --output models/qwen3-equipoise
python scripts/convert.py --model runs/small/model --output small-qwen3 --to qwen3_moe
"""

import sys
from dataclasses import dataclass, field

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from equipoise.configuration import ModelSettings
from equipoise.hub import convert
from equipoise.hub.conversion import Dtype, Target


@dataclass
class ConversionArguments:
    model: str = field(metadata={"help": "The model's folder, with safetensors weights; no name on the Hub."})
    output: str = field(metadata={"help": "The folder to write; new or empty."})
    to: Target = field(
        default="equipoise", metadata={"help": "The class to convert to: ours, or a stock one from ours."}
    )
    dtype: Dtype | None = field(default=None, metadata={"help": "Type of the weights. Default: as they are."})
    max_shard_size: str = field(
        default="5GB", metadata={"help": "Size of an output file, and about what is in memory at a time."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": "Fields of balancing, e.g. '{balancing_mode: loss_free}'. Default: MoEConfig's own."},
    )
    ignore_config_fields: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of config.json that are unknown here and that you know to change nothing."},
    )


def main() -> None:
    parser = HfArgumentParser(ConversionArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        notes = convert(
            arguments.model,
            arguments.output,
            to=arguments.to,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            config_overrides=ModelSettings(config_overrides=arguments.config_overrides).overrides(),
            ignore_config_fields=arguments.ignore_config_fields,
        )
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    for note in notes:
        print(f"note: {note}")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
