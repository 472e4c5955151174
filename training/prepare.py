"""From settings to what the loop works with: everything that can be wrong is found here."""

import json
import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    set_seed,
)
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..balancing import check_expert_parallel_sizes
from ..configuration import (
    BalancingSettings,
    ModelSettings,
    MoEConfig,
    RunSettings,
    TrainingSettings,
)
from ..data import (
    MicroBatches,
    PackedCorpus,
    description_differences,
    load_tokenizer,
    open_corpus,
    pack,
    train_tokenizer,
    write_json,
)
from ..modeling import BLOCK_CAUSAL, MoEForCausalLM
from .checkpoints import Checkpoint, Checkpoints
from .distribution import Distribution, distribute
from .flops import training_flops_per_token
from .optimization import build_schedule
from .panels import check_trackers
from .run_directory import RunDirectory

# What a resumed run may change of a configuration: how it balances, and what only generation reads.
_FREE = {*vars(BalancingSettings()), "use_cache", "output_router_logits"}


@dataclass
class Prepared:
    """What the loop works with."""

    accelerator: Accelerator
    run: RunDirectory
    settings: RunSettings
    """As given, or as the run that is resumed has them."""
    config: MoEConfig
    tokenizer: PreTrainedTokenizerBase
    packed: PackedCorpus
    batches: MicroBatches
    accumulation: int
    """Micro-batches of each process in one optimizer step."""
    checkpoints: Checkpoints
    distribution: Distribution
    """The model and its optimizer, on all processes."""
    shell: MoEForCausalLM
    """The model without its weights: what is saved is written through it, while training has the model."""
    parameters: int
    flops_per_token: float
    schedule: torch.optim.lr_scheduler.LRScheduler
    resumed: dict[str, Any] | None
    """The state of the checkpoint the run goes on from; `None` at the beginning."""


def prepare(settings: RunSettings, stack: ExitStack) -> Prepared:
    """Check everything, read the text, build or load the model, and make or open the run directory.

    Every process calls it; where one must wait for another it does.

    Args:
        stack: keeps what must be given back in the end, whatever happens: the lock on the run directory.

    Raises:
        ValueError: bad settings or data; a new run leaves nothing behind then.
        CheckpointError: there are checkpoints to resume from, and none is whole.
    """
    config = read_config(settings[0])
    check_trackers(settings[2].trackers)
    check_expert_parallel_sizes(settings[2].expert_parallel_sizes, config.num_experts)
    assert settings[2].output_dir is not None
    run = RunDirectory(settings[2].output_dir, resume=settings[2].resume)
    accelerator = build_accelerator(run, settings[2])
    accelerator.wait_for_everyone()  # nobody makes the folder before everybody has found it empty
    if run.resumed:
        if accelerator.is_main_process:
            stack.enter_context(run.locked())
        accelerator.wait_for_everyone()
        settings = run.settled(settings)
    _, data, training = settings
    num_processes = accelerator.num_processes
    accumulation = training.micro_batches_per_step(num_processes) // num_processes
    accelerator.gradient_accumulation_steps = accumulation
    # Kept as a number: with other processes later it is still the same batch.
    training = replace(training, global_batch_size=accumulation * num_processes * training.micro_batch_size)
    settings = (settings[0], data, training)
    if run.resumed and accelerator.state.deepspeed_plugin is not None:
        raise ValueError(
            "resume must be off under DeepSpeed, whose optimizer can only be read by unpickling: start a new run from "
            f"a checkpoint's model (--preset); got {run.path}, which holds a run"
        )

    with run.prepared() if accelerator.is_main_process and not run.resumed else nullcontext():
        packed, tokenizer = prepare_text(accelerator, run, config, settings)
        batches = MicroBatches(
            packed,
            micro_batch_size=training.micro_batch_size,
            micro_batches_per_step=accumulation * num_processes,
            seed=training.seed,
            micro_batch_domains=data.micro_batch_domains,
            rank=accelerator.process_index,
            world_size=num_processes,
            broadcast=lambda tensor: broadcast(tensor.to(accelerator.device)).cpu(),
        )
        checkpoints = Checkpoints(
            run.checkpoints, keep=training.keep_checkpoints, background=training.async_checkpoints
        )
        checkpoint = broadcast_object_list([checkpoints.newest() if accelerator.is_main_process else None])[0]
        set_seed(training.seed)
        model = build_model(config, checkpoint)
        if accelerator.device.type == "cpu" and not training.compile:
            model.set_attn_implementation(BLOCK_CAUSAL)
        parameters = model.num_parameters()  # before any of them is sharded
        flops_per_token = training_flops_per_token(model, config, data.block_size)
        with torch.device("meta"):
            shell = MoEForCausalLM(config)
        distribution = distribute(accelerator, model.train(), training)
        accelerator.wait_for_everyone()  # nobody reads the preparation any more
    accelerator.wait_for_everyone()
    state = None if checkpoint is None else checkpoint.state()
    if state is not None and state["step"] > training.max_steps:
        raise ValueError(
            f"max_steps must be at least the steps that have been made ({state['step']}); got {training.max_steps}"
        )
    if accelerator.is_main_process:
        if run.resumed:
            run.tidy(0 if checkpoint is None else checkpoint.step)
            run.write_settings(settings, run.path)
        else:
            stack.enter_context(run.locked())

    model, optimizer = distribution.model, distribution.torch_optimizer
    model.balancer.expert_parallel_sizes = training.expert_parallel_sizes
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if training.compile:
        for layer in model.model.layers:  # the layers are alike: compiled once, and counting stays outside
            layer.compile()
    if checkpoint is not None and state is not None:
        checkpoint.load_optimizer(model, optimizer)
        model.balancer.load_state_dict(state["balancer"])
    # The schedule is not Accelerate's, which would step it once per process.
    schedule = build_schedule(optimizer, training, 0 if state is None else state["step"])
    return Prepared(
        accelerator=accelerator,
        run=run,
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        packed=packed,
        batches=batches,
        accumulation=accumulation,
        checkpoints=checkpoints,
        distribution=distribution,
        shell=shell,
        parameters=parameters,
        flops_per_token=flops_per_token,
        schedule=schedule,
        resumed=state,
    )


def read_config(settings: ModelSettings) -> MoEConfig:
    """The preset's configuration with its overrides.

    Raises:
        ValueError: the preset is no MoE configuration of ours, or an override names a field that does not exist.
        huggingface_hub.errors.StrictDataclassError: a value is impossible; the message names the field.
    """
    try:
        config = AutoConfig.from_pretrained(settings.preset)
    except OSError as error:
        raise ValueError(f"preset must be a folder with a config.json; got {settings.preset}") from error
    if not isinstance(config, MoEConfig):
        raise ValueError(
            f"preset must hold a configuration of model type {MoEConfig.model_type}; got {config.model_type}"
        )
    values, overrides = config.to_dict(), settings.overrides()
    for name in overrides:
        if name not in values:
            raise ValueError(f"config_overrides must name fields of MoEConfig; got {name}")
    try:
        return MoEConfig.from_dict(values | overrides)
    except KeyError as error:  # Transformers' own word for a RoPE type without the parameters it needs
        raise ValueError(f"config_overrides must give every parameter that is needed: {error.args[0]}") from error


def build_accelerator(run: RunDirectory, training: TrainingSettings) -> Accelerator:
    """The Accelerator; it starts the process group."""
    # Elsewhere Accelerate knows; under DeepSpeed on CPUs it would ask for a backend that torch does not bring.
    zero_on_cpus = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available()
    process_group = InitProcessGroupKwargs(
        backend="gloo" if zero_on_cpus else None,
        # The others wait while the first process reads, builds and tokenises. One that dies is noticed at once.
        timeout=timedelta(hours=12),
    )
    return Accelerator(
        kwargs_handlers=[process_group],
        # What we shard ourselves has a policy of its own.
        mixed_precision="no" if training.sharded else training.mixed_precision,
        # A step's micro-batches are drawn together: what is left of the data must not end the accumulation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=training.trackers or None,
        project_dir=run.path,
    )


def prepare_text(
    accelerator: Accelerator, run: RunDirectory, config: MoEConfig, settings: RunSettings
) -> tuple[PackedCorpus, PreTrainedTokenizerBase]:
    """Read, tokenize and pack the training text; keep in the run directory what it was, the held-out documents and the
    tokenizer. The ids of special tokens go into the configuration.

    The main process does the work first; the others then find it in the cache.

    Raises:
        ValueError: the text cannot be read (see `open_corpus`); the tokenizer is larger than the vocabulary; or a run
            that is resumed had other text.
    """
    _, data, training = settings
    if data.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size must be at most max_position_embeddings ({config.max_position_embeddings}); "
            f"got {data.block_size}"
        )
    folder = run.path if run.resumed else run.preparation
    with accelerator.main_process_first():
        corpus = open_corpus(data, seed=training.seed)
        if run.resumed:
            ran = json.loads((folder / "data.json").read_text(encoding="utf-8"))
            changes = description_differences(ran, corpus.description())
            if changes:
                raise ValueError(f"data must be what the run was begun with, see {folder}/data.json; {changes[0]}")
        elif accelerator.is_main_process:
            run.write_settings(settings, folder)
            write_json(folder / "data.json", corpus.description())
            corpus.held_out.to_parquet(folder / "validation.parquet")
            if data.tokenizer is None:
                tokenizer = train_tokenizer(corpus.sample_texts(), config.vocab_size)
            else:
                tokenizer = load_tokenizer(data.tokenizer)
            tokenizer.save_pretrained(folder / "tokenizer")
        # Every process reads what was saved: one tokenizer, and one key for the cache of packed blocks.
        tokenizer = load_tokenizer(folder / "tokenizer")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"vocab_size must hold the tokenizer's {len(tokenizer)} tokens ({data.tokenizer}); "
                f"got {config.vocab_size}"
            )
        packed = pack(corpus, tokenizer, data.block_size, seed=training.seed)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return packed, tokenizer


def build_model(config: MoEConfig, checkpoint: Checkpoint | None) -> MoEForCausalLM:
    """A new model, or a checkpoint's, in fp32.

    Raises:
        ValueError: the checkpoint is of another architecture; the message names the field.
    """
    if checkpoint is None:
        return MoEForCausalLM(config)
    saved = MoEConfig.from_pretrained(checkpoint.model).to_dict()
    for name, value in config.to_dict().items():
        if name in MoEConfig.__annotations__ and name not in _FREE and saved.get(name) != value:
            raise ValueError(
                f"{name} must stay as it was when a run is resumed ({saved.get(name)}, in {checkpoint.path}); "
                f"got {value}"
            )
    model = MoEForCausalLM.from_pretrained(checkpoint.model, config=config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            # Where the file lies in memory it may start at any byte, and matrix products of weights that are aligned
            # otherwise round otherwise: a resumed run would not be the same to the bit.
            tensor.data = tensor.data.clone()
    return model


__all__ = ["Prepared", "prepare"]
