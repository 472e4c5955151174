"""The training loop: one plain Accelerate loop, for one process or many."""

import math
import time
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration import RunSettings
from ..data import write_json, write_whole
from .flops import peak_flops
from .interruption import Interruption
from .panels import panels, start_trackers
from .phases import PhaseTimes
from .prepare import Prepared, prepare
from .records import summary, versions
from .run_directory import RunDirectory
from .spike_guard import SpikeGuard
from .step_metrics import StepMetrics


def train(settings: RunSettings) -> RunDirectory:
    """Train a model and save it; the run directory then holds everything about the run.

    Every process of the launch calls it. What can be wrong with the settings or the data is found before training
    starts. A request to stop (see `Interruption`) saves a checkpoint and returns; `RunDirectory.stopped` says why.

    Args:
        settings: from `parse_run_settings`.

    Raises:
        ValueError: bad settings or data; the message names the field, what it must be and what it got.
        FloatingPointError: too many steps in a row were skipped, see `SpikeGuard`.
        CheckpointError: a checkpoint could not be written, or there are some and none is whole.
    """
    with ExitStack() as stack:
        prepared = prepare(settings, stack)
        main = prepared.accelerator.is_main_process
        interruption = stack.enter_context(Interruption(prepared.settings[2].max_hours))
        try:
            step = _train(prepared, interruption)
        except Exception as error:
            if main:
                with suppress(OSError):  # a full disk, perhaps: the error itself must be seen
                    prepared.run.set_status("failed", _last_step(prepared), f"{type(error).__name__}: {error}")
            raise
        if main:
            prepared.run.set_status("stopped" if prepared.run.stopped else "finished", step, prepared.run.stopped)
        for tracker in prepared.accelerator.trackers:  # `end_training` would end a process group that may be others'
            tracker.finish()
        return prepared.run


def _train(prepared: Prepared, interruption: Interruption) -> int:
    """Make the steps that are left; returns how many have been made since the run began."""
    accelerator, run, batches, checkpoints = prepared.accelerator, prepared.run, prepared.batches, prepared.checkpoints
    distribution, schedule, accumulation = prepared.distribution, prepared.schedule, prepared.accumulation
    model, wrapped, optimizer = distribution.model, distribution.wrapped, distribution.optimizer
    balancer = model.balancer
    model_settings, data, training = prepared.settings
    rank, num_processes, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process

    tokens_per_step = num_processes * accumulation * training.micro_batch_size * data.block_size
    peak = peak_flops(accelerator.device, training.peak_teraflops, training.mixed_precision)
    guard = SpikeGuard(training.spike_sigma, training.max_skipped_steps)
    metrics = StepMetrics(prepared.packed.domains, accelerator.device)
    steps_made, seconds_before = 0, 0.0
    if prepared.resumed is not None:
        steps_made, seconds_before = prepared.resumed["step"], prepared.resumed["seconds"]
        guard.load_state_dict(prepared.resumed["guard"])
        metrics.load_state_dict(prepared.resumed["metrics"], rank, num_processes)
    start = logged = saved = time.monotonic()
    last_logged_step = steps_made

    def save_model(folder: Path, weights: dict[str, Tensor]) -> None:
        prepared.shell.save_pretrained(folder, state_dict=weights)
        prepared.tokenizer.save_pretrained(folder)

    def save(step: int) -> None:
        nonlocal saved
        state = {
            "step": step,
            "tokens": step * tokens_per_step,
            "seconds": seconds_before + time.monotonic() - start,
            "world_size": num_processes,
            "data": batches.state_dict(),
            "balancer": balancer.state_dict(),
            "guard": guard.state_dict(),
            "metrics": gather_object([metrics.state_dict()]),
            "versions": versions(),
        }
        moments = None if distribution.steps_in_backward else distribution.torch_optimizer
        weights = distribution.whole_weights()
        checkpoints.save(step, model, moments, state, lambda folder: save_model(folder, weights))
        saved = time.monotonic()

    accelerator.print(
        f"{prepared.parameters / 1e6:.1f} M parameters, {num_processes} processes, "
        f"{tokens_per_step} tokens a step from {len(prepared.packed.domains)} domains, "
        f"balancing: {prepared.config.balancing_mode}; from step {steps_made} to {training.max_steps}"
    )
    if main:
        run.set_status("running", steps_made)
    if training.trackers:
        start_trackers(accelerator, vars(model_settings) | vars(data) | vars(training))
    data_state = None if prepared.resumed is None else prepared.resumed["data"]
    step, steps = steps_made, batches.steps(steps_made, data_state)
    progress = tqdm(initial=steps_made, total=training.max_steps, unit="step", disable=not main)
    with progress:
        while step < training.max_steps and run.stopped is None:
            step += 1
            logging = step == 1 or step % training.logging_steps == 0 or step == training.max_steps
            times = PhaseTimes(logging)
            with times("data"):
                micro_batches = send_to_device(next(steps), accelerator.device)
            with times("synchronisation"):
                labels = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in micro_batches]).sum()
                num_items_in_batch = accelerator.reduce(labels, "sum")

            if balancer.settings.load_estimate == "exact":
                with balancer.prepass(), times("forward"):
                    for number, batch in enumerate(micro_batches):
                        torch.manual_seed(_dropout_seed(training.seed, step, number * num_processes + rank))
                        wrapped(
                            input_ids=batch["input_ids"],
                            position_ids=batch["position_ids"],
                            labels=batch["labels"],
                            use_cache=False,
                            skip_logits=True,
                        )

            for number, batch in enumerate(micro_batches):
                # Dropout is a function of the seed and the micro-batch, whichever process has it: nothing to save.
                torch.manual_seed(_dropout_seed(training.seed, step, number * num_processes + rank))
                # DDP reduces gradients after the last micro-batch. Sharded ones are reduced after each, for else every
                # process would have to hold all of them.
                with accelerator.accumulate(wrapped):
                    with times("forward"):
                        outputs = wrapped(
                            input_ids=batch["input_ids"],
                            position_ids=batch["position_ids"],
                            labels=batch["labels"],
                            num_items_in_batch=num_items_in_batch,
                            use_cache=False,
                            skip_logits=True,
                            output_token_losses=True,
                        )
                    with times("backward"):
                        # The loss is this micro-batch's share of the global batch's: undo the means that Accelerate
                        # (over micro-steps) and DDP (over processes) take, so that the shares add up.
                        accelerator.backward(outputs.loss * accumulation * num_processes)
                metrics.add_micro_batch(outputs, batch["labels"], batch["domain"])

            with times("synchronisation"):
                reason = interruption.reason()
                save_is_due = main and _is_due(training.checkpoint_minutes, saved)
                votes = [metrics.step_loss(), torch.tensor([reason is not None, save_is_due]).to(labels.device)]
                loss, stop, save_by_time = accelerator.reduce(torch.hstack(votes), "sum").tolist()
            with times("optimizer"):
                gradient_norm = distribution.clip_gradient(training.max_grad_norm or math.inf)
                objection = guard.objection(loss, gradient_norm)
                if objection is not None and distribution.steps_in_backward:
                    raise FloatingPointError(f"step {step} is made already, as DeepSpeed does, and {objection}")
                if training.log_expert_gradients and logging:
                    expert_gradients = model.expert_gradient_norms()
                if objection is None:
                    optimizer.step()
                optimizer.zero_grad()
                balancer.after_optimizer_step(skipped=objection is not None or accelerator.optimizer_step_was_skipped)
            metrics.end_step(made=objection is None)
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            progress.update()

            if objection is not None:
                accelerator.print(f"step {step} is skipped: {objection}")
                if main:
                    record = {"step": step, "why": objection, "loss": str(loss), "grad_norm": str(gradient_norm)}
                    run.append("skipped.jsonl", record | {"micro_batches": batches.contents(step - 1)})
                if guard.exhausted:
                    raise FloatingPointError(
                        f"the loss must stay finite and in line; {guard.patience} steps in a row were skipped, the "
                        f"last, {step}, at learning rate {learning_rate:.2g}, because {objection}"
                    )

            if logging:
                record, load = metrics.read(accelerator, balancer)
                now = time.monotonic()
                speed = (step - last_logged_step) * tokens_per_step / (now - logged)
                flops = speed * prepared.flops_per_token / num_processes
                logged, last_logged_step = now, step
                if main:
                    position = {"step": step, "tokens": step * tokens_per_step}
                    pace: dict[str, Any] = {
                        "learning_rate": learning_rate,
                        "grad_norm": gradient_norm if math.isfinite(gradient_norm) else None,
                        "skipped_steps": guard.skipped,
                        "tokens_per_second": speed,
                        "teraflops_per_device": flops / 1e12,
                        "seconds": seconds_before + now - start,
                        "step_seconds": times.seconds,
                    }
                    if peak is not None:
                        pace["model_flops_utilisation"] = flops / peak
                    run.append("metrics.jsonl", position | record | pace)
                    routed: dict[str, Any] = {"step": step, "load": load}
                    if training.log_expert_gradients and expert_gradients is not None:
                        routed["expert_grad_norm"] = expert_gradients.tolist()
                    run.append("load.jsonl", routed)
                    _warn_of_gerrymandering(step, record)
                    progress.set_postfix(loss=f"{record['lm_loss']:.3f}" if "lm_loss" in record else "skipped")
                    accelerator.log(panels(record | pace | {"tokens": position["tokens"]}), step=step)

            if stop:
                reasons = gather_object([reason])
                run.stopped = next(found for found in reasons if found is not None)
            by_step = training.checkpoint_steps and step % training.checkpoint_steps == 0
            if by_step or save_by_time or stop or step == training.max_steps:
                save(step)
                if main:
                    run.set_status("running", step)

        if step == training.max_steps:
            run.stopped = None  # asked to stop just when it was done
    checkpoints.close()
    if run.stopped is not None:
        accelerator.print(f"stopped after step {step}: {run.stopped}; to go on, run it again with --resume")
        return step

    seconds = seconds_before + time.monotonic() - start
    weights = distribution.whole_weights()
    if main:
        write_whole(run.path / "model", lambda folder: save_model(folder, weights))
        record = summary(prepared, step, step * tokens_per_step, seconds, guard.skipped)
        write_json(run.path / "training.json", record)
    accelerator.print(f"model, tokenizer and metrics are in {run.path}")
    return step


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)[0] >> 1)


def _is_due(minutes: float | None, since: float) -> bool:
    return minutes is not None and time.monotonic() - since >= 60 * minutes


def _last_step(prepared: Prepared) -> int:
    found = prepared.checkpoints.found()
    return found[-1].step if found else 0


def _warn_of_gerrymandering(step: int, record: dict[str, Any]) -> None:
    gerrymandered = record.get("token_gerrymandering", [])
    if any(gerrymandered):
        layers = [layer for layer, found in enumerate(gerrymandered) if found]
        warnings.warn(
            f"step {step}: in the MoE layers {layers} the load-balancing loss is below 1 while MaxVio grows: it is "
            "being lowered without balance",
            stacklevel=2,
        )


__all__ = ["train"]
