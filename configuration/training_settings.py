"""The settings of a training run: which model, which text, how long and how fast."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


def _at_least(settings: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {value}")


@dataclass
class ModelSettings:
    """Which model is trained."""

    preset: str = field(
        default="hub_configs/tiny",
        metadata={"help": "Folder with a config.json: a preset of hub_configs, or a saved model's."},
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": "Fields of the preset to change, e.g. '{balancing_mode: loss_free, num_experts: 32}'."},
    )

    def overrides(self) -> dict[str, Any]:
        """`config_overrides` as a dictionary.

        Raises:
            ValueError: it is not a mapping of names to values.
        """
        try:
            overrides = yaml.safe_load(self.config_overrides)
        except yaml.YAMLError as error:
            raise ValueError(f"config_overrides must be a YAML mapping; got {self.config_overrides!r}") from error
        if not isinstance(overrides, dict):
            raise ValueError(f"config_overrides must be a YAML mapping; got {self.config_overrides!r}")
        return _yaml_numbers(overrides)


@dataclass
class DataSettings:
    """Which text is trained on, and how it is cut."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "A recipe (.yaml: see recipes/); or a folder with one sub-folder per domain, or file(s) with a "
            "domain column (parquet, jsonl, txt)."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the documents' text."})
    domain_column: str = field(default="domain", metadata={"help": "Column with the documents' domain."})
    validation_fraction: float = field(
        default=0.02, metadata={"help": "Share of documents held out where the data brings no validation split."}
    )
    max_train_bytes_per_domain: int | None = field(default=None, metadata={"help": "Cap on a domain's training text."})
    max_validation_bytes_per_domain: int | None = field(
        default=None, metadata={"help": "Cap on a domain's held-out text."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a tokenizer; without one, a byte-level BPE is trained on the data."},
    )
    block_size: int = field(default=512, metadata={"help": "Tokens in a packed block."})
    micro_batch_domains: Literal["mixed", "single"] = field(
        default="mixed", metadata={"help": "Whether a micro-batch mixes domains or holds blocks of a single one."}
    )

    def __post_init__(self) -> None:
        _at_least(self, 2, "block_size")
        _at_least(self, 1, "max_train_bytes_per_domain", "max_validation_bytes_per_domain")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1; got {self.validation_fraction}")


@dataclass
class TrainingSettings:
    """How the model is trained."""

    output_dir: str | None = field(
        default=None, metadata={"help": "The run directory; must be new or empty, or hold the run to resume."}
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the newest whole checkpoint of output_dir; start where there is no run yet."},
    )
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    max_hours: float | None = field(
        default=None, metadata={"help": "Save and stop after so many hours of this launch, to be resumed."}
    )
    seed: int = field(default=0, metadata={"help": "Of the initial weights, of dropout and of the order of the data."})

    # --- the batch ---
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Blocks in one optimizer step over all processes, whatever their number; by default one "
            "micro-batch of each process. What a process cannot take at once it accumulates."
        },
    )
    micro_batch_size: int = field(default=8, metadata={"help": "Blocks in one forward pass of one process."})

    # --- the optimizer ---
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    learning_rate_schedule: Literal["cosine", "wsd", "constant"] = field(
        default="cosine",
        metadata={"help": "After the warm-up: a cosine, constant, or wsd, which is constant and then falls linearly."},
    )
    min_learning_rate_ratio: float = field(
        default=0.1, metadata={"help": "Where cosine and wsd end, as a share of the peak."}
    )
    warmup_steps: int = field(
        default=50, metadata={"help": "Steps over which the learning rate rises; the first is made at 0."}
    )
    decay_steps: int | None = field(
        default=None, metadata={"help": "The last steps, over which wsd falls; by default a fifth of max_steps."}
    )
    weight_decay: float = field(
        default=0.1, metadata={"help": "AdamW's, on matrices only: not on norms, biases and embeddings."}
    )
    router_weight_decay: float | None = field(
        default=None, metadata={"help": "The routers' own weight decay; by default that of other matrices."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first moment decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second moment decay."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "The gradient is scaled down to this norm; 0 leaves it alone."}
    )
    spike_sigma: float = field(
        default=0.0,
        metadata={
            "help": "A step whose loss or gradient norm exceeds the mean of the last 128 by so many standard "
            "deviations is skipped, e.g. 6; 0 skips none but those that are not finite. Where a global batch holds "
            "few domains, it would skip the rare ones."
        },
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "The run stops with an error after so many skipped steps in a row."}
    )

    # --- the machine ---
    mixed_precision: Literal["no", "bf16"] = field(
        default="no", metadata={"help": "bf16: matrix products in bf16, weights and optimizer in fp32."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute each layer in the backward pass instead of keeping it."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile each decoder layer."})
    sharding: Literal["none", "fsdp", "hsdp"] = field(
        default="none",
        metadata={
            "help": "fsdp: weights, gradients and optimizer spread over all processes (torch's fully_shard); hsdp: "
            "over groups of shard_size, which hold copies. none leaves it to Accelerate's configuration: DDP, or more."
        },
    )
    shard_size: int | None = field(
        default=None, metadata={"help": "Processes in a group of hsdp; by default those of one machine."}
    )
    expert_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share one set of experts, tokens being sent to them; all else is sharded over all "
            "processes. Needs Transformers 5.23."
        },
    )

    # --- checkpoints ---
    checkpoint_steps: int | None = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    checkpoint_minutes: float | None = field(default=30, metadata={"help": "Most minutes between two checkpoints."})
    keep_checkpoints: int = field(default=3, metadata={"help": "How many of the newest checkpoints stay."})
    async_checkpoints: bool = field(
        default=True, metadata={"help": "Write checkpoints in the background, from a copy in memory."}
    )

    # --- watching ---
    logging_steps: int = field(default=10, metadata={"help": "Steps between two lines of metrics.jsonl."})
    trackers: list[str] = field(
        default_factory=list, metadata={"help": "Accelerate's trackers to log to as well, e.g. tensorboard wandb."}
    )
    peak_teraflops: float | None = field(
        default=None,
        metadata={"help": "Of one device at this precision, for the utilisation; known for usual GPUs in bf16."},
    )
    expert_parallel_sizes: list[int] = field(
        default_factory=list,
        metadata={"help": "Log how much imbalance would slow expert-parallel groups of these sizes, e.g. 2 4 8."},
    )
    log_expert_gradients: bool = field(
        default=False, metadata={"help": "Log the norm of each expert's gradient to load.jsonl."}
    )

    def __post_init__(self) -> None:
        for size in self.expert_parallel_sizes:
            if size < 2:
                raise ValueError(f"expert_parallel_sizes must be at least 2; got {size}")
        _at_least(self, 1, "max_steps", "micro_batch_size", "global_batch_size", "logging_steps", "shard_size")
        _at_least(self, 1, "expert_parallel_size")
        _at_least(self, 1, "checkpoint_steps", "keep_checkpoints", "max_skipped_steps")
        _at_least(
            self,
            0,
            "learning_rate",
            "min_learning_rate_ratio",
            "warmup_steps",
            "decay_steps",
            "weight_decay",
            "router_weight_decay",
            "max_grad_norm",
            "spike_sigma",
            "seed",
        )
        for name in ("max_hours", "checkpoint_minutes", "peak_teraflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps must be at most max_steps ({self.max_steps}); got {self.warmup_steps}")
        if self.learning_rate_schedule == "wsd" and self.wsd_decay_steps > self.max_steps - self.warmup_steps:
            raise ValueError(
                f"decay_steps must be at most max_steps less warmup_steps ({self.max_steps - self.warmup_steps}); "
                f"got {self.wsd_decay_steps}"
            )
        if self.expert_parallel_size > 1 and self.sharding != "none":
            raise ValueError(
                "sharding must be none with an expert_parallel_size above 1, which shards everything else itself; "
                f"got {self.sharding}"
            )
        if self.log_expert_gradients and self.sharded:
            raise ValueError(
                "log_expert_gradients must be off where weights are sharded, by sharding or expert_parallel_size; "
                "got True"
            )
        if self.shard_size is not None and self.sharding != "hsdp":
            raise ValueError(f"sharding must be hsdp where shard_size is given; got {self.sharding}")

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over processes by us rather than by Accelerate."""
        return self.sharding != "none" or self.expert_parallel_size > 1

    @property
    def wsd_decay_steps(self) -> int:
        """`decay_steps`, or its default."""
        return self.max_steps // 5 if self.decay_steps is None else self.decay_steps

    def micro_batches_per_step(self, num_processes: int) -> int:
        """Micro-batches of one optimizer step over all processes.

        Raises:
            ValueError: the global batch cannot be dealt out evenly.
        """
        if self.global_batch_size is None:
            return num_processes
        micro_batches, rest = divmod(self.global_batch_size, self.micro_batch_size)
        if rest:
            raise ValueError(
                f"global_batch_size must be a multiple of micro_batch_size ({self.micro_batch_size}); "
                f"got {self.global_batch_size}"
            )
        if micro_batches % num_processes:
            raise ValueError(
                f"global_batch_size must give each process as many micro-batches: a multiple of micro_batch_size "
                f"({self.micro_batch_size}) times processes ({num_processes}); got {self.global_batch_size}"
            )
        return micro_batches


RunSettings = tuple[ModelSettings, DataSettings, TrainingSettings]


def parse_run_settings(arguments: Sequence[str]) -> RunSettings:
    """The settings of a run from a command line: an optional YAML or JSON file first, then flags over it.

    Args:
        arguments: e.g. `["train.yaml", "--max_steps", "100"]`.

    Raises:
        ValueError: the file is missing, is no mapping, or names a setting that does not exist; or a value is out of
            its range. A flag that does not exist, or a value of the wrong type, ends the program with the usage.
    """
    parser = HfArgumentParser([ModelSettings, DataSettings, TrainingSettings])
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = _read_settings_file(Path(arguments[0])) + arguments[1:]
    model, data, training = parser.parse_args_into_dataclasses(arguments)
    for name, value in (("data", data.data), ("output_dir", training.output_dir)):
        if value is None:
            raise ValueError(f"{name} must be given, in the settings file or as --{name}; got nothing")
    return model, data, training


def _read_settings_file(path: Path) -> list[str]:
    """A settings file as flags, so that its values are converted and checked like those of the command line."""
    if not path.is_file():
        raise ValueError(f"the settings file must exist; got {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"the settings file must be YAML or JSON; got {path}: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"the settings file must hold a mapping of names to values; got {path}")
    known = {setting.name for group in (ModelSettings, DataSettings, TrainingSettings) for setting in fields(group)}
    flags = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path} names a setting that does not exist: {name}; known: {', '.join(sorted(known))}")
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return flags


def _yaml_numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-3`, without a point, as text; people mean a number."""
    if isinstance(value, dict):
        return {name: _yaml_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_yaml_numbers(inner) for inner in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def trained_block_size(model: Path) -> int:
    """Tokens in a block of the run that a model comes from: the context it was trained, and is to be measured at.

    Args:
        model: a model's folder; in a run directory, `settings.yaml` lies beside it. Else `DataSettings`' default.
    """
    settings = model.absolute().parent / "settings.yaml"
    if not settings.is_file():
        return DataSettings().block_size
    return int(yaml.safe_load(settings.read_text(encoding="utf-8"))["block_size"])
