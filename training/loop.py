"""The training loop: one plain Accelerate loop, for one process or many."""

import math
import time
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..balancing import check_expert_parallel_sizes
from ..configuration import RunSettings
from ..data import MicroBatchSampler, write_json, write_whole
from ..integrations import data_parallel_group
from ..modeling import MoEForCausalLM
from .optimization import build_optimizer, build_schedule
from .prepare import prepare_blocks, read_config
from .run_directory import RunDirectory
from .step_metrics import StepMetrics


def train(settings: RunSettings) -> RunDirectory:
    """Train a model from scratch and save it; the run directory then holds everything about the run.

    Every process of the launch calls it. What can be wrong with the settings or the data is found before training
    starts.

    Args:
        settings: from `parse_run_settings`.

    Raises:
        ValueError: bad settings or data; the message names the field, what it must be and what it got.
        FloatingPointError: the loss is infinite or not a number.
    """
    model_settings, data, training = settings
    config = read_config(model_settings)
    check_expert_parallel_sizes(training.expert_parallel_sizes, config.num_experts)
    assert training.output_dir is not None
    run = RunDirectory(training.output_dir)

    accumulation = training.gradient_accumulation_steps
    # A step's micro-batches are drawn together: what is left in the data loader must not end the accumulation.
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
    )
    accelerator.wait_for_everyone()  # nobody makes the folder before everybody has found it empty
    with run.prepared(settings) if accelerator.is_main_process else nullcontext():
        blocks, tokenizer, domains = prepare_blocks(accelerator, run, config, data, training)
        sampler = MicroBatchSampler(
            blocks.with_format(None)["domain"],
            training.micro_batch_size,
            training.max_steps * accumulation * accelerator.num_processes,
            seed=training.seed,
            micro_batch_domains=data.micro_batch_domains,
        )
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        set_seed(training.seed)
        model = MoEForCausalLM(config)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = build_optimizer(model, training)
        schedule = build_schedule(optimizer, training)
        accelerator.wait_for_everyone()  # nobody reads the preparation any more

    balancer = model.balancer
    balancer.synchronizer.process_group = data_parallel_group(accelerator)
    balancer.expert_parallel_sizes = training.expert_parallel_sizes
    # The schedule is not prepared: Accelerate would step it once per process.
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(blocks, batch_sampler=sampler))

    accelerator.print(
        f"{model.num_parameters() / 1e6:.1f} M parameters, {accelerator.num_processes} processes, "
        f"{len(blocks)} blocks of {data.block_size} tokens from {len(domains)} domains, "
        f"balancing: {config.balancing_mode}"
    )
    tokens_per_step = accelerator.num_processes * accumulation * training.micro_batch_size * data.block_size
    metrics = StepMetrics()
    history: list[float] = []
    prepared.train()
    start = logged = time.perf_counter()
    last_logged_step = 0
    batches = iter(batches)
    progress = tqdm(range(1, training.max_steps + 1), unit="step", disable=not accelerator.is_main_process)
    for step in progress:
        logging = step == 1 or step % training.logging_steps == 0 or step == training.max_steps
        micro_batches = [next(batches) for _ in range(accumulation)]
        labels = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in micro_batches)
        num_items_in_batch = accelerator.reduce(labels, "sum")

        if balancer.settings.load_estimate == "exact":
            with balancer.prepass():
                for batch in micro_batches:
                    prepared(
                        input_ids=batch["input_ids"],
                        position_ids=batch["position_ids"],
                        labels=batch["labels"],
                        use_cache=False,
                    )

        for batch in micro_batches:
            with accelerator.accumulate(prepared):
                outputs = prepared(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    labels=batch["labels"],
                    num_items_in_batch=num_items_in_batch,
                    use_cache=False,
                )
                # The loss is this micro-batch's share of the global batch's: undo the means that Accelerate (over
                # micro-steps) and DDP (over processes) take, so that the shares add up.
                accelerator.backward(outputs.loss * accumulation * accelerator.num_processes)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(
                        prepared.parameters(), training.max_grad_norm or math.inf
                    )
                    if training.log_expert_gradients and logging:
                        expert_gradients = model.expert_gradient_norms()
                optimizer.step()
                optimizer.zero_grad()
                metrics.add_micro_batch(outputs)
        balancer.after_optimizer_step(skipped=accelerator.optimizer_step_was_skipped)
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        metrics.end_step()

        if logging:
            record, load = metrics.read(accelerator, balancer)
            now = time.perf_counter()
            speed = (step - last_logged_step) * tokens_per_step / (now - logged)
            logged, last_logged_step = now, step
            lm_loss = record["lm_loss"]
            assert isinstance(lm_loss, float)
            if not math.isfinite(lm_loss):
                raise FloatingPointError(
                    f"the loss must stay finite; got {lm_loss} by step {step}, at learning rate {learning_rate:.2g}"
                )
            history.append(lm_loss)
            if accelerator.is_main_process:
                position = {"step": step, "tokens": step * tokens_per_step}
                pace = {
                    "learning_rate": learning_rate,
                    "grad_norm": gradient_norm.item(),
                    "tokens_per_second": speed,
                    "seconds": now - start,
                }
                run.append("metrics.jsonl", position | record | pace)
                routed: dict[str, Any] = {"step": step, "load": load}
                if training.log_expert_gradients and expert_gradients is not None:
                    routed["expert_grad_norm"] = expert_gradients.tolist()
                run.append("load.jsonl", routed)
                gerrymandered = record.get("token_gerrymandering")
                if isinstance(gerrymandered, list) and any(gerrymandered):
                    layers = [layer for layer, found in enumerate(gerrymandered) if found]
                    warnings.warn(
                        f"step {step}: in the MoE layers {layers} the load-balancing loss is below 1 while MaxVio "
                        "grows: it is being lowered without balance",
                        stacklevel=1,
                    )
                progress.set_postfix(loss=f"{lm_loss:.3f}")
    seconds = time.perf_counter() - start

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:

        def save(path):
            accelerator.unwrap_model(prepared).save_pretrained(path)
            tokenizer.save_pretrained(path)

        write_whole(run.path / "model", save)
        summary = {
            "world_size": accelerator.num_processes,
            "gradient_accumulation_steps": accumulation,
            "balancing_mode": config.balancing_mode,
            "parameters": model.num_parameters(),
            "domains": domains,
            "steps": training.max_steps,
            "tokens": training.max_steps * tokens_per_step,
            "seconds": seconds,
            "tokens_per_second": training.max_steps * tokens_per_step / seconds,
            "lm_loss_start": history[0],
            "lm_loss_end": history[-1],
            "max_vio_batch": record.get("max_vio_batch"),
            "max_vio_micro": record.get("max_vio_micro"),
            "device": str(accelerator.device),
            "versions": {name: version(name) for name in ("equipoise", "torch", "transformers", "accelerate")},
        }
        write_json(run.path / "training.json", summary)
    accelerator.print(f"model, tokenizer and metrics are in {run.path}")
    accelerator.end_training()
    return run


__all__ = ["train"]
