"""Makes a Mixture-of-Experts model of a saved Llama, Qwen2 or Qwen3 model, with the same logits to begin with.

python scripts/upcycle.py --model models/qwen3-0.6b --output models/qwen3-8x --num_experts 8 --num_experts_per_tok 2
"""

import sys
from dataclasses import dataclass, field

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from equipoise.configuration import ModelSettings, ScoringFunction
from equipoise.hub import upcycle
from equipoise.hub.conversion import Dtype


@dataclass
class UpcyclingArguments:
    model: str = field(metadata={"help": "The dense model's folder, with safetensors weights; no name on the Hub."})
    output: str = field(metadata={"help": "The folder to write; new or empty."})
    num_experts: int = field(metadata={"help": "Routed experts."})
    num_experts_per_tok: int = field(metadata={"help": "Experts selected for each token."})
    num_shared_experts: int = field(default=0, metadata={"help": "Slices of each MLP that every token goes through."})
    granularity: int = field(
        default=1,
        metadata={
            "help": "Slices that each MLP is cut into. Both numbers of routed experts must be multiples of "
            "granularity - num_shared_experts."
        },
    )
    first_k_dense_replace: int = field(default=0, metadata={"help": "First layers that stay dense."})
    scoring_func: ScoringFunction = field(default="softmax", metadata={"help": "How router logits become scores."})
    noise: float = field(
        default=0.0,
        metadata={"help": "Standard deviation of noise on the experts, relative to their own. Changes the logits."},
    )
    seed: int = field(default=0, metadata={"help": "Seeds the routers and the noise."})
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
    parser = HfArgumentParser(UpcyclingArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    settings = vars(arguments) | {"config_overrides": None}
    source, target = settings.pop("model"), settings.pop("output")
    try:
        settings["config_overrides"] = ModelSettings(config_overrides=arguments.config_overrides).overrides()
        notes = upcycle(source, target, **settings)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    for note in notes:
        print(f"note: {note}")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
